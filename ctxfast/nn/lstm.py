"""torch.nn.LSTM on the operator `ctxfast.ops.lstm`: the same constructor, parameters, results and gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ctxfast import ops
from ctxfast.nn.packed_copy import Fingerprint
from ctxfast.nn.packed_linear import PackedModule
from ctxfast.ops import _dispatch, _native, _native_lstm

State = tuple[Tensor, Tensor]
# weight_ih, weight_hh, bias, weight_hr of one layer and direction
Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class _PackedLayers:
    """The weights of every layer and direction as the kernels read them, for one instruction set."""

    def __init__(self, weights: list[Weights], weight_dtype: torch.dtype | None) -> None:
        self.key = (_native.isa(), weight_dtype)
        # Outside inference mode, so that the copy also serves calls under no_grad.
        with torch.inference_mode(False), torch.no_grad():
            self.tensors = [
                _native_lstm.pack(ih, hh, hr, weight_dtype) for ih, hh, _, hr in weights
            ]
            self.fingerprints = [Fingerprint(x) for x in _matrices(weights)]

    def fits(self, weights: list[Weights], weight_dtype: torch.dtype | None) -> bool:
        sources = _matrices(weights)
        return (
            self.key == (_native.isa(), weight_dtype)
            and len(sources) == len(self.fingerprints)
            and all(map(Fingerprint.matches, self.fingerprints, sources))
        )

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors)


def _matrices(weights: list[Weights]) -> list[Tensor]:
    return [x for ih, hh, _, hr in weights for x in (ih, hh, hr) if x is not None]


class LSTM(PackedModule, nn.LSTM):
    """Drop-in for torch.nn.LSTM, with its constructor, state_dict, inputs and outputs.

    On CPU it runs on the fused operator, which is several times faster with a projection (`proj_size`) and needs no
    packing for sequences of their own lengths. Calls that the operator's C++ code does not serve (other devices,
    float16, quantised or distributed parameters) run on torch's own implementation.

    In evaluation mode without gradients it holds a second copy of the weights, in the layout of the kernels:
    see `ctxfast.nn.packed_linear` for the rules, `packed_bytes` for its memory and `pack = False` for doing without.

    `torch.compile` leaves every subclass of torch.nn.LSTM out of its graphs unless `torch._dynamo.config.allow_rnn` is
    set; `ctxfast.ops.lstm` itself is one node of a graph.

    weight_dtype: torch.bfloat16 or torch.int8 makes that copy smaller and what is bound by memory faster, at the
        precision that the name says; None, the default, is exact. Calls that record gradients ignore it.
    """

    _copy: _PackedLayers | None  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight_dtype: torch.dtype | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Serves pickling and deepcopy: neither the weak references that torch keeps nor the packed copy follow."""
        return {**nn.LSTM.__getstate__(self), "_copy": None}

    def _layer_weights(self, layer: int, reverse: bool) -> Weights:
        suffix = f"_l{layer}_reverse" if reverse else f"_l{layer}"
        weight_ih, weight_hh = (getattr(self, f"weight_{n}{suffix}") for n in ("ih", "hh"))
        bias = None
        if self.bias:
            bias = getattr(self, f"bias_ih{suffix}") + getattr(self, f"bias_hh{suffix}")
        weight_hr = getattr(self, f"weight_hr{suffix}") if self.proj_size else None
        return weight_ih, weight_hh, bias, weight_hr

    def _packed_weights(self, weights: list[Weights], input: Tensor) -> _PackedLayers | None:
        """The valid packed copy, made if need be, or None where the plain weights must run."""
        if torch.is_grad_enabled():
            self._copy = None
            return None
        if (
            self.training
            or not self.pack
            or torch.compiler.is_compiling()
            or _dispatch.backend() == "reference"
            or torch.is_autocast_enabled("cpu")
        ):
            return None
        if self._copy is not None and self._copy.fits(weights, self.weight_dtype):
            return self._copy
        self._copy = None
        if all(
            type(x) is nn.Parameter and x.dtype == input.dtype and x.is_contiguous()
            for x in _matrices(weights)
        ):
            self._copy = _PackedLayers(weights, self.weight_dtype)
        return self._copy

    def _served(self, input: Tensor, hx: State | None, weights: list[Weights]) -> bool:
        """Whether the operator runs this call: torch's own is faster than the operator's eager reference."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return True
        if _dispatch.backend() == "reference":
            return True
        tensors = (input, *(hx or ()), *(x for layer in weights for x in layer if x is not None))
        return _native_lstm.refuses(*tensors) is None

    def forward(  # type: ignore[override]
        self, input: Tensor | PackedSequence, hx: State | None = None
    ) -> tuple[Any, State]:
        """Arguments and results of torch.nn.LSTM.forward."""
        data = input.data if isinstance(input, PackedSequence) else input
        directions = 2 if self.bidirectional else 1
        weights = [
            self._layer_weights(layer, bool(reverse))
            for layer in range(self.num_layers)
            for reverse in range(directions)
        ]
        if not self._served(data, hx, weights):
            return super().forward(input, hx)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, weights)
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(0 if self.batch_first else 1)
        if hx is not None and not batched:
            hx = self._batched_state(hx)
        elif hx is not None:
            for name, part in zip(("hx", "cx"), hx, strict=True):
                if part.dim() != 3:
                    raise RuntimeError(
                        f"For batched 3-D input, hx and cx should also be 3-D but got {name} of {part.dim()}-D"
                    )
        self.check_forward_args(x, self._state(hx, x), None)  # type: ignore[arg-type]
        sequence = x if self.batch_first else x.transpose(0, 1)
        output, state = self._run(sequence, hx, weights, None)
        output = output if self.batch_first else output.transpose(0, 1)
        if not batched:
            return output.squeeze(0 if self.batch_first else 1), (
                state[0].squeeze(1),
                state[1].squeeze(1),
            )
        return output, state

    @staticmethod
    def _batched_state(hx: State) -> State:
        if hx[0].dim() != 2 or hx[1].dim() != 2:
            raise RuntimeError(
                f"For unbatched 2-D input, hx and cx should also be 2-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D)"
            )
        return hx[0].unsqueeze(1), hx[1].unsqueeze(1)

    def _state(self, hx: State | None, x: Tensor) -> State:
        """hx, or what stands for zeros where torch checks shapes."""
        if hx is not None:
            return hx
        batch = x.shape[0] if self.batch_first else x.shape[1]
        rows = self.num_layers * (2 if self.bidirectional else 1)
        zero = x.new_zeros(())
        return (
            zero.expand(rows, batch, self.proj_size or self.hidden_size),
            zero.expand(rows, batch, self.hidden_size),
        )

    def _forward_packed(
        self, input: PackedSequence, hx: State | None, weights: list[Weights]
    ) -> tuple[PackedSequence, State]:
        """In the order of the packed rows, so that the result is packed as the input is."""
        data, batch_sizes, sorted_indices, unsorted_indices = input
        in_order = PackedSequence(data, batch_sizes)
        x, lengths = pad_packed_sequence(in_order, batch_first=True)
        if hx is not None:
            hx = self.permute_hidden(hx, sorted_indices)
            self.check_forward_args(data, hx, batch_sizes)
        else:
            self.check_input(data, batch_sizes)
        output, state = self._run(x, hx, weights, lengths)
        packed = pack_padded_sequence(output, lengths, batch_first=True)
        return (
            PackedSequence(packed.data, batch_sizes, sorted_indices, unsorted_indices),
            self.permute_hidden(state, unsorted_indices),
        )

    def _run(
        self, x: Tensor, hx: State | None, weights: list[Weights], lengths: Tensor | None
    ) -> tuple[Tensor, State]:
        """x [B, T, K] -> output [B, T, D * P] and the states of all layers."""
        directions = 2 if self.bidirectional else 1
        copy = self._packed_weights(weights, x)
        weight_dtype = None if copy is None else self.weight_dtype
        states = []
        for layer in range(self.num_layers):
            rows = slice(layer * directions, (layer + 1) * directions)
            if layer > 0 and self.dropout > 0.0 and self.training:
                # In time-major order, as torch draws its mask.
                x = F.dropout(x.transpose(0, 1).contiguous(), self.dropout).transpose(0, 1)
            own = None if hx is None else (hx[0][rows], hx[1][rows])
            packed = None if copy is None else copy.tensors[rows]
            x, h, c = self._layer(x, weights[rows], own, lengths, packed, weight_dtype)
            states.append((h, c.to(h.dtype)))
        return x, (torch.cat([h for h, _ in states]), torch.cat([c for _, c in states]))

    def _layer(
        self,
        x: Tensor,
        weights: list[Weights],
        state: State | None,
        lengths: Tensor | None,
        packed: list[Tensor] | None,
        weight_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if len(weights) == 2:
            pairs = [
                None if a is None or b is None else (a, b) for a, b in zip(*weights, strict=True)
            ]
            return ops.bilstm(
                x,
                *pairs,  # type: ignore[arg-type]
                lengths=lengths,
                initial_state=state,
                weight_dtype=weight_dtype,
                packed=None if packed is None else (packed[0], packed[1]),
            )
        output, h, c = ops.lstm(
            x,
            *weights[0],
            lengths=lengths,
            initial_state=None if state is None else (state[0][0], state[1][0]),
            weight_dtype=weight_dtype,
            packed=None if packed is None else packed[0],
        )
        return output, h.unsqueeze(0), c.unsqueeze(0)
