"""Mistakes planted in the persistent LSTM kernels: each must be found, within a hundred orders of the threads."""

from __future__ import annotations

import functools

import pytest
import torch

from ctxfast.ops import _native_lstm_cuda
from tests.native import simt
from tests.native.test_simt_lstm import BF16, make_case, run_persistent

SEEDS = 100


@functools.cache
def prepared(name, hidden, batch):
    """A case, its kernel, and what a sound forward pass keeps."""
    case = make_case(hidden, 64, BF16, batch=batch)
    sound = "small" if name == "single buffer" else name
    kept, _, _ = run_persistent(sound, case, simt.HostRunner(), backward=False)
    return case, simt.kernel(name, hidden, 64, BF16), kept


def verdict(fault, seed, *, name="small", hidden=256, batch=5, backward=False):
    """What the machine said of one run, or nothing."""
    case, kernel, kept = prepared(name, hidden, batch)
    runner = simt.HostRunner(seed=seed, fault=fault)
    error = torch.zeros(1, dtype=torch.int32)
    setup = (runner, kernel, 1, error, case.directions)
    try:
        if backward:
            _native_lstm_cuda.persistent_backward(*setup, case.sequences, kept, *case.grads)
        else:
            _native_lstm_cuda.persistent_forward(*setup, case.gates, case.sequences, True)
    except RuntimeError as problem:
        return str(problem)
    return ""


def first_found(fault, **options):
    for seed in range(SEEDS):
        found = verdict(fault, seed, **options)
        if found:
            return found
    return ""


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "fault",
    [
        (simt.DROP_FENCE, 0),
        (simt.NARROW_FENCE, 0),
        (simt.RELAX_ACQUIRE, 0),
        (simt.SKIP_GENERATION, 2),
    ],
    ids=["fence removed", "fence within the block", "relaxed flag", "skipped generation"],
)
def test_ordering_between_clusters(fault, backward):
    assert "race" in first_found(fault, backward=backward)


def test_a_single_buffer():
    assert "race" in first_found((simt.NO_FAULT, 0), name="single buffer")


def test_a_flag_value_used_twice(monkeypatch):
    """Counters that a former launch has left where they were: its last value looks like this launch's first."""
    exchange = _native_lstm_cuda._exchange

    def used(*arguments):
        addresses, tensors = exchange(*arguments)
        tensors[1][:-32] = 2
        return addresses, tensors

    monkeypatch.setattr(_native_lstm_cuda, "_exchange", used)
    assert "race" in first_found((simt.NO_FAULT, 0))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name, hidden, batch", [("small", 256, 5), ("flat", 128, 12)])
def test_every_barrier_is_needed(name, hidden, batch, backward):
    """Each place where the kernel waits, left out, is found; the flat kernel takes two groups of rows in turn."""
    options = {"name": name, "hidden": hidden, "batch": batch, "backward": backward}
    assert verdict((simt.NO_FAULT, 0), 0, **options) == ""
    places = simt.barriers()
    assert len(places) >= 7
    missed = [
        place
        for i, place in enumerate(places)
        if not any(verdict((simt.SKIP_BARRIER, i), seed, **options) for seed in range(3))
    ]
    # With one group of rows nothing follows the barrier at the end of a group.
    allowed = 1 if name == "small" else 0
    assert len(missed) <= allowed, missed


def test_a_lost_arrival_is_a_deadlock():
    assert "deadlock" in verdict((simt.LOSE_ARRIVAL, 3), 0)


@pytest.mark.parametrize("seed", range(3))
def test_watchdog(seed):
    """A block that never arrives: all blocks end, the error word is set, and what depends on that block is NaN."""
    case = make_case(256, 64, BF16, lengths=False)
    runner = simt.HostRunner(seed=seed, fault=(simt.LOSE_ARRIVAL, 2), timeout=2_000_000)
    kept, _, late = run_persistent("small", case, runner, backward=False)
    assert late == 1
    ok, _, _ = run_persistent("small", case, simt.HostRunner(), backward=False)
    assert torch.equal(
        kept.output[:, :2, :64], ok.output[:, :2, :64]
    )  # what was whole before stays
    assert kept.output[:, 3:, :64].isnan().all() and kept.h[0].isnan().any()
    assert kept.c[0].isnan().all()
