"""The C++ LSTM on one thread and on several: the same bits, whoever computes what, and in a forked child too."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ctxfast import ops
from ctxfast.ops import _native
from tests.ops.implementations import only
from tests.ops.lstm_cases import call, results_and_gradients, tensors

pytestmark = pytest.mark.skipif(not _native.available(), reason="native module absent")

CLIPS = {"cell_clip": 0.6, "proj_clip": 0.35}


@pytest.mark.parametrize("projected", [True, False])
def test_number_of_threads_and_runs_change_no_bit(projected):
    given = tensors(5, 6, 8, 50, 40 if projected else 0)
    lengths, clips = torch.tensor([6, 2, 0, 5, 6]), CLIPS if projected else {}
    grads = [torch.randn(x.shape) for x in call(ops.lstm, given)]
    results = []
    with only("native"):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs = 34 if threads == 2 else 33
            for _ in range(runs):
                results.append(
                    results_and_gradients(ops.lstm, given, grads, lengths=lengths, **clips)
                )
    assert len(results) == 100
    for result in results[1:]:
        assert all(
            torch.equal(a, b) for a, b in zip(result.values(), results[0].values(), strict=True)
        )


def test_work_that_another_thread_took_over_changes_no_bit():
    """More threads than processors: some are always late, and the others take over what they have not begun."""
    given = tensors(9, 12, 64, 500, 100)
    grads = [torch.randn(x.shape) for x in call(ops.lstm, given)]
    with only("native"):
        torch.set_num_threads(1)
        wanted = results_and_gradients(ops.lstm, given, grads, **CLIPS)
        torch.set_num_threads(4)
        for _ in range(20):
            found = results_and_gradients(ops.lstm, given, grads, **CLIPS)
            assert all(
                torch.equal(a, b) for a, b in zip(found.values(), wanted.values(), strict=True)
            )


def test_a_forked_child_runs_with_the_threads_it_has():
    """OpenMP's threads do not survive a fork, so the loop must not wait for them."""
    code = """
import os, torch
from ctxfast import ops
from ctxfast.ops import _lstm, _native_lstm
torch.set_num_threads(3)
x, w_ih, w_hh, w_hr = (torch.randn(s) for s in ((3, 4, 5), (160, 5), (160, 20), (20, 40)))
d = _lstm.Direction(x, w_ih, w_hh, None, w_hr, None, False)
s = _lstm.Sequences(torch.zeros(1, 3, 20), torch.zeros(1, 3, 40), None, None, 0.5, 0.5, None)
expected = _native_lstm.forward([d], s, False).output
pid = os.fork()
if pid == 0:
    found = _native_lstm.forward([d], s, False).output
    os._exit(0 if torch.equal(found, expected) else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert run.returncode == 0, run.stderr
