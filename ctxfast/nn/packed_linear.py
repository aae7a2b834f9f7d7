"""Linear layers that keep a packed copy of their weight for inference, and the rules under which the copy is used.

Libraries for matrix products reorder a weight into their own blocked layout on every call, unless they are given it
reordered. There is one copy, in the form that the compute type asks for (`packed_copy`): that of csrc, which serves any
number of rows, or, for what csrc does not take, that of oneDNN. The copy belongs to a module, never to a global table,
and serves only calls without gradients in evaluation mode. It is dropped by `set_precision`, `.train()`, `.to()` and
its relatives, `load_state_dict`, deepcopy and pickling, and by every forward that records gradients, because fused
optimisers change a weight without raising its version. It is rebuilt when the parameter object, its address, shape,
dtype, version or one of a few sampled values differ. What escapes all that, a write to single elements through NumPy or
`.data`, needs `refresh(model)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctxfast import ops
from ctxfast.nn.packed_copy import Biases, PackedCopy, Weights
from ctxfast.ops import _dispatch, _native_linear, _onednn
from ctxfast.ops.linear_int8 import int8_unavailable_reason
from ctxfast.reference.linear import ACTIVATIONS

_COMPUTE = {"bfloat16": torch.bfloat16, "int8": torch.int8}


class PackOwner(nn.Module):
    """Base of modules that hold something made of their parameters, which is dropped whenever these may change."""

    def drop_packed(self) -> None:
        """Forgets what is packed; the next call that may use it makes it again."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> PackOwner:
        if mode:
            self.drop_packed()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> PackOwner:
        self.drop_packed()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.drop_packed()
        super()._load_from_state_dict(*args, **kwargs)


class PackedModule(PackOwner):
    """Base of modules that hold the packed weight of one linear layer, or of several that read the same input.

    pack: set it to False, or use `set_packing`, to run on the plain weights and save the memory of the copy.
    pack_exact: whether calls in the type of the weights get a copy, too: a copy saves part of the time of few rows, and
        large layers that run seldom may not be worth its memory.
    cast: whether the copy takes the dtype of the input where the weights have another.
    precision: None, "bfloat16" or "int8", from `set_precision`: the compute type wherever the copy serves.
    """

    pack_exact = True
    cast = False
    precision: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pack = True
        self._copy: PackedCopy | None = None

    @property
    def packed_bytes(self) -> int:
        """Bytes that the packed copy holds now."""
        copy = self._copy
        return 0 if copy is None else copy.nbytes

    def drop_packed(self) -> None:
        """Forgets the packed copy; the next call that may use one makes it again."""
        self._copy = None

    def packed_weight(self, linears: Sequence[nn.Linear], input: Tensor) -> PackedCopy | None:
        """The valid packed copy of `linears`, made if need be, or None where the plain weights must run."""
        return self._packed([x.weight for x in linears], [x.bias for x in linears], input)

    def packed_parameters(
        self, weights: Weights, biases: Biases, input: Tensor
    ) -> PackedCopy | None:
        """The same for the parameters themselves."""
        return self._packed(weights, biases, input)

    def _packed(self, weights: Weights, biases: Biases, input: Tensor) -> PackedCopy | None:
        if torch.is_grad_enabled():
            self._copy = None
            return None
        if self.training or not self.pack or not packed_copies_serve(input):
            return None
        copy, precision = self._copy, self.precision
        if precision is None and not self.pack_exact:
            return None
        compute = input.dtype if precision is None else _COMPUTE[precision]
        if copy is not None and copy.compute == compute and copy.matches(weights, biases):
            return copy
        if not _packable(weights, biases, input, self.cast or precision is not None):
            self._copy = None
            return None
        self._copy = copy = PackedCopy(weights, biases, compute)
        return copy

    def __getstate__(self) -> dict[str, Any]:
        """Serves pickling and deepcopy: a packed tensor can do neither."""
        return {**self.__dict__, "_copy": None}


def packed_copies_serve(input: Tensor) -> bool:
    """Whether a packed weight may serve now, whatever the weight."""
    return (
        _dispatch.backend() in ("auto", "native")
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and input.numel() > 0
        and type(input) in (Tensor, nn.Parameter)
        and not input.is_neg()
    )


def takes_any_rows(parameter: Tensor, precision: str | None = None) -> bool:
    """Whether packed copies of parameters like this one, in that compute type, serve every number of rows alike.

    To the GEMM library a number of rows that is new costs time, so that callers round it up.
    """
    compute = parameter.dtype if precision is None else _COMPUTE[precision]
    return (
        not torch.is_grad_enabled()
        and packed_copies_serve(parameter)
        and parameter.is_cpu
        and parameter.dim() == 2
        and (
            precision == "int8" or _native_linear.pack_refuses(compute, parameter.shape[1]) is None
        )
    )


def _packable(weights: Weights, biases: Biases, input: Tensor, cast: bool) -> bool:
    """Whether these are ordinary parameters: none computed by a parametrisation, quantised or distributed."""
    given = [bias for bias in biases if bias is not None]
    if _onednn.linear_refuses(input, weights[0], None, "none", None, None) is not None:
        return False
    return len(given) in (0, len(weights)) and all(
        type(parameter) is nn.Parameter
        and (parameter.dtype == input.dtype or (cast and parameter.is_floating_point()))
        and parameter.device == input.device
        and parameter.is_contiguous()
        and parameter.numel() > 0
        for parameter in (*weights, *given)
    )


