"""Which CUDA implementation of the LSTM runs: one persistent launch, or two kernels a step.

The persistent kernels exist for some sizes, and all their blocks must be on the device at once: what fits is asked of
the occupancy query, never assumed. `CTXFAST_LSTM=persistent` or `stepwise` forces one path; `ctxfast.explain` shows
which one runs.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from ctxfast.ops import _lstm, _native
from ctxfast.ops._lstm import Direction, Kept, Recurrence, Sequences
from ctxfast.ops._native_lstm_cuda import (
    TIMEOUT_NANOSECONDS,
    Kernel,
    persistent_backward,
    persistent_forward,
    stepwise_backward,
    stepwise_forward,
)

PATHS = ("auto", "persistent", "stepwise")

# Loading the weights costs as much as a few steps of the other path.
MINIMAL_STEPS = 4
# Up to how many rows, by (hidden, features): beyond, reading the weights anew at every step is shared by enough rows.
LARGEST_BATCH = {(4096, 512): 16, (2048, 256): 64, (1024, 128): 256}

_DTYPES = {2: torch.bfloat16, 3: torch.float16}  # as in csrc/cuda/lstm.h


class _CudaRunner:
    """The launches on the current stream of a device."""

    def __init__(self, device: torch.device):
        self.module: Any = _native._load_cuda()[0]
        self.device = device

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream

    def persistent(
        self, kernel, backward, values, clips, slots, exchange, inputs, outputs
    ) -> str | None:
        with torch.cuda.device(self.device):
            return self.module.lstm_persistent(
                kernel.key, backward, values, *clips, slots, exchange, self._stream()
            )

    def stepwise(self, dtype, backward, values, clips, scratch, inputs, outputs) -> str | None:
        with torch.cuda.device(self.device):
            return self.module.lstm_stepwise(
                dtype, backward, values, *clips, scratch, self._stream()
            )


def path() -> str:
    """The path that CTXFAST_LSTM asks for."""
    name = os.environ.get("CTXFAST_LSTM", "auto")
    if name not in PATHS:
        raise ValueError(f"CTXFAST_LSTM must be one of {', '.join(PATHS)}, got {name!r}")
    return name


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """The persistent kernels of the module."""
    module: Any = _native._load_cuda()[0]
    return tuple(
        Kernel(key, _DTYPES[dtype], *sizes)
        for key, (dtype, *sizes, _, _) in enumerate(module.lstm_kernels())
    )


@functools.cache
def resident_groups(device: int, key: int, backward: bool) -> int:
    """How many groups of blocks, each one direction of some rows, a device holds at a time."""
    module: Any = _native._load_cuda()[0]
    with torch.cuda.device(device):
        found = module.lstm_groups(key, backward)
    return found if isinstance(found, int) else 0


def choose(
    candidates: tuple[Kernel, ...], groups: dict[Any, int], directions: int, batch: int
) -> tuple[Kernel, int] | None:
    """The kernel that takes all rows in the fewest turns (on a tie with fewer rows at a time) and how many groups of
    rows run side by side; None if no kernel fits the device. groups: `resident_groups` by key."""
    best: tuple[tuple[int, int], Kernel, int] | None = None
    for kernel in candidates:
        slots = groups[kernel.key] // directions
        if slots == 0:
            continue
        needed = max(1, -(-batch // kernel.rows))
        slots = min(slots, needed)
        order = (-(-needed // slots), kernel.rows)
        if best is None or order < best[0]:
            best = order, kernel, slots
    return None if best is None else best[1:]


def _plan(
    directions: list[Direction], sequences: Sequences, backward: bool
) -> tuple[Kernel, int] | str:
    """The persistent kernel and its slots, or why there is none."""
    input, weight_hh = directions[0].input, directions[0].weight_hh
    hidden, features = weight_hh.shape[0] // 4, weight_hh.shape[1]
    batch, steps = input.shape[:2]
    if path() == "stepwise":
        return "CTXFAST_LSTM=stepwise"
    if directions[0].weight_hr is None:
        return "no persistent kernel without a projection"
    if input.dtype not in _DTYPES.values():
        return f"persistent kernels hold 16-bit weights, not {input.dtype}"
    fitting = tuple(
        k for k in kernels() if (k.dtype, k.hidden, k.features) == (input.dtype, hidden, features)
    )
    if not fitting:
        sizes = sorted({(k.hidden, k.features) for k in kernels()})
        return (
            f"persistent kernels exist for (hidden, projection) {sizes}, not {(hidden, features)}"
        )
    if path() == "auto":
        if steps < MINIMAL_STEPS:
            return f"{steps} steps do not repay loading the weights (from {MINIMAL_STEPS} on)"
        largest = LARGEST_BATCH[hidden, features]
        if batch > largest:
            return f"{batch} rows are more than {largest}, up to which keeping the weights pays"
    device = input.device.index or 0
    groups = {k.key: resident_groups(device, k.key, backward) for k in fitting}
    chosen = choose(fitting, groups, len(directions), batch)
    if chosen is None:
        return f"the device cannot hold all blocks of {len(directions)} directions at once"
    return chosen


def _refusal(*arguments: Any) -> str | None:
    """Why no CUDA kernel takes these arguments of the operator."""
    input: Tensor = arguments[0]
    if not input.is_cuda:
        return f"device {input.device}"
    if not _native.cuda_available():
        return f"CUDA module: {_native.cuda_unavailable_reason()}"
    directions, sequences = _lstm.parse(*arguments)
    for x in arguments[:14]:
        if isinstance(x, Tensor) and (type(x) not in _native._PLAIN or x.is_neg()):
            return f"tensor subclass {type(x).__name__}, or a lazily negated tensor"
    if input.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {input.dtype}"
    if sequences.weight_dtype is not None:
        return f"weights stored in {sequences.weight_dtype}"
    return None


# The operators' arguments; forward has one more at its end, whether to keep what the way back reads.
_COUNT = 20


def stepwise_refuses(*arguments: Any) -> str | None:
    reason = _refusal(*arguments[:_COUNT])
    return reason or ("CTXFAST_LSTM=persistent" if path() == "persistent" else None)


def persistent_refuses(*arguments: Any, backward: bool = False) -> str | None:
    reason = _refusal(*arguments[:_COUNT])
    if reason is not None:
        return reason
    plan = _plan(*_lstm.parse(*arguments[:_COUNT]), backward)
    return plan if isinstance(plan, str) else None


# ---- a wait that was given up. The word lies in pinned memory, so that looking at it costs no synchronisation.


@functools.cache
def _late_word(device: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, pin_memory=True)


_devices_in_use: set[int] = set()


def raise_if_late() -> None:
    """RuntimeError if a persistent kernel has given up a wait since the last look."""
    for device in tuple(_devices_in_use):
        word = _late_word(device)
        if int(word):
            word.zero_()
            raise RuntimeError(
                f"lstm: a persistent kernel on cuda:{device} waited too long for another block; its results are NaN. "
                "CTXFAST_LSTM=stepwise avoids such kernels"
            )


def synchronize(device: Any = None) -> None:
    """`torch.cuda.synchronize`, and RuntimeError if a persistent LSTM kernel had to give up; nothing without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize(device)
    raise_if_late()


