"""The CUDA LSTM kernels, run on the host: results against float64, and planted mistakes that must be found."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from ctxfast.ops import _lstm, _native_lstm_cuda
from ctxfast.ops._lstm import Direction, Kept, Sequences
from tests.native import simt
from tests.oracle import CAPS, assert_matches

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# name in csrc/simt/library.cpp, hidden, features, dtype
PERSISTENT = [
    ("small", 256, 64, BF16),  # two clusters of four blocks
    ("small half", 256, 64, FP16),
    ("flat", 128, 64, BF16),  # four blocks, no clusters
    ("wide", 512, 64, BF16),  # two clusters of eight, 16 rows
]


@dataclass
class Case:
    directions: list[Direction]
    gates: list[torch.Tensor]
    sequences: Sequences
    grads: tuple[torch.Tensor, ...]

    def double(self) -> Case:
        def wide(x):
            return None if x is None else x.double()

        s = self.sequences
        return Case(
            [
                replace(
                    d, weight_hh=wide(d.weight_hh), weight_hr=wide(d.weight_hr), input=wide(d.input)
                )
                for d in self.directions
            ],
            [wide(g) for g in self.gates],
            replace(s, h0=wide(s.h0), c0=wide(s.c0), mask=wide(s.mask)),
            tuple(wide(g) for g in self.grads),
        )


def make_case(
    hidden, features, dtype, *, batch=5, steps=5, lengths=True, clip=1.0, mask=False, project=True,
    reverse=(False, True), seed=0,
) -> Case:  # fmt: skip
    """Rows that end at different steps, one of them without any; with a clip about a tenth of all values reach it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, to=dtype, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(to)

    directions = [
        Direction(
            normal(batch, steps, 1),
            normal(4 * hidden, 1),
            normal(4 * hidden, features, scale=features**-0.5),
            None,
            normal(features, hidden, scale=3 * hidden**-0.5) if project else None,
            None,
            back,
        )
        for back in reverse
    ]
    count = len(reverse)
    ends = None
    if lengths:
        ends = torch.randint(0, steps + 1, (batch,), generator=generator)
        ends[: min(3, batch)] = torch.tensor([steps, 0, 1])[:batch]
    keep = (torch.rand(count, batch, features, generator=generator) < 0.8).float() * 1.25
    return Case(
        directions,
        [normal(batch, steps, 4 * hidden) for _ in directions],
        Sequences(
            normal(count, batch, features),
            normal(count, batch, hidden, to=FP32),
            ends,
            keep if mask else None,
            clip,
            clip,
            None,
        ),
        (
            normal(batch, steps, count * features),
            normal(count, batch, features),
            normal(count, batch, hidden, to=FP32),
        ),
    )


def reference_forward(case: Case) -> Kept:
    """The reference, to which the gates come through an identity."""
    directions = [
        replace(d, input=gates, weight_ih=torch.eye(gates.shape[-1], dtype=gates.dtype))
        for d, gates in zip(case.directions, case.gates, strict=True)
    ]
    return _lstm.REFERENCE.forward(directions, case.sequences, True)


def check_forward(case: Case, kept: Kept) -> None:
    exact, eager = reference_forward(case.double()), reference_forward(case)
    for name in ("output", "h", "c", "gates", "cells", "projected"):
        found, like, truth = (getattr(x, name) for x in (kept, eager, exact))
        if found.dim() == 4 and case.sequences.lengths is not None:
            steps = torch.arange(found.shape[2])
            valid = steps < case.sequences.lengths[:, None]
            found, like, truth = found[:, valid], like[:, valid], truth[:, valid]
        assert_matches(found, like, truth, name=name, cap=CAPS[case.gates[0].dtype])


class Rounded:
    """A weight that meets its left operand as 16-bit hardware does: rounded to its type."""

    def __init__(self, weight):
        self.weight = weight

    def to(self, dtype):
        return self

    def __rmatmul__(self, x):
        return x.to(self.weight.dtype).to(x.dtype) @ self.weight.to(x.dtype)


def eager_backward(case: Case, kept: Kept):
    """The reference's way back with the operands of its products in the type of the weights."""
    directions = [
        replace(
            d,
            weight_hh=Rounded(d.weight_hh),
            weight_hr=None if d.weight_hr is None else Rounded(d.weight_hr),
        )
        for d in case.directions
    ]
    return _lstm.REFERENCE.backward(directions, case.sequences, kept, *case.grads)


def check_backward(case: Case, kept: Kept, found) -> None:
    """Against the reference on what this forward pass kept, so that a value beside a clip counts the same way."""
    wide = Kept(*(x.double() for x in kept.tensors()))
    exact = _lstm.REFERENCE.backward(*backward_arguments(case.double(), wide))
    eager = eager_backward(case, kept)
    cap = CAPS[case.gates[0].dtype]
    names = ("gates", "projected", "read", "h0", "c0")
    for name, *results in zip(names, found, eager, exact, strict=True):
        if name == "read":  # by the projection: none of these loops leaves it
            continue
        lists = [
            [r] if isinstance(r, torch.Tensor) else [x for x in r if x is not None] for r in results
        ]
        for mine, like, truth in zip(*lists, strict=True):
            assert_matches(mine, like, truth, name=f"gradient of {name}", cap=cap)


def forward_arguments(case):
    return case.directions, case.gates, case.sequences


def backward_arguments(case, kept):
    return case.directions, case.sequences, kept, *case.grads


def flat(found):
    """The gradients of a backward pass in one list."""
    gates, projected, _, *states = found
    return [*gates, *projected, *states]


