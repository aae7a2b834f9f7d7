"""The LSTM on CUDA across the boundary between tensors and csrc/cuda; the rules of `_native.py` hold here too.

A *runner* carries out the launches: the module ctxfast._C_cuda, or in the tests the host execution of the same kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ctxfast.ops._lstm import Direction, Kept, Sequences
from ctxfast.ops._native import _address

_COUNTER_STRIDE = 32  # as in csrc/cuda/lstm.h
_DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}

# After this long a wait inside a kernel is given up: its results are NaN, and the next call or synchronize() raises.
TIMEOUT_NANOSECONDS = 2_000_000_000


class Runner(Protocol):
    """inputs: tensors that a launch only reads; outputs: those that it also writes. None, or what went wrong."""

    def persistent(
        self,
        kernel: Kernel,
        backward: bool,
        values: Sequence[int],
        clips: tuple[float, float],
        slots: int,
        exchange: Sequence[int],
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> str | None: ...

    def stepwise(
        self,
        dtype: int,
        backward: bool,
        values: Sequence[int],
        clips: tuple[float, float],
        scratch: int,
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> str | None: ...


@dataclass(frozen=True)
class Kernel:
    """One size of the persistent kernels. key: what the runner calls it.

    cluster, clusters: blocks of a cluster, clusters of a direction;  rows: batch rows taken together;  depth: buffers
    """

    key: Any
    dtype: torch.dtype
    hidden: int
    features: int
    cluster: int
    clusters: int
    rows: int
    depth: int = 2


class _Arguments:
    """The flat list of csrc/cuda/lstm_arguments.h, and the tensors behind its addresses."""

    def __init__(self, directions: list[Direction], sequences: Sequences, kept: Kept):
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        hidden, features = sequences.c0.shape[-1], sequences.h0.shape[-1]
        batch, steps = directions[0].input.shape[:2]
        order = None
        lengths = sequences.lengths
        if lengths is not None:
            lengths = lengths.long().contiguous()
            order = torch.argsort(lengths, descending=True, stable=True)
        self.directions, self.sequences, self.kept = directions, sequences, kept
        self.empty = batch * steps == 0
        self.clips = (
            math.inf if sequences.cell_clip is None else sequences.cell_clip,
            math.inf if sequences.proj_clip is None else sequences.proj_clip,
        )
        self.values = [
            len(directions),
            batch,
            steps,
            hidden,
            features,
            len(directions) * features,
            self.input(lengths),
            self.input(order),
        ]

    def input(self, x: Tensor | None) -> int:
        """Address of x as contiguous memory that starts at a multiple of 16 bytes."""
        if x is not None:
            x = x.contiguous()
            if x.data_ptr() % 16:
                x = x.clone()
            self.inputs.append(x)
        return _address(x)

    def output(self, x: Tensor | None) -> int:
        if x is not None:
            self.outputs.append(x)
        return _address(x)

    def add_direction(
        self,
        k: int,
        gates: Tensor | None,
        weight_hh: Tensor,
        weight_hr: Tensor | None,
        grads: Sequence[Tensor | None] = (None,) * 7,
    ) -> None:
        """grads: of output, h, c, gates, projected, h0, c0, the last four to be written."""
        kept, features = self.kept, self.sequences.h0.shape[-1]
        mask = self.sequences.mask

        def part(x: Tensor) -> Tensor | None:
            return x[k] if x.numel() else None

        self.values += [
            self.input(gates),
            self.input(weight_hh),
            self.input(weight_hr),
            self.input(self.sequences.h0[k]),
            self.input(self.sequences.c0[k]),
            self.input(None if mask is None else mask[k].float()),
            self.output(kept.output[..., k * features :]),
            self.output(kept.h[k]),
            self.output(kept.c[k]),
            self.output(part(kept.gates)),
            self.output(part(kept.cells)),
            self.output(part(kept.projected)),
            *(self.output(x) for x in grads),
            int(self.directions[k].reverse),
        ]


def _finish(sequences: Sequences, kept: Kept) -> Kept:
    """No row has a step: the states stay."""
    kept.output.zero_()
    kept.h.copy_(sequences.h0)
    kept.c.copy_(sequences.c0)
    return kept


def _check(error: str | None) -> None:
    if error:
        raise RuntimeError(f"lstm: {error}")


def _forward_arguments(
    directions: list[Direction], gates: list[Tensor], sequences: Sequences, save: bool
) -> _Arguments:
    kept = Kept.allocate(directions, sequences, save)
    if sequences.lengths is not None:
        kept.output.zero_()
    call = _Arguments(directions, sequences, kept)
    for k, d in enumerate(directions):
        call.add_direction(k, gates[k], d.weight_hh, d.weight_hr)
    return call


@dataclass
class _Gradients:
    gates: list[Tensor]
    projected: list[Tensor | None]
    h0: Tensor
    c0: Tensor

    def unchanged(self, grad_output: Tensor, grad_h: Tensor, grad_c: Tensor) -> _Gradients:
        """No row has a step: the gradients of the states pass through."""
        self.h0.copy_(grad_h)
        self.c0.copy_(grad_c)
        return self

    def results(self, dtype: torch.dtype) -> tuple[Any, ...]:
        full = [None] * len(self.gates)
        return self.gates, self.projected, full, self.h0.to(dtype), self.c0


def _backward_arguments(
    directions: list[Direction],
    sequences: Sequences,
    kept: Kept,
    grad_output: Tensor,
    grad_h: Tensor,
    grad_c: Tensor,
) -> tuple[_Arguments, _Gradients]:
    """The kernels read both weights transposed, so that what they sum over is contiguous."""
    call = _Arguments(directions, sequences, kept)
    features = sequences.h0.shape[-1]
    grad_output = grad_output.contiguous()
    batch, steps = grad_output.shape[:2]
    fresh = grad_output.new_empty if sequences.lengths is None else grad_output.new_zeros
    found = _Gradients(
        [],
        [],
        sequences.c0.new_empty(sequences.h0.shape),
        sequences.c0.new_empty(sequences.c0.shape),
    )
    for k, d in enumerate(directions):
        gates = fresh((batch, steps, d.weight_hh.shape[0]))
        projected = fresh((batch, steps, features))
        found.gates.append(gates)
        found.projected.append(None if d.weight_hr is None else projected)
        grads = (
            grad_output[..., k * features :],
            grad_h[k].contiguous(),
            grad_c[k].contiguous(),
            gates,
            projected,
            found.h0[k],
            found.c0[k],
        )
        weight_hr = None if d.weight_hr is None else d.weight_hr.t()
        call.add_direction(k, None, d.weight_hh.t(), weight_hr, grads)
    return call, found


def _exchange(
    kernel: Kernel, count: int, slots: int, error: Tensor, device: torch.device
) -> tuple[list[int], list[Tensor]]:
    """What the blocks of a persistent kernel exchange: addresses and time limit, and the tensors; words are zero."""
    streams = count * slots
    counters = streams * kernel.cluster * _COUNTER_STRIDE
    words = torch.zeros(counters + _COUNTER_STRIDE, dtype=torch.int32, device=device)
    size = streams * kernel.depth * kernel.clusters * kernel.rows * kernel.features
    sums = torch.empty(size, dtype=torch.float32, device=device)
    addresses = [_address(x) for x in (sums, words, words[counters:], error)]
    return [*addresses, TIMEOUT_NANOSECONDS], [sums, words, error]


def _run_persistent(
    runner: Runner, kernel: Kernel, backward: bool, slots: int, error: Tensor, call: _Arguments
) -> None:
    exchange, tensors = _exchange(
        kernel, len(call.directions), slots, error, call.kept.output.device
    )
    outputs = [*call.outputs, *tensors]
    _check(
        runner.persistent(
            kernel, backward, call.values, call.clips, slots, exchange, call.inputs, outputs
        )
    )


def persistent_forward(
    runner: Runner,
    kernel: Kernel,
    slots: int,
    error: Tensor,
    directions: list[Direction],
    gates: list[Tensor],
    sequences: Sequences,
    save: bool,
) -> Kept:
    """`Recurrence.forward` in one launch.

    slots: groups of rows that run side by side;  error: int32 [1] that the host reads and kernels can write
    """
    call = _forward_arguments(directions, gates, sequences, save)
    if call.empty:
        return _finish(sequences, call.kept)
    _run_persistent(runner, kernel, False, slots, error, call)
    return call.kept


def persistent_backward(
    runner: Runner,
    kernel: Kernel,
    slots: int,
    error: Tensor,
    directions: list[Direction],
    sequences: Sequences,
    kept: Kept,
    *grads: Tensor,
) -> tuple[Any, ...]:
    """`Recurrence.backward` in one launch; arguments as `persistent_forward`."""
    call, found = _backward_arguments(directions, sequences, kept, *grads)
    if call.empty:
        return found.unchanged(*grads).results(kept.output.dtype)
    _run_persistent(runner, kernel, True, slots, error, call)
    return found.results(kept.output.dtype)


def _run_stepwise(runner: Runner, backward: bool, call: _Arguments) -> None:
    """scratch: what one kernel of a step leaves to the other, rounded where tensor cores read it."""
    output, projects = call.kept.output, call.directions[0].weight_hr is not None
    size = call.sequences.h0.shape[-1] if backward else call.sequences.c0.shape[-1]
    scratch = torch.empty(
        (len(call.directions), output.shape[0], size),
        dtype=output.dtype if projects else torch.float32,
        device=output.device,
    )
    dtype, outputs = _DTYPES[output.dtype], [*call.outputs, scratch]
    _check(
        runner.stepwise(
            dtype, backward, call.values, call.clips, _address(scratch), call.inputs, outputs
        )
    )


def stepwise_forward(
    runner: Runner,
    directions: list[Direction],
    gates: list[Tensor],
    sequences: Sequences,
    save: bool,
) -> Kept:
    """`Recurrence.forward` with two kernels a step."""
    call = _forward_arguments(directions, gates, sequences, save)
    if call.empty:
        return _finish(sequences, call.kept)
    _run_stepwise(runner, False, call)
    return call.kept


def stepwise_backward(
    runner: Runner, directions: list[Direction], sequences: Sequences, kept: Kept, *grads: Tensor
) -> tuple[Any, ...]:
    """`Recurrence.backward` with two kernels a step."""
    call, found = _backward_arguments(directions, sequences, kept, *grads)
    if call.empty:
        return found.unchanged(*grads).results(kept.output.dtype)
    _run_stepwise(runner, True, call)
    return found.results(kept.output.dtype)
