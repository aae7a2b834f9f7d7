"""The choice among the CUDA implementations of the LSTM, decided without a device."""

from __future__ import annotations

import pytest
import torch

import ctxfast
from ctxfast import ops
from ctxfast.ops import _native_lstm_paths as paths
from ctxfast.ops._lstm import Direction, Sequences
from ctxfast.ops._native_lstm_cuda import Kernel

BF16 = torch.bfloat16
NARROW = Kernel("narrow", BF16, 2048, 256, 8, 4, 8)
BROAD = Kernel("broad", BF16, 2048, 256, 8, 4, 16)


@pytest.mark.parametrize(
    "groups, directions, batch, expected",
    [
        (4, 2, 1, ("narrow", 1)),
        (4, 2, 16, ("narrow", 2)),  # two groups of rows side by side
        (4, 2, 17, ("broad", 2)),  # one turn instead of two
        (2, 2, 16, ("broad", 1)),
        (3, 2, 100, ("broad", 1)),  # an odd number of groups leaves one idle
        (4, 1, 32, ("narrow", 4)),
        (1, 2, 1, None),  # one direction only would fit
        (0, 1, 1, None),
    ],
)
def test_choice_of_the_kernel(groups, directions, batch, expected):
    held = {"narrow": groups, "broad": groups}
    found = paths.choose((NARROW, BROAD), held, directions, batch)
    assert (found and (found[0].key, found[1])) == expected


def arguments(hidden=2048, features=256, dtype=BF16, batch=2, steps=8, project=True):
    meta = {"dtype": dtype, "device": "meta"}
    direction = Direction(
        torch.empty(batch, steps, 4, **meta),
        torch.empty(4 * hidden, 4, **meta),
        torch.empty(4 * hidden, features, **meta),
        None,
        torch.empty(features, hidden, **meta) if project else None,
        None,
        False,
    )
    state = torch.empty(1, batch, features, **meta), torch.empty(1, batch, hidden, device="meta")
    return [direction], Sequences(*state, None, None, None, None, None)


@pytest.fixture
def device(monkeypatch):
    """A device that holds two groups of each kernel."""
    monkeypatch.setattr(paths, "kernels", lambda: (NARROW, BROAD))
    monkeypatch.setattr(paths, "resident_groups", lambda device, key, backward: 2)
    monkeypatch.delenv("CTXFAST_LSTM", raising=False)


def test_plans(device, monkeypatch):
    assert paths._plan(*arguments(), False) == (NARROW, 1)
    assert "no persistent kernel without a projection" in paths._plan(
        *arguments(project=False), False
    )
    assert "16-bit weights, not torch.float32" in paths._plan(
        *arguments(dtype=torch.float32), False
    )
    assert "[(2048, 256)], not (96, 32)" in paths._plan(*arguments(96, 32), False)
    assert "3 steps do not repay" in paths._plan(*arguments(steps=3), False)
    assert "65 rows are more than 64" in paths._plan(*arguments(batch=65), False)
    monkeypatch.setenv("CTXFAST_LSTM", "persistent")
    assert paths._plan(*arguments(batch=65, steps=1), False) == (BROAD, 2)
    monkeypatch.setenv("CTXFAST_LSTM", "stepwise")
    assert paths._plan(*arguments(), False) == "CTXFAST_LSTM=stepwise"
    monkeypatch.delenv("CTXFAST_LSTM")
    monkeypatch.setattr(paths, "resident_groups", lambda device, key, backward: 0)
    assert "cannot hold all blocks" in paths._plan(*arguments(), False)


def test_an_unknown_path_is_refused(monkeypatch):
    monkeypatch.setenv("CTXFAST_LSTM", "quick")
    with pytest.raises(ValueError, match="CTXFAST_LSTM must be one of auto, persistent, stepwise"):
        paths.path()


def test_explain_names_both_paths():
    x = torch.randn(2, 3, 4)
    weights = torch.randn(20, 4), torch.randn(20, 5)
    found = ctxfast.explain(ops.lstm, x, *weights)
    for name in ("cuda_persistent", "cuda_stepwise"):
        assert found.reasons["lstm", name] == "device cpu"


def test_a_late_block_raises_once(monkeypatch):
    word = torch.ones(1, dtype=torch.int32)
    monkeypatch.setattr(paths, "_late_word", lambda device: word)
    monkeypatch.setattr(paths, "_devices_in_use", {0})
    with pytest.raises(RuntimeError, match="cuda:0 waited too long"):
        ctxfast.synchronize()
    ctxfast.synchronize()
