"""The attention kernels compile for GPUs that are not there, and stay within what one multiprocessor has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ctxfast.kernels import attention_tables
from ctxfast.ops import _aot_attention

TENSOR_CORES = {80: "mma", 86: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05"}
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
STACK_LIMIT = 16  # bytes a thread; spilled registers show as more
# With either Triton; no tile that was tried spills less.
SPILLED = {("backward key", "fp32", 80): 104}
DROPOUT_LIMIT = 10  # instructions per score

Row = dict[str, Any]


def compile_variants(*options: str) -> list[Row]:
    """In a process of its own: here the kernels are decorated for the interpreter."""
    command = [sys.executable, "-m", "ctxfast.ops._aot_attention", "--json", *options]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(
    scope="module",
    params=[
        "--quick",
        pytest.param("", id="subset", marks=pytest.mark.full),
        pytest.param("--table", marks=pytest.mark.full),
        *(
            pytest.param(f"--cell {name}", id=f"full-{name}", marks=pytest.mark.full)
            for name in _aot_attention.cells()
        ),
    ],
)
def rows(request: pytest.FixtureRequest) -> list[Row]:
    return compile_variants(*request.param.split())


def test_registers_are_not_spilled(rows: list[Row]) -> None:
    for row in rows:
        if row["head_dim"] in (64, 128):
            cell = (row["kernel"], row["dtype"], row["arch"])
            assert row["stack"] <= SPILLED.get(cell, STACK_LIMIT), row


def test_shared_memory_suffices(rows: list[Row]) -> None:
    for row in rows:
        assert row["shared"] <= SHARED_LIMIT[row["arch"]], row


def test_tensor_cores_are_used(rows: list[Row]) -> None:
    """Those of sm_90 and later need tiles of 64 rows; smaller ones use the instructions of sm_80."""
    for row in rows:
        if row["dtype"] != "fp32" and row["kernel"] != "backward delta":
            is_small = min(row["block_m"], row["block_n"]) < 64
            expected = TENSOR_CORES[row["arch"]]
            assert row["matmul"] == expected or (is_small and row["matmul"] == "mma"), row


def test_ieee_precision_stays_outside_the_tensor_cores(rows: list[Row]) -> None:
    for row in rows:
        if row["dtype"] == "fp32" and "tf32" not in row["features"]:
            assert row["matmul"] == "none", row


def test_tiles_are_large_at_head_size_64(rows: list[Row]) -> None:
    for row in rows:
        is_large = row["head_dim"] == 64 and row["dtype"] == "bf16" and row["length"] >= 128
        if is_large and row["features"] in ("plain", "varlen", "key_mask", "window"):
            assert sorted((row["block_m"], row["block_n"])) >= [64, 128], row


def test_dropout_costs_at_most_ten_instructions_per_score(rows: list[Row]) -> None:
    def same(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("kernel", "arch", "dtype", "head_dim", "length"))

    plain = {same(row): row["per_score"] for row in rows if row["features"] == "plain"}
    compared = 0
    for row in rows:
        simple = row["features"] in ("dropout", "varlen dropout", "key_mask dropout")
        is_small = row["dtype"] == "bf16" and row["head_dim"] == 64
        if simple and is_small and plain.get(same(row)) is not None:
            compared += 1
            assert row["per_score"] - plain[same(row)] <= DROPOUT_LIMIT, row
    assert compared or not any(row["dtype"] == "bf16" and row["head_dim"] == 64 for row in rows)


def test_the_committed_table_holds_every_kernel_within_the_budgets() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "resources_attention.md"
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    names, *cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    rows = [dict(zip(names, row, strict=True)) for row in cells]
    found = {(row["kernel"], row["dtype"], row["sm"], row["D"]) for row in rows}
    kernels = ("forward", "backward delta", "backward query", "backward key", "backward bias")
    assert found >= {
        (k, dtype, sm, d)
        for k in kernels
        for dtype in ("bf16", "fp32")
        for sm in ("80", "90", "100")
        for d in ("64", "128")
    }
    for row in rows:
        cell = (row["kernel"], row["dtype"], int(row["sm"]))
        assert int(row["stack"]) <= SPILLED.get(cell, STACK_LIMIT), row
        assert int(row["shared, bytes"]) <= SHARED_LIMIT[int(row["sm"])], row


def test_every_architecture_finds_a_table() -> None:
    found = [attention_tables.architecture(capability) for capability in (80, 86, 87, 89, 90, 100)]
    assert found == [80, 86, 86, 89, 90, 100]
    assert attention_tables.architecture(103) == 100
    assert attention_tables.architecture(120) == 89


def test_tiles_divide_the_granule_of_packed_batches() -> None:
    for features in (attention_tables.Features(d, dropout=p) for d in (64, 256) for p in (0, 1)):
        for arch in (0, *attention_tables.ARCHITECTURES):
            for dtype in ("fp32", "bf16"):
                key = (arch, dtype, features)
                for launch in (
                    attention_tables.forward_launch(*key, 512),
                    attention_tables.query_launch(*key),
                ):
                    assert attention_tables.GRANULE % launch.block_m == 0
                assert attention_tables.GRANULE % attention_tables.key_launch(*key).block_n == 0
