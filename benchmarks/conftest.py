"""Options of the pytest-benchmark files: `pytest benchmarks -o python_files='bench_*.py' --bench-size tiny`."""

from __future__ import annotations

import pytest

from ctxfast.benchmarks import workloads


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bench-size", choices=workloads.SIZES, default="base", help="Size of the problems."
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a case of the module's WORKLOADS."""
    if "case" in metafunc.fixturenames:
        size = metafunc.config.getoption("--bench-size")
        cases = [case for name in metafunc.module.WORKLOADS for case in workloads.cases(name, size)]
        metafunc.parametrize("case", cases, ids=[f"{c.workload}-{c.name}" for c in cases])