def _parameters(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """linear.weight and linear.bias, at a tenth of the time that attributes of a module take."""
    parameters = linear._parameters
    weight = parameters.get("weight")
    if weight is None or "bias" not in parameters:
        return linear.weight, linear.bias
    return weight, parameters["bias"]


class PackedLinear(PackedModule, nn.Linear):
    """torch.nn.Linear, with the same parameters and results, on the fused operator and a packed weight."""

    def forward(
        self, input: Tensor, activation: str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """activation(input @ weight^T + bias): input [..., K] -> [..., N]; activation as in `ctxfast.ops.linear`.

        dtype: of the result, by default that of input, where `set_precision` gave a compute type
        """
        weight, bias = _parameters(self)
        copy = self._packed((weight,), (bias,), input)
        if self.precision is None:
            packed = None if copy is None else copy.weight
            return ops.linear(input, weight, bias, activation=activation, packed=packed)
        if copy is not None:
            return copy.linear(input, bias, activation, dtype)
        output = ops.linear(input.to(weight.dtype), weight, bias, activation=activation)
        return output.to(dtype or input.dtype)


def is_fusable(linear: nn.Module) -> bool:
    """Whether nothing but `PackedLinear.forward` happens when the module is called: no subclass, wrapper or hook."""
    return type(linear) is PackedLinear and not (
        linear._forward_hooks
        or linear._forward_pre_hooks
        or linear._backward_hooks
        or linear._backward_pre_hooks
        or "forward" in linear.__dict__
    )


def linear(
    module: nn.Module,
    input: Tensor,
    activation: str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """activation(module(input)), fused where `module` is a plain PackedLinear; in `dtype`, by default that of input.

    Adapters and hooks that users put around the layer see the layer alone, as in an unfused model.
    """
    if is_fusable(module):
        return PackedLinear.forward(module, input, activation, dtype)  # type: ignore[arg-type]
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype != input.dtype and _exact_types(input):
        dtype = dtype or input.dtype  # around it others compute in a narrower type
        input = input.to(weight.dtype)
    output = ACTIVATIONS[activation or "none"](module(input))
    return output if dtype is None else output.to(dtype)


def _exact_types(input: Tensor) -> bool:
    return input.is_floating_point() and not torch.is_autocast_enabled(input.device.type)


def stacked_linear(
    owner: PackedModule,
    modules: Sequence[nn.Module],
    input: Tensor,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """module(input) for each of several layers of one output size, in one product where `owner` may hold their copy."""
    copy = None
    if all(map(is_fusable, modules)):
        pairs = [_parameters(module) for module in modules]  # type: ignore[arg-type]
        copy = owner._packed([w for w, _ in pairs], [b for _, b in pairs], input)
    if copy is None:
        return tuple(linear(module, input, None, dtype) for module in modules)
    output = copy.linear(input, None, None, dtype)
    return output.view(*output.shape[:-1], len(modules), -1).unbind(-2)


def computes_in(owner: PackedModule, precision: str, input: Tensor) -> bool:
    """Whether the layers of `owner` compute in that precision, set by `set_precision`, in this call."""
    return (
        owner.precision == precision
        and owner.pack
        and not owner.training
        and not torch.is_grad_enabled()
        and packed_copies_serve(input)
    )


def inner_dtype(owner: PackedModule, input: Tensor) -> torch.dtype | None:
    """The type of what is only multiplied again, inside a layer: bfloat16 beside 8-bit products, else as it comes."""
    return torch.bfloat16 if computes_in(owner, "int8", input) else None


def packed_copies(
    owner: PackedModule, stacked: Sequence[nn.Module], single: Sequence[nn.Module], input: Tensor
) -> list[PackedCopy | None]:
    """The valid copies of the layers that `owner` holds stacked, and of others that hold their own; all are fusable.

    input: stands for the input of all of them, as to dtype and device
    """
    pairs = [_parameters(module) for module in stacked]  # type: ignore[arg-type]
    copies = [owner._packed([w for w, _ in pairs], [b for _, b in pairs], input)]
    for module in single:
        weight, bias = _parameters(module)  # type: ignore[arg-type]
        copies.append(module._packed((weight,), (bias,), input))  # type: ignore[operator]
    return copies


def refresh(model: nn.Module) -> None:
    """Forgets every packed weight in `model`, after a write that nothing announced."""
    for module in model.modules():
        if isinstance(module, PackOwner):
            module.drop_packed()


def set_packing(model: nn.Module, pack: bool) -> None:
    """Lets the modules of `model` hold packed weights or not; their memory is `packed_bytes(model)`."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.pack = pack
    refresh(model)


def set_precision(model: nn.Module, precision: str | None) -> None:
    """Sets the compute type of the linear layers of `model` for calls without gradients in evaluation mode.

    precision: None, the dtype of the parameters (exact); "bfloat16"; or "int8", one scale for each output channel and
        each row of the input. Parameters, their dtype and the state_dict stay as they are; training and calls that
        record gradients run on them.

    Raises ValueError for another name, and where this machine cannot compute in that type.
    """
    if precision not in (None, "bfloat16", "int8"):
        raise ValueError(
            f"set_precision: precision must be None, 'bfloat16' or 'int8', got {precision!r}"
        )
    reason = None
    if precision == "int8":
        reason = int8_unavailable_reason()
    elif precision == "bfloat16":
        reason = _onednn.linear_refuses(
            torch.empty(1, 1, dtype=torch.bfloat16), torch.empty(1, 1), None, "none", None, None
        )
    if reason is not None:
        raise ValueError(f"set_precision: {precision} is not available here: {reason}")
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.precision = precision
    refresh(model)


def packed_bytes(model: nn.Module) -> int:
    """Bytes that packed weights in `model` hold now, beside the parameters."""
    return sum(m.packed_bytes for m in model.modules() if isinstance(m, PackedModule))
