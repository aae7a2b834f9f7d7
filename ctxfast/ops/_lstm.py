"""What every implementation of the LSTM operator shares: the products outside the loop over time.

An implementation supplies a `Recurrence`, the loop over time and its way back. The product with the input comes before
it (`input_gates`, or within), those that give the gradients of input and weights after it: single large products, on
the GEMM library of the platform or of the implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxfast.ops import _onednn
from ctxfast.reference.lstm import input_gates as rounded_gates
from ctxfast.reference.lstm import (
    lstm_recurrence,
    lstm_recurrence_backward,
    previous_states,
    round_weight,
    valid_positions,
)


@dataclass(frozen=True)
class Direction:
    """One direction. packed: the recurrent weights in the layout of an implementation, which made it, or None."""

    input: Tensor
    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor | None
    weight_hr: Tensor | None
    packed: Tensor | None
    reverse: bool


@dataclass(frozen=True)
class Sequences:
    """What the directions share.

    h0: [D, B, P];  c0: [D, B, H] in the compute type;  lengths: int64 [B] or None;  mask: [D, B, P] in the compute type
    """

    h0: Tensor
    c0: Tensor
    lengths: Tensor | None
    mask: Tensor | None
    cell_clip: float | None
    proj_clip: float | None
    weight_dtype: torch.dtype | None

    def of(self, k: int, direction: Direction) -> dict[str, Any]:
        """Keyword arguments of the reference for direction k."""
        return {
            "lengths": self.lengths,
            "mask": None if self.mask is None else self.mask[k],
            "reverse": direction.reverse,
            "cell_clip": self.cell_clip,
            "proj_clip": self.proj_clip,
        }


@dataclass(frozen=True)
class Kept:
    """Results of the loop; the last three for its way back, empty where they are not wanted.

    output: [B, T, D * P];  h: [D, B, P];  c: [D, B, H]
    gates: activated, [D, B, T, 4H];  cells: before the clip, in the compute type, [D, B, T, H]
    projected: before the clip, in the compute type, [D, B, T, P], only with a clip of the projected state.
    Past a row's end output is 0 and the three others are arbitrary.
    """

    output: Tensor
    h: Tensor
    c: Tensor
    gates: Tensor
    cells: Tensor
    projected: Tensor

    @classmethod
    def allocate(cls, directions: list[Direction], sequences: Sequences, save: bool) -> Kept:
        count, (batch, steps) = len(directions), directions[0].input.shape[:2]
        like, cells = directions[0].input, sequences.c0
        rows, features = directions[0].weight_hh.shape
        many = (count, batch, steps)
        clipped = save and sequences.proj_clip is not None
        return cls(
            like.new_empty(batch, steps, count * features),
            like.new_empty(count, batch, features),
            cells.new_empty(count, batch, rows // 4),
            like.new_empty((*many, rows) if save else 0),
            cells.new_empty((*many, rows // 4) if save else 0),
            cells.new_empty((*many, features) if clipped else 0),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return self.output, self.h, self.c, self.gates, self.cells, self.projected


Gradients = tuple[list[Tensor], list[Tensor | None], list[Tensor | None], Tensor, Tensor]


@dataclass(frozen=True)
class Recurrence:
    """forward(directions, sequences, save) -> Kept
    backward(directions, sequences, kept, grad_output [B, T, D * P], grad_h, grad_c)
        -> for each direction the gradients of gates [B, T, 4H] and, with a projection, of projected [B, T, P], both in
           the type of the input and 0 past a row's end; what the projection read, o * tanh(c) [B, T, H], or None
           where the loop does not leave it; then the gradients of h0 and c0
    product(a [M, K], b [K, N]) -> a @ b in float32 and float64, by default on the library of the platform
    product_and_sums(a, b) -> the same, and the sums [M] of the rows of a
    """

    forward: Callable[..., Kept]
    backward: Callable[..., Gradients]
    product: Callable[[Tensor, Tensor], Tensor] | None = None
    product_and_sums: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """a [M, K] @ b [K, N]"""
        if self.product is None or a.dtype not in (torch.float32, torch.float64):
            return _linear(a, b.t(), None)
        return self.product(a, b)

    def multiply_and_sum(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """a [M, K] @ b [K, N], and the sums [M] of the rows of a"""
        if self.product_and_sums is None or a.dtype not in (torch.float32, torch.float64):
            return self.multiply(a, b), a.sum(1)
        return self.product_and_sums(a, b)


def parse(
    input,
    input_reverse,
    weight_ih,
    weight_ih_reverse,
    weight_hh,
    weight_hh_reverse,
    bias,
    bias_reverse,
    weight_hr,
    weight_hr_reverse,
    h0,
    c0,
    lengths,
    mask,
    packed,
    packed_reverse,
    reverse,
    cell_clip,
    proj_clip,
    weight_dtype,
) -> tuple[list[Direction], Sequences]:
    """The arguments of the registered operator in order; input_reverse None beside two directions is a shared input."""
    directions = [Direction(input, weight_ih, weight_hh, bias, weight_hr, packed, reverse)]
    if weight_ih_reverse is not None:
        other = input if input_reverse is None else input_reverse
        directions.append(
            Direction(
                other,
                weight_ih_reverse,
                weight_hh_reverse,
                bias_reverse,
                weight_hr_reverse,
                packed_reverse,
                True,
            )
        )
    return directions, Sequences(h0, c0, lengths, mask, cell_clip, proj_clip, weight_dtype)


def _check_lengths(lengths: Tensor | None, steps: int) -> None:
    """On CPU only: reading them on a GPU would wait for it."""
    if lengths is None or not lengths.is_cpu or lengths.numel() == 0:
        return
    low, high = (int(x) for x in lengths.aminmax())
    if low < 0 or high > steps:
        raise ValueError(f"lstm: lengths must be in [0, {steps}], got {low if low < 0 else high}")


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _onednn.linear_refuses(input, weight, bias, "none", None, None) is None:
        return _onednn.linear(input, weight, bias, "none", None, None)
    return F.linear(input, weight, bias)


def input_gates(directions: list[Direction], sequences: Sequences, save: bool) -> list[Tensor]:
    """What the input contributes to the gates of each direction, [B, T, 4H]."""
    return [_input_gates(d, None if save else sequences.lengths) for d in directions]


def _input_gates(d: Direction, lengths: Tensor | None) -> Tensor:
    """[B, T, 4H], undefined past a row's end where many positions lie there: those are not computed.

    A single row is computed twice: the product of a vector may add up in another order.
    """
    batch, steps = d.input.shape[:2]
    if batch * steps == 1:
        return _linear(d.input.expand(2, 1, -1).contiguous(), d.weight_ih, d.bias)[:1]
    valid = batch * steps if lengths is None or not lengths.is_cpu else int(lengths.sum())
    if valid < 2 or valid >= 0.9 * batch * steps:
        return _linear(d.input, d.weight_ih, d.bias)
    assert lengths is not None
    places = valid_positions(lengths, steps).flatten().nonzero().squeeze(1)
    rows = d.input.reshape(batch * steps, -1).index_select(0, places)
    gates = d.input.new_empty(batch * steps, d.weight_ih.shape[0])
    gates.index_copy_(0, places, _linear(rows, d.weight_ih, d.bias))
    return gates.view(batch, steps, -1)


def forward(recurrence: Recurrence, arguments: tuple[Any, ...], save: bool) -> Kept:
    directions, sequences = parse(*arguments)
    _check_lengths(sequences.lengths, directions[0].input.shape[1])
    return recurrence.forward(directions, sequences, save)


def _valid_rows(x: Tensor, lengths: Tensor | None) -> Tensor:
    """[B, T, N] as rows; what lies past a row's end is 0, so that a NaN there meets no product."""
    if lengths is not None:
        valid = valid_positions(lengths, x.shape[1])
        x = torch.where(valid, x, torch.zeros_like(x))
    return x.reshape(-1, x.shape[-1])


