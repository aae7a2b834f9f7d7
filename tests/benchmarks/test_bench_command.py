"""`ctxfast bench` as a user runs it, most often in another process and from another directory."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ctxfast.benchmarks import records
from ctxfast.cli import main

ROOT = Path(__file__).resolve().parents[2]
# A pytest of its own must not take itself for a worker of this one.
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if "XDIST" not in name},
    "PYTHONPATH": str(ROOT),
    "NO_COLOR": "1",
}
COMMAND = [sys.executable, "-m", "ctxfast", "bench"]


def bench(*arguments, folder, **environment):
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=folder,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def errors(stderr):
    """The lines of stderr but the warning that an operator has no native implementation here."""
    return [line for line in stderr.splitlines() if not line.startswith("ctxfast: warning: ")]


def test_tiny_run_prints_a_table_and_writes_both_files(tmp_path):
    done = bench(
        *("layer-norm", "--size", "tiny", "--repeats", "2", "--threads", "1", "--peers", "eager"),
        *("--json", "run.jsonl", "--csv", "run.csv"),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert errors(done.stderr) == []
    assert "layer-norm 48x64 (tiny)" in done.stdout and "GEMM ceilings" in done.stdout
    run = records.read(tmp_path / "run.jsonl")
    assert run.environment["threads"] == 1 and run.environment["device"] in done.stdout
    assert [r.label for r in run.cases[0].results] == ["ctxfast", "ctxfast", "eager", "eager"]
    with (tmp_path / "run.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["status"] for row in rows] == ["ok"] * 4


def test_stdout_holds_json_lines_alone(capfd):
    arguments = ["layer-norm", "--size", "tiny", "--repeats", "1", "--peers", "eager"]
    assert main(["bench", *arguments, "--json", "-"]) == 0
    kinds = [json.loads(line)["record"] for line in capfd.readouterr().out.splitlines()]
    assert kinds == ["run", "case", *["result"] * 4]


def test_list(tmp_path):
    done = bench("--list", folder=tmp_path)
    assert done.returncode == 0
    for name in ("bert-inference", "bert-latency", "attention", "ctranslate2", "only when named"):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["novel"], "workload must be one of bert-inference"),
        (["linear", "--size", "huge"], "size must be one of tiny, base, large, got 'huge'"),
        (["linear", "--threads", "0"], "threads must be at least 1, got 0"),
        (["linear", "--peers", "ctxfast,tensorrt"], "got 'tensorrt'"),
        (["linear", "--repeats", "many"], "repeats"),
    ],
)
def test_bad_arguments_end_with_status_2_and_one_sentence(capfd, arguments, message):
    assert main(["bench", *arguments]) == 2
    out, err = capfd.readouterr()
    assert message in err and len(err.splitlines()) == 1
    assert out == ""


def test_unwritable_output_is_found_before_anything_is_measured(tmp_path):
    done = bench("linear", "--size", "tiny", "--json", "missing/run.jsonl", folder=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert "missing/run.jsonl" in done.stderr and len(done.stderr.splitlines()) == 1


def test_reference_is_never_called_native(tmp_path):
    done = bench(
        *("layer-norm", "--size", "tiny", "--repeats", "1", "--peers", "eager"),
        folder=tmp_path,
        CTXFAST_BACKEND="reference",
    )
    assert done.returncode == 0, done.stderr
    assert "on the reference: add_layer_norm" in done.stdout and "native 1" not in done.stdout


def test_wrong_numbers_end_with_status_1(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, threading\n"
        "def spoil():\n"
        "    import ctxfast.ops as ops\n"
        "    real = ops.add_layer_norm\n"
        "    ops.add_layer_norm = lambda *args: -real(*args)\n"
        "if 'bench' in sys.orig_argv:\n"
        "    spoil()\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = bench(
        *("layer-norm", "--size", "tiny", "--repeats", "1", "--peers", "eager"),
        folder=tmp_path,
        PYTHONPATH=paths,
    )
    assert done.returncode == 1
    assert "refused, wrong result: maximum error" in done.stdout
    assert done.stderr.count("ctxfast bench: layer-norm") == 2


def test_interrupt_keeps_what_is_done(tmp_path):
    path = tmp_path / "run.jsonl"
    arguments = ["--size", "tiny", "--repeats", "50", "--peers", "ctxfast", "--json", str(path)]
    process = subprocess.Popen(
        [*COMMAND, "layer-norm", "linear", "attention", "bert-inference", *arguments],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 200
    while not (path.exists() and '"case"' in path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert errors(stderr) == ["ctxfast bench: interrupted"]
    cases = records.read(path).cases
    assert cases[0].workload == "layer-norm" and cases[0].repeats == 50
    assert cases[-1].workload != "bert-inference"
    assert all(f"{case.workload} {case.case} (tiny)" in stdout for case in cases)


def test_pytest_benchmark_files_run_the_same_cases(tmp_path):
    pytest.importorskip("pytest_benchmark")
    report = tmp_path / "report.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", str(ROOT / "benchmarks" / "bench_layer_norm.py")),
            *(
                "-o",
                "python_files=bench_*.py",
                "--bench-size",
                "tiny",
                "-q",
                "-p",
                "no:cacheprovider",
            ),
            f"--benchmark-json={report}",
        ],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    entries = json.loads(report.read_text())["benchmarks"]
    assert {entry["group"] for entry in entries} == {"layer-norm 48x64"}
    assert {entry["extra_info"]["dtype"] for entry in entries} == {"float32", "bfloat16"}
