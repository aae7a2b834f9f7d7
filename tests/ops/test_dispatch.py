"""The choice of an implementation: order, reasons, forcing, one log line, explain."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import ctxfast
from ctxfast import ops
from ctxfast.ops import _library
from ctxfast.ops._dispatch import OPERATORS, Implementation, Operator, never


@pytest.fixture
def operator():
    def too_large(x):
        return "more than 4 elements" if x.numel() > 4 else None

    yield Operator(
        "test_only",
        Implementation("native", lambda x: x + 1, too_large),
        Implementation("reference", lambda x: x + 2, never),
    )
    del OPERATORS["test_only"]


def test_first_willing_implementation_runs_and_the_fallback_is_logged_once(operator, caplog):
    with caplog.at_level(logging.WARNING, "ctxfast"):
        assert operator(torch.zeros(3))[0] == 1
        assert not caplog.records
        for _ in range(3):
            assert operator(torch.zeros(5))[0] == 2
    (record,) = caplog.records
    assert "test_only runs on the eager reference" in record.message
    assert "more than 4 elements" in record.message


def test_forcing_a_backend(operator):
    with ops.use_backend("reference"):
        assert operator(torch.zeros(3))[0] == 2
    with ops.use_backend("native"):
        assert operator(torch.zeros(3))[0] == 1
        with pytest.raises(NotImplementedError, match="test_only.*more than 4 elements"):
            operator(torch.zeros(5))
    with pytest.raises(
        ValueError, match="must be one of auto, native, triton, reference, got 'fast'"
    ):
        ops.use_backend("fast").__enter__()


def test_environment_variable_is_validated():
    run = subprocess.run(
        [sys.executable, "-c", "import ctxfast.ops"],
        env={"CTXFAST_BACKEND": "quick", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert (
        "CTXFAST_BACKEND must be one of auto, native, triton, reference, got 'quick'" in run.stderr
    )


def test_explain_names_what_ran_and_why_not_the_others():
    x, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    explanation = ctxfast.explain(ops.linear, x, weight)
    assert explanation.ran("linear") == {"reference"}
    assert (
        explanation.reasons["linear", "onednn"] == "dtype torch.float64 is not float32 or bfloat16"
    )
    assert "linear" in str(explanation) and "reference" in str(explanation)


def test_explain_of_a_module_counts_every_operator():
    class Twice(torch.nn.Module):
        def forward(self, x):
            return ops.linear(ops.linear(x, x), x)

    explanation = ctxfast.explain(Twice(), torch.randn(4, 4))
    assert sum(explanation.calls.values()) == 2


class Listener(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.heard.append(str(func))
        return func(*args, **(kwargs or {}))


def test_whoever_listens_hears_of_a_call_that_skips_the_dispatcher_otherwise():
    x = torch.randn(1, 2, 4, 8)
    with torch.no_grad():
        with Listener() as listener:
            ops.attention(x, x, x)
        assert listener.heard == ["ctxfast.attention.default"]
        with torch.profiler.profile() as profile:
            ops.attention(x, x, x)
        assert "ctxfast::attention" in {event.key for event in profile.key_averages()}
        assert _library._needs_no_dispatcher((x, x, None, 1.0))
        with forward_ad.dual_level():
            assert not _library._needs_no_dispatcher((x, x, None, 1.0))
        assert not _library._needs_no_dispatcher((x.to("meta"), x))
    assert not _library._needs_no_dispatcher((x, x))
    with torch.inference_mode():
        assert ops.attention(x, x, x).is_inference()