def backward(
    recurrence: Recurrence,
    grads: tuple[Tensor, Tensor, Tensor],
    arguments: tuple[Any, ...],
    kept: Kept,
) -> tuple[Tensor, ...]:
    """Gradients of the ten tensors before h0, empty where there is none, then of h0 and c0."""
    directions, sequences = parse(*arguments)
    if kept.gates.numel() == 0 and kept.output.numel() > 0:
        kept = forward(recurrence, arguments, True)
    dgates, dprojected, left, dh0, dc0 = recurrence.backward(directions, sequences, kept, *grads)
    features = sequences.h0.shape[-1]
    absent = sequences.h0.new_empty(0)
    found: list[list[Tensor]] = [[] for _ in range(5)]
    for k, d in enumerate(directions):
        input = _valid_rows(d.input, sequences.lengths)
        rows = dgates[k].reshape(-1, dgates[k].shape[-1])
        output = kept.output[..., k * features : (k + 1) * features]
        before = previous_states(output, sequences.h0[k], sequences.lengths, d.reverse).reshape(
            -1, features
        )
        found[0].append(recurrence.multiply(rows, d.weight_ih).view(d.input.shape))
        if d.bias is None:
            dweight, dbias = recurrence.multiply(rows.t(), input), absent
        else:
            dweight, dbias = recurrence.multiply_and_sum(rows.t(), input)
        found[1].append(dweight)
        found[2].append(recurrence.multiply(rows.t(), before))
        found[3].append(dbias)
        projected = dprojected[k]
        if d.weight_hr is None or projected is None:
            found[4].append(absent)
        else:
            full = left[k]
            if full is None:
                full = _full_states(kept, sequences, k).to(d.input.dtype)
                full = _valid_rows(full, sequences.lengths)
            full_rows = full.reshape(-1, full.shape[-1])
            found[4].append(recurrence.multiply(projected.reshape(-1, features).t(), full_rows))
    if len(directions) == 1:
        for parts in found:
            parts.append(absent)
    elif arguments[1] is None:  # both directions read one input
        found[0] = [found[0][0] + found[0][1], absent]
    flat = [part for parts in found for part in parts]
    # An operator's results must not share memory.
    return *(absent.new_empty(0) if x is absent else x for x in flat), dh0, dc0