# ---- the recurrences


def _setup(
    directions: list[Direction], sequences: Sequences, backward: bool
) -> tuple[_CudaRunner, Kernel, int, Tensor]:
    raise_if_late()
    plan = _plan(directions, sequences, backward)
    if isinstance(plan, str):
        raise RuntimeError(f"lstm: {plan}")
    device = directions[0].input.device
    index = device.index or 0
    _devices_in_use.add(index)
    return _CudaRunner(device), *plan, _late_word(index)


def _persistent_forward(directions: list[Direction], sequences: Sequences, save: bool) -> Kept:
    gates = _lstm.input_gates(directions, sequences, save)
    setup = _setup(directions, sequences, False)
    return persistent_forward(*setup, directions, gates, sequences, save)


def _persistent_backward(
    directions: list[Direction], sequences: Sequences, kept: Kept, *grads: Tensor
) -> tuple[Any, ...]:
    setup = _setup(directions, sequences, True)
    return persistent_backward(*setup, directions, sequences, kept, *grads)


def _stepwise_forward(directions: list[Direction], sequences: Sequences, save: bool) -> Kept:
    gates = _lstm.input_gates(directions, sequences, save)
    raise_if_late()
    runner = _CudaRunner(directions[0].input.device)
    return stepwise_forward(runner, directions, gates, sequences, save)


def _stepwise_backward(
    directions: list[Direction], sequences: Sequences, kept: Kept, *grads: Tensor
) -> tuple[Any, ...]:
    raise_if_late()
    runner = _CudaRunner(directions[0].input.device)
    return stepwise_backward(runner, directions, sequences, kept, *grads)


PERSISTENT = Recurrence(_persistent_forward, _persistent_backward)
STEPWISE = Recurrence(_stepwise_forward, _stepwise_backward)


def exchange_loops() -> list[str]:
    """The loops that `run_exchange_loop` knows: what an exchange between blocks costs by itself."""
    module: Any = _native._load_cuda()[0]
    return module.exchange_loops()


def run_exchange_loop(index: int, count: int, device: torch.device) -> None:
    """Launch a loop of `count` exchanges on the current stream."""
    module: Any = _native._load_cuda()[0]
    words = torch.zeros(2048, dtype=torch.int32, device=device)
    sums = torch.zeros(1 << 20, dtype=torch.float32, device=device)
    exchange = [x.data_ptr() for x in (sums, words, words[1024:], words[1056:])]
    stream = torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device(device):
        error = module.exchange_loop(index, [*exchange, TIMEOUT_NANOSECONDS], count, stream)
    if error:
        raise RuntimeError(f"exchange loop: {error}")
