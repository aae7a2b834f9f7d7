"""The two stacks of LSTMs of an ELMo: AllenNLP's ElmoLstm on `ops.bilstm`."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ctxfast import ops
from ctxfast.elmo.cell import LstmCellWithProjection
from ctxfast.elmo.states import StatefulModule, States

# Gates of a layer that are held at once where no gradient needs them: long inputs run in parts of the time.
CHUNK_BYTES = 256 << 20


class ElmoLstm(StatefulModule):
    """A forward and a backward stack of LSTMs with projection, which never see each other.

    input_size, hidden_size (P), cell_size (D), num_layers (L): sizes
    requires_grad: whether loaded weights are trainable
    recurrent_dropout_probability, memory_cell_clip_value, state_projection_clip_value: as in LstmCellWithProjection
    use_skip_connections: whether the layers from the second on add their input to their output
    project:     False for cells without a projection
    stateful:    see `StatefulModule`

    weight_dtype, an attribute: torch.bfloat16 or torch.int8 holds the weights so for inference; None is exact.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        cell_size: int,
        num_layers: int,
        requires_grad: bool = False,
        recurrent_dropout_probability: float = 0.0,
        memory_cell_clip_value: float | None = None,
        state_projection_clip_value: float | None = None,
        *,
        use_skip_connections: bool = True,
        project: bool = True,
        stateful: bool | str = True,
    ) -> None:
        super().__init__(stateful)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.cell_size = cell_size
        self.num_layers = num_layers
        self.requires_grad = requires_grad
        self.use_skip_connections = use_skip_connections
        self.weight_dtype: torch.dtype | None = None
        for name, go_forward in (("forward", True), ("backward", False)):
            for layer in range(num_layers):
                cell = LstmCellWithProjection(
                    input_size if layer == 0 else hidden_size,
                    hidden_size,
                    cell_size,
                    go_forward,
                    recurrent_dropout_probability,
                    memory_cell_clip_value,
                    state_projection_clip_value,
                    project=project,
                )
                self.add_module(f"{name}_layer_{layer}", cell)

    def cells(self, layer: int) -> tuple[LstmCellWithProjection, LstmCellWithProjection]:
        """The forward and the backward LSTM of a layer."""
        return getattr(self, f"forward_layer_{layer}"), getattr(self, f"backward_layer_{layer}")

    def load_weights(self, weight_file: str | os.PathLike[str]) -> None:
        """Takes the LSTM weights of a published hdf5 file."""
        from ctxfast.elmo.weights import read_lstm_weights

        tensors = read_lstm_weights(weight_file, self)
        self.load_state_dict(tensors)
        for parameter in self.parameters():
            parameter.requires_grad_(self.requires_grad)

    def forward(self, inputs: Tensor, mask: Tensor, num_layers: int | None = None) -> Tensor:
        """inputs [B, T, input_size], mask [B, T] with each row's tokens first -> [L, B, T, 2P].

        num_layers: compute only so many of the layers; the states of the others stay

        The outputs of a row are zero behind its tokens. A row without tokens keeps its state.
        """
        batch, steps = inputs.shape[:2]
        lengths = mask.bool().sum(1)
        wanted = self.num_layers if num_layers is None else num_layers
        frozen = not inputs.requires_grad and not any(p.requires_grad for p in self.parameters())
        cell_dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        with torch.no_grad() if frozen else nullcontext():
            h0, c0 = self._initial_states(batch, inputs, cell_dtype)
            outputs, states = [], []
            below: Tensor | tuple[Tensor, Tensor] = inputs
            residual = None
            for layer in range(wanted):
                state = self._per_direction(h0[layer]), self._per_direction(c0[layer])
                output, h, c = self._run(layer, below, lengths, state, residual)
                outputs.append(output)
                states.append((self._joined(h), self._joined(c)))
                below = output[..., : self.hidden_size], output[..., self.hidden_size :]
                residual = output if self.use_skip_connections else None
            result = (
                torch.stack(outputs)
                if outputs
                else inputs.new_zeros(0, batch, steps, 2 * self.hidden_size)
            )
        h, c = (
            torch.stack([*(pair[i] for pair in states), *before[wanted:].unbind()])
            if states
            else before
            for i, before in enumerate((h0, c0))
        )
        self._keep_states(h, c)
        return result

    def _state_sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.num_layers, 2 * self.hidden_size), (self.num_layers, 2 * self.cell_size)

    @staticmethod
    def _per_direction(state: Tensor) -> Tensor:
        """[B, 2N] -> [2, B, N]"""
        return torch.stack(state.chunk(2, -1))

    @staticmethod
    def _joined(state: Tensor) -> Tensor:
        """[2, B, N] -> [B, 2N]"""
        return torch.cat(state.unbind(0), -1)

    def _run(
        self,
        layer: int,
        inputs: Tensor | tuple[Tensor, Tensor],
        lengths: Tensor,
        state: States,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer of both directions: output [B, T, 2P], h [2, B, P], c [2, B, D]."""
        first = inputs if isinstance(inputs, Tensor) else inputs[0]
        batch, steps = first.shape[:2]
        step_bytes = 2 * 4 * self.cell_size * batch * first.element_size()
        dropout = self.training and self.cells(layer)[0].recurrent_dropout_probability > 0.0
        chunk = max(CHUNK_BYTES // max(step_bytes, 1), 1)
        if steps > chunk and not torch.is_grad_enabled() and not dropout:
            return self._run_in_parts(layer, inputs, lengths, state, residual, chunk)
        forward, backward = self.cells(layer)
        weight_dtype = None if torch.is_grad_enabled() else self.weight_dtype
        packed = tuple(cell.packed_weights(first, weight_dtype) for cell in (forward, backward))
        weights: Any = tuple(zip(forward.weights, backward.weights, strict=True))
        return ops.bilstm(
            inputs,
            weights[0],
            weights[1],
            weights[2],
            None if weights[3][0] is None else weights[3],
            lengths=lengths,
            initial_state=state,
            residual=residual,
            recurrent_dropout_p=forward.recurrent_dropout_probability if dropout else 0.0,
            weight_dtype=weight_dtype,
            packed=packed,  # type: ignore[arg-type]
            **forward.bounds,
        )

    def _run_in_parts(
        self,
        layer: int,
        inputs: Tensor | tuple[Tensor, Tensor],
        lengths: Tensor,
        state: States,
        residual: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same in parts of the time, states handed over: exact. The backward direction begins at the end."""
        pair = (inputs, inputs) if isinstance(inputs, Tensor) else inputs
        batch, steps = pair[0].shape[:2]
        output = pair[0].new_empty(batch, steps, 2 * self.hidden_size)
        final = []
        for index, (cell, own) in enumerate(zip(self.cells(layer), pair, strict=True)):
            weight_ih, weight_hh, bias, weight_hr = cell.weights
            h, c = state[0][index], state[1][index]
            starts = range(0, steps, chunk)
            for start in starts if cell.go_forward else reversed(starts):
                part = own[:, start : start + chunk]
                place = slice(index * self.hidden_size, (index + 1) * self.hidden_size)
                part_output, h, c = ops.lstm(
                    part,
                    weight_ih,
                    weight_hh,
                    bias,
                    weight_hr,
                    lengths=(lengths - start).clamp(0, part.shape[1]),
                    initial_state=(h, c),
                    reverse=not cell.go_forward,
                    weight_dtype=self.weight_dtype,
                    packed=cell.packed_weights(part, self.weight_dtype),
                    **cell.bounds,
                )
                output[:, start : start + chunk, place] = part_output
            final.append((h, c))
        if residual is not None:
            output += residual
        return output, torch.stack([h for h, _ in final]), torch.stack([c for _, c in final])