def _full_states(kept: Kept, sequences: Sequences, k: int) -> Tensor:
    """What the projection read, o * tanh(c), [B, T, H]."""
    cells = kept.cells[k]
    if sequences.cell_clip is not None:
        cells = cells.clamp(-sequences.cell_clip, sequences.cell_clip)
    return kept.gates[k][..., -cells.shape[-1] :] * cells.tanh()


def _reference_forward(directions: list[Direction], sequences: Sequences, save: bool) -> Kept:
    if sequences.weight_dtype is None:
        gates = input_gates(directions, sequences, save)
    else:
        held = sequences.weight_dtype
        gates = [rounded_gates(d.input, d.weight_ih, d.bias, held) for d in directions]
    kept = Kept.allocate(directions, sequences, save)
    features = sequences.h0.shape[-1]
    for k, d in enumerate(directions):
        hh = round_weight(d.weight_hh, sequences.weight_dtype)
        hr = d.weight_hr
        hr = None if hr is None else round_weight(hr, sequences.weight_dtype)
        output, h, c, saved = lstm_recurrence(
            gates[k], hh, hr, sequences.h0[k], sequences.c0[k], **sequences.of(k, d)
        )
        kept.output[..., k * features : (k + 1) * features] = output
        kept.h[k], kept.c[k] = h, c
        if save:
            kept.gates[k], kept.cells[k] = saved[0], saved[1]
            if sequences.proj_clip is not None:
                kept.projected[k] = saved[2]
    return kept


def _reference_backward(
    directions: list[Direction],
    sequences: Sequences,
    kept: Kept,
    grad_output: Tensor,
    grad_h: Tensor,
    grad_c: Tensor,
) -> Gradients:
    features = sequences.h0.shape[-1]
    found = []
    for k, d in enumerate(directions):
        part = grad_output[..., k * features : (k + 1) * features]
        projected = part if sequences.proj_clip is None else kept.projected[k]
        found.append(
            lstm_recurrence_backward(
                part,
                grad_h[k],
                grad_c[k],
                (kept.gates[k], kept.cells[k], projected),
                d.weight_hh,
                d.weight_hr,
                sequences.c0[k],
                **sequences.of(k, d),
            )
        )
    dgates, dprojected, dh0, dc0 = zip(*found, strict=True)
    dtype = directions[0].input.dtype
    return (
        [x.to(dtype) for x in dgates],
        [None if directions[0].weight_hr is None else x.to(dtype) for x in dprojected],
        [None] * len(directions),
        torch.stack(dh0).to(dtype),
        torch.stack(dc0),
    )


REFERENCE = Recurrence(_reference_forward, _reference_backward)


def eager(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """output, h and c by the reference from end to end, differentiable any number of times."""
    directions, sequences = parse(*arguments)
    results = []
    for k, d in enumerate(directions):
        input = d.input
        if sequences.lengths is not None:
            valid = valid_positions(sequences.lengths, input.shape[1])
            input = torch.where(valid, input, torch.zeros_like(input))
        gates = F.linear(input, d.weight_ih, d.bias)
        state = sequences.h0[k], sequences.c0[k]
        results.append(
            lstm_recurrence(gates, d.weight_hh, d.weight_hr, *state, **sequences.of(k, d))[:3]
        )
    outputs, h, c = zip(*results, strict=True)
    return torch.cat(outputs, -1), torch.stack(h), torch.stack(c)
