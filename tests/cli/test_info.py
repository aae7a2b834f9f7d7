"""`ctxfast info`: every operator with every implementation, available or why not."""

import pytest
import torch

from ctxfast import info, ops
from ctxfast.ops import _dispatch, _native


def test_every_operator_and_implementation_is_listed(cli):
    operators = info.survey_operators("cpu")
    assert set(operators) == set(_dispatch.OPERATORS)
    status, out, err = cli("info")
    assert (status, err) == (0, "")
    for name, operator in _dispatch.OPERATORS.items():
        assert set(operators[name]) == {one.name for one in operator.implementations}
        assert operators[name]["reference"] is None
        assert f"  {name}: " in out


def test_the_first_available_implementation_is_the_one_that_runs():
    with _dispatch.record() as verdicts:
        ops.linear(torch.randn(16, 64), torch.randn(64, 64))
    found = info.survey_operators("cpu")["linear"]
    assert verdicts[-1].ran == next(name for name, reason in found.items() if reason is None)
    with _dispatch.use_backend("reference"), _dispatch.record() as verdicts:
        found = info.survey_operators("cpu")["linear"]
        ops.linear(torch.randn(16, 64), torch.randn(64, 64))
    assert verdicts[-1].ran == next(name for name, reason in found.items() if reason is None)


def test_a_forced_backend_is_seen():
    with _dispatch.use_backend("reference"):
        found = info.survey_operators("cpu")
    assert found["linear"]["onednn"] == "CTXFAST_BACKEND=reference"
    assert found["attention"]["reference"] is None


def test_a_missing_module_shows_the_compiler_error(cli, monkeypatch):
    reason = "not built: g++ -c attention.cpp\nattention.cpp:1: error: no such thing"
    monkeypatch.setattr(_native, "unavailable_reason", lambda: reason)
    monkeypatch.setattr(_native, "available", lambda: False)
    monkeypatch.setattr(info.importlib.util, "find_spec", lambda name: None)
    status, out, _ = cli("info")
    assert status == 0
    assert "absent" in out
    for line in reason.splitlines():
        assert line in out


def test_one_broken_operator_does_not_hide_the_others(monkeypatch):
    def broken(*arguments, **keywords):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr("ctxfast.ops.linear", broken)
    found = info.survey_operators("cpu")
    assert found["linear"] == {"error": "RuntimeError: broken on purpose"}
    assert found["attention"]["reference"] is None


def test_the_generator_is_left_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    info.survey_operators("cpu")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("name", "value"), [("CTXFAST_CPU_ISA", "avx2"), ("MAX_JOBS", "3")])
def test_environment_shows_values(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    entries = {entry["name"]: entry for entry in info.collect()["environment"]}
    assert entries[name]["value"] == value and entries[name]["meaning"]
