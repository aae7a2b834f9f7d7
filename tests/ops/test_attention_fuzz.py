"""Random attention calls with all features drawn jointly, against float64.

CTXFAST_FUZZ=seed:index runs a single case; CTXFAST_FUZZ_CASES=n sets how many the ordinary run draws (200).
"""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest

from ctxfast.ops import _attention_autograd as autograd
from tests.ops import fuzz
from tests.ops.attention_cases import BACKENDS, Case, check

CASES = int(os.environ.get("CTXFAST_FUZZ_CASES", "200"))
SINGLE = os.environ.get("CTXFAST_FUZZ")
SHARE = {"native": 1, "reference": 4, "triton": 8}  # one case in so many
MOST_FAILURES = 5


def failure(case: Case, backend: str) -> str | None:
    try:
        check(case, backend)
    except pytest.skip.Exception:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def report(seed: int, index: int, case: Case, backend: str, message: str) -> str:
    smaller = fuzz.shrink(case, lambda c: failure(c, backend) is not None)
    return (
        f"\nCTXFAST_FUZZ={seed}:{index} python -m pytest tests/ops/test_attention_fuzz.py -k {backend}\n"
        f"  {message}\n  shrunk to {fuzz.describe(smaller)}"
    )


def run_cases(backend: str, seed: int, count: int, capsys) -> None:
    start, failures, cases = time.perf_counter(), [], []
    for index in range(count):
        case = fuzz.draw(seed, index, backend)
        cases.append(case)
        message = failure(case, backend)
        if message is not None:
            failures.append(report(seed, index, case, backend, message))
            if len(failures) == MOST_FAILURES:
                break
    table, share = fuzz.coverage_table(fuzz.pairs(cases), fuzz.possible_pairs(backend))
    long = sum(">128" in (f["queries"], f["keys"]) for f in map(fuzz.features, cases)) / len(cases)
    strided = sum(case.memory != "contiguous" for case in cases) / len(cases)
    with capsys.disabled():
        print(
            f"\n{backend}: {len(cases)} random cases in {time.perf_counter() - start:.0f} s, {long:.0%} with more than "
            f"128 tokens, {strided:.0%} strided; {share:.1%} of the pairs of feature values:\n{table}"
        )
    assert not failures, "".join(failures)
    if count >= 100:
        assert long >= 0.2 and strided >= 0.33
    if count >= 2000:
        assert share >= 0.99


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.skipif(SINGLE is not None, reason="CTXFAST_FUZZ asks for a single case")
def test_random_cases(backend, capsys):
    run_cases(backend, 0, CASES // SHARE[backend], capsys)


@pytest.mark.full
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_thousand_random_cases(backend, capsys):
    run_cases(backend, 1, 2000 // SHARE[backend], capsys)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.skipif(SINGLE is None, reason="CTXFAST_FUZZ=seed:index is not set")
def test_single_case(backend):
    seed, index = map(int, SINGLE.split(":"))
    case = fuzz.draw(seed, index, backend)
    message = failure(case, backend)
    assert message is None, report(seed, index, case, backend, message)


def test_a_wrong_result_is_found_and_shrunk(monkeypatch):
    """A backward that forgets the gradient of lse."""
    operator = autograd.attention_backward_operator
    right = operator.implementations[-1]
    wrong = replace(right, run=lambda grad, grad_lse, *rest: right.run(grad, None, *rest))
    monkeypatch.setattr(operator, "implementations", (wrong,))
    found = [
        (index, case)
        for index in range(40)
        if not (case := fuzz.draw(0, index, "reference")).packed and failure(case, "reference")
    ]
    assert found and all(case.lse_grad for _, case in found)
    message = report(0, *found[0], "reference", "wrong")
    assert f"CTXFAST_FUZZ=0:{found[0][0]} " in message and "dropout" not in message
