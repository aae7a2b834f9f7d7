"""One LSTM with a projected output: AllenNLP's names around `ops.lstm`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctxfast import ops
from ctxfast.nn.packed_copy import Fingerprint
from ctxfast.nn.packed_linear import PackedModule
from ctxfast.ops import _dispatch, _native, _native_lstm

State = tuple[Tensor, Tensor]


def block_orthogonal(weight: Tensor, rows: int, columns: int) -> None:
    """Fills each block [rows, columns] of a matrix with an orthogonal matrix of its own."""
    with torch.no_grad():
        for first in range(0, weight.shape[0], rows):
            for start in range(0, weight.shape[1], columns):
                block = torch.empty(rows, columns)
                nn.init.orthogonal_(block)
                weight[first : first + rows, start : start + columns] = block


class _PackedCell:
    """The weights as the kernels of one instruction set read them, and what they were made from."""

    def __init__(self, sources: list[Tensor], weight_dtype: torch.dtype | None) -> None:
        self.key = (_native.isa(), weight_dtype)
        # Outside inference mode, so that the copy also serves calls under no_grad.
        with torch.inference_mode(False), torch.no_grad():
            weight_hr = sources[2] if len(sources) > 2 else None
            self.tensor = _native_lstm.pack(sources[0], sources[1], weight_hr, weight_dtype)
            self.fingerprints = [Fingerprint(source) for source in sources]

    def fits(self, sources: list[Tensor], weight_dtype: torch.dtype | None) -> bool:
        return self.key == (_native.isa(), weight_dtype) and all(
            map(Fingerprint.matches, self.fingerprints, sources)
        )

    @property
    def nbytes(self) -> int:
        return self.tensor.numel()


class LstmCellWithProjection(PackedModule):
    """An LSTM over whole sequences whose output, and recurrent input, is a clipped projection (Sak et al., 2014).

    input_size:  features of the input;  hidden_size: of the output, P;  cell_size: of the cell, D. With hidden_size =
                 cell_size and `project` False there is no projection
    go_forward:  direction
    recurrent_dropout_probability: of one mask a call and row on the output, in training
    memory_cell_clip_value, state_projection_clip_value: bounds, or None
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        cell_size: int,
        go_forward: bool = True,
        recurrent_dropout_probability: float = 0.0,
        memory_cell_clip_value: float | None = None,
        state_projection_clip_value: float | None = None,
        *,
        project: bool = True,
    ) -> None:
        super().__init__()
        if not project and hidden_size != cell_size:
            raise ValueError(
                "LstmCellWithProjection: hidden_size must be cell_size without a projection, got "
                f"{hidden_size} and {cell_size}"
            )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.cell_size = cell_size
        self.go_forward = go_forward
        self.recurrent_dropout_probability = recurrent_dropout_probability
        self.memory_cell_clip_value = memory_cell_clip_value
        self.state_projection_clip_value = state_projection_clip_value
        self.input_linearity = nn.Linear(input_size, 4 * cell_size, bias=False)
        self.state_linearity = nn.Linear(hidden_size, 4 * cell_size, bias=True)
        self.state_projection = nn.Linear(cell_size, hidden_size, bias=False) if project else None
        if not self.input_linearity.weight.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Orthogonal blocks for each gate, bias 0 and 1 for the forget gate."""
        block_orthogonal(self.input_linearity.weight, self.cell_size, self.input_size)
        block_orthogonal(self.state_linearity.weight, self.cell_size, self.hidden_size)
        with torch.no_grad():
            self.state_linearity.bias.zero_()
            self.state_linearity.bias[self.cell_size : 2 * self.cell_size] = 1.0

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """weight_ih, weight_hh, bias and weight_hr of `ops.lstm`."""
        projection = None if self.state_projection is None else self.state_projection.weight
        state = self.state_linearity
        return self.input_linearity.weight, state.weight, state.bias, projection

    def packed_weights(self, input: Tensor, weight_dtype: torch.dtype | None) -> Tensor | None:
        """The valid packed copy of the weights, made if need be; None where the plain ones must run.

        Frozen weights are packed in training too: nothing changes them behind torch's back.
        """
        weight_ih, weight_hh, _, weight_hr = self.weights
        sources = [x for x in (weight_ih, weight_hh, weight_hr) if x is not None]
        trained = any(x.requires_grad for x in sources)
        if torch.is_grad_enabled():
            self._copy = None
            return None
        if (
            (self.training and trained)
            or not self.pack
            or torch.compiler.is_compiling()
            or _dispatch.backend() == "reference"
            or torch.is_autocast_enabled("cpu")
        ):
            return None
        copy = self._copy
        if isinstance(copy, _PackedCell) and copy.fits(sources, weight_dtype):
            return copy.tensor
        self._copy = None
        plain = all(
            type(x) is nn.Parameter and x.dtype == input.dtype and x.is_contiguous()
            for x in sources
        )
        if plain and _native_lstm.refuses(input, *sources) is None:
            made = _PackedCell(sources, weight_dtype)
            self._copy = made  # type: ignore[assignment]
            return made.tensor
        return None

    @property
    def bounds(self) -> dict[str, Any]:
        """cell_clip and proj_clip of `ops.lstm`; AllenNLP's 0 is no bound."""
        projected = self.state_projection is not None
        return {
            "cell_clip": self.memory_cell_clip_value or None,
            "proj_clip": (self.state_projection_clip_value or None) if projected else None,
        }

    def forward(
        self,
        inputs: Tensor,
        batch_lengths: Sequence[int] | Tensor,
        initial_state: State | None = None,
    ) -> tuple[Tensor, State]:
        """inputs [B, T, input_size], a length for each row (in any order), h [1, B, P] and c [1, B, D].

        Returns outputs [B, T, P], zero from its length on in each row, and (h [1, B, P], c [1, B, D]).
        """
        weight_ih, weight_hh, bias, weight_hr = self.weights
        state = None if initial_state is None else (initial_state[0][0], initial_state[1][0])
        output, h, c = ops.lstm(
            inputs,
            weight_ih,
            weight_hh,
            bias,
            weight_hr,
            lengths=batch_lengths,
            initial_state=state,
            reverse=not self.go_forward,
            recurrent_dropout_p=self.recurrent_dropout_probability if self.training else 0.0,
            **self.bounds,
        )
        return output, (h.unsqueeze(0), c.unsqueeze(0))
