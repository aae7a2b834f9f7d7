"""Which paths compete for the GEMM ceiling, and that each computes the same layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ctxfast.benchmarks import ceilings
from ctxfast.benchmarks.ceilings import Ceilings
from ctxfast.ops import _native
from tests.oracle import assert_matches

native = pytest.mark.skipif(
    not _native.available(), reason=f"native module absent: {_native.unavailable_reason()}"
)


def test_the_ceiling_is_the_best_rate_of_any_path():
    rates = {"torch": {16: 50.0}, "oneDNN": {16: 100.0, 64: 90.0}, "ctxfast": {16: 80.0, 64: 250.0}}
    found = Ceilings({"float32": rates}, {4: 80.0})
    assert found.best_gemm("float32") == 250.0
    assert found.limit("float32", 2.5e11, 1.0) == (pytest.approx(1.0), "compute")
    assert Ceilings.from_json(found.to_json()) == found


@native
def test_the_own_path_is_measured_beside_the_others(monkeypatch):
    monkeypatch.setattr(ceilings, "ROWS", {"cpu": (2, 3)})
    monkeypatch.setattr(ceilings, "SHAPES", ((33, 64), (40, 32)))
    monkeypatch.setattr(ceilings, "WORKING_SETS", {"cpu": (1,)})
    found = ceilings.measure(quick=True)
    for dtype in ("float32", "bfloat16"):
        assert {"torch", "ctxfast"} <= set(found.gemm[dtype])
        assert all(rate > 0 for rate in found.gemm[dtype]["ctxfast"].values())
        assert set(found.gemm[dtype]["ctxfast"]) == {2, 3}


@native
def test_the_own_path_is_the_same_layer():
    x, weight, bias = torch.randn(70, 64), torch.randn(33, 64), torch.randn(33)
    with torch.inference_mode():
        found = ceilings.own_linear(weight, bias)(x)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert_matches(found, F.linear(x, weight, bias), exact)
