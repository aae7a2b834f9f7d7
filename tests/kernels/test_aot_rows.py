"""The kernels on rows compile for GPUs that are not there: no spilled registers, 16 bytes a load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
STACK_LIMIT = 16  # bytes a thread; spilled registers show as more

Row = dict[str, Any]


@pytest.fixture(scope="module", params=["--quick", pytest.param("", marks=pytest.mark.full)])
def rows(request: pytest.FixtureRequest) -> list[Row]:
    """In a process of its own: here the kernels are decorated for the interpreter."""
    options = [request.param] if request.param else []
    command = [sys.executable, "-m", "ctxfast.ops._aot_rows", "--json", *options]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_and_architecture_is_there(rows: list[Row]) -> None:
    assert {row["arch"] for row in rows} == {80, 90, 100}
    assert {row["role"] for row in rows} == {
        "add_layer_norm",
        "add_layer_norm backward",
        "embed_layer_norm",
        "embed_layer_norm backward",
        "column_sum",
        "segment_sum",
        "cross_entropy",
        "linear epilogue",
        "linear epilogue backward",
    }


def test_registers_are_not_spilled(rows: list[Row]) -> None:
    for row in rows:
        assert row["stack"] <= STACK_LIMIT, row


def test_shared_memory_suffices(rows: list[Row]) -> None:
    for row in rows:
        assert row["shared"] <= SHARED_LIMIT[row["arch"]], row


def test_loads_are_wide(rows: list[Row]) -> None:
    """Even of a vocabulary whose size is no multiple of 16."""
    for row in rows:
        assert row["load"] >= 128, row