def run_persistent(name, case, runner, slots=1, backward=True):
    """Forward and backward; the word that a late block would have set."""
    hidden, features = case.sequences.c0.shape[-1], case.sequences.h0.shape[-1]
    kernel = simt.kernel(name, hidden, features, case.gates[0].dtype)
    error = torch.zeros(1, dtype=torch.int32)
    setup = (runner, kernel, slots, error)
    kept = _native_lstm_cuda.persistent_forward(*setup, *forward_arguments(case), True)
    found = None
    if backward:
        found = _native_lstm_cuda.persistent_backward(*setup, *backward_arguments(case, kept))
    return kept, found, int(error)


@pytest.mark.parametrize("name, hidden, features, dtype", PERSISTENT)
@pytest.mark.parametrize("options", [{}, {"mask": True, "clip": None}, {"lengths": False}])
def test_persistent_kernels(name, hidden, features, dtype, options):
    case = make_case(hidden, features, dtype, **options)
    kept, found, late = run_persistent(name, case, simt.HostRunner(seed=1))
    check_forward(case, kept)
    check_backward(case, kept, found)
    assert late == 0


def test_clips_are_active_in_these_cases():
    case = make_case(256, 64, BF16)
    kept = reference_forward(case)
    valid = torch.arange(5) < case.sequences.lengths[:, None]
    for x in (kept.cells[:, valid], kept.projected[:, valid]):
        assert 0.05 < (x.abs() > 1.0).float().mean() < 0.5


@pytest.mark.parametrize("slots, batch", [(1, 20), (2, 20), (3, 17)])
def test_groups_of_rows(slots, batch):
    """More rows than a block takes at a time: one group after another, or several side by side."""
    case = make_case(128, 64, BF16, batch=batch, steps=3)
    kept, found, _ = run_persistent("flat", case, simt.HostRunner(seed=2), slots)
    check_forward(case, kept)
    check_backward(case, kept, found)


@pytest.mark.parametrize("reverse", [(False,), (True,)])
@pytest.mark.parametrize("batch, steps", [(1, 1), (3, 2), (0, 3), (2, 0)])
def test_one_direction_and_small_shapes(reverse, batch, steps):
    case = make_case(256, 64, BF16, batch=batch, steps=steps, reverse=reverse, lengths=batch > 2)
    kept, found, _ = run_persistent("small", case, simt.HostRunner())
    check_forward(case, kept)
    check_backward(case, kept, found)


def test_the_shipped_size_that_needs_one_cluster():
    """1024 / 128, as it is compiled for a GPU: eight blocks of 256 threads, both directions."""
    case = make_case(1024, 128, BF16, batch=3, steps=5)
    kept, found, _ = run_persistent("shipped", case, simt.HostRunner(seed=3))
    check_forward(case, kept)
    check_backward(case, kept, found)


def test_the_order_of_threads_does_not_change_a_bit():
    case = make_case(256, 64, BF16)
    runs = [run_persistent("small", case, simt.HostRunner(seed=seed)) for seed in range(3)]
    for kept, found, _ in runs[1:]:
        for a, b in zip(kept.tensors(), runs[0][0].tensors(), strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        for a, b in zip(flat(found), flat(runs[0][1]), strict=True):
            assert torch.equal(a, b)


def test_nan_stays_in_its_row():
    case = make_case(256, 64, BF16, batch=4, lengths=False)
    case.gates[0][2, 1, 7] = float("nan")
    kept, _, _ = run_persistent("small", case, simt.HostRunner(), backward=False)
    bad = kept.output[:, :, :64].isnan().flatten(1).any(1)
    assert bad.tolist() == [False, False, True, False]
    assert not kept.output[..., 64:].isnan().any()
    assert not kept.output[2, 0, :64].isnan().any() and kept.output[2, 4, :64].isnan().any()


STEPWISE = [
    (24, 16, BF16, True),
    (21, 13, FP16, True),  # no vector loads
    (64, 32, BF16, True),
    (40, 40, BF16, False),
    (33, 9, FP32, True),
    (20, 20, FP32, False),
]


@pytest.mark.parametrize("hidden, features, dtype, project", STEPWISE)
@pytest.mark.parametrize("batch", [3, 19])
@pytest.mark.parametrize("options", [{"mask": True}, {"clip": None, "lengths": False}])
def test_stepwise_kernels(hidden, features, dtype, project, batch, options):
    case = make_case(hidden, features, dtype, batch=batch, steps=3, project=project, **options)
    runner = simt.HostRunner(seed=4)
    kept = _native_lstm_cuda.stepwise_forward(runner, *forward_arguments(case), True)
    check_forward(case, kept)
    found = _native_lstm_cuda.stepwise_backward(runner, *backward_arguments(case, kept))
    check_backward(case, kept, found)


@pytest.mark.parametrize("path", ["persistent", "stepwise"])
def test_gradients_pass_at_the_clip_itself(path):
    """Saturated gates give a cell of exactly 1, which is the clip: not beyond it."""
    case = make_case(256, 64, BF16, batch=2, steps=1, lengths=False)
    for gates in case.gates:
        gates.fill_(200.0)
    case.sequences.c0.zero_()
    case.directions[:] = [replace(d, weight_hh=d.weight_hh * 0) for d in case.directions]
    runner = simt.HostRunner()
    if path == "persistent":
        kept, found, _ = run_persistent("small", case, runner)
    else:
        kept = _native_lstm_cuda.stepwise_forward(runner, *forward_arguments(case), True)
        found = _native_lstm_cuda.stepwise_backward(runner, *backward_arguments(case, kept))
    assert (kept.cells == 1.0).all() and (found[-1] != 0).any()
    check_backward(case, kept, found)
