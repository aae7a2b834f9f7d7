"""All that a CUDA device can tell, in one command for a short lease: `python -m ctxfast.benchmarks.gpu`.

Build, facts, correctness, micro-benchmarks, tables, in this order. Every step is a process with its own time limit, its
output goes to its own file while it runs, and a step that fails or hangs does not stop the next. Needs no network, and
installs nothing: packages are those of the interpreter that runs it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# One kernel of each kind and every dtype: what a first minute can compile.
FIRST = (
    "test_matches_float64 and (plain or everything or long or prefix) and not bias and not window"
)


@dataclass(frozen=True)
class Step:
    """One process, and the seconds it may take."""

    name: str
    seconds: int
    command: tuple[str, ...]


def _python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-u", *arguments)


def _tests(*arguments: str, spread: int = 0) -> tuple[str, ...]:
    """spread: processes, because a first run compiles kernels most of the time."""
    spread = spread if importlib.util.find_spec("xdist") else 0
    extra = ("-n", str(spread)) if spread > 1 else ()
    return _python(
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-vv",
        "--tb=short",
        *extra,
        *arguments,
    )


def _bench(folder: Path, name: str, minutes: int, *workloads: str) -> Step:
    results = (f"--json={folder / name}.jsonl", f"--html={folder / name}.html")
    limits = ("--device=cuda", "--budget=5", f"--minutes={minutes}", "--peers=all")
    command = _python("-m", "ctxfast", "bench", *workloads, *limits, *results)
    return Step(name, 60 * minutes + 60, command)


def steps(folder: Path) -> list[Step]:
    """What runs, in order; the most telling first."""
    spread = max(1, min(12, (os.cpu_count() or 1) - 2))
    attention, lstm = "tests/ops/test_attention_gpu.py", "tests/ops/test_lstm_gpu.py"
    found = [
        Step("device", 20, ("nvidia-smi",)),
        Step("build", 240, _python("setup.py", "build_ext", "--inplace")),
        Step("info", 90, _python("-m", "ctxfast", "info")),
        Step("occupancy", 40, _tests(lstm, "-k", "occupancy", "-s")),
        Step("attention-first", 90, _tests(attention, "-k", FIRST, spread=spread)),
        Step("lstm-first", 60, _tests(lstm, "-k", "float64 or any_size")),
        Step(
            "exchange",
            100,
            _python(
                *("-m", "ctxfast.benchmarks.lstm_cuda", "--dtypes", "bfloat16"),
                *("--batches", "1,8,32", "--steps", "20"),
            ),
        ),
        _bench(folder, "bench-attention", 3, "attention"),
        Step("attention", 240, _tests(attention, "-k", f"not ({FIRST})", spread=spread)),
        Step("linear", 90, _tests("tests/ops/test_linear_gpu.py", spread=min(spread, 6))),
        Step("graphs", 60, _tests("tests/integrations/test_cuda_graphs.py", "-k", "on_a_device")),
        Step("lstm", 120, _tests(lstm, "-k", "not (float64 or any_size)")),
        _bench(folder, "bench-all", 4),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        for tool, chosen in (
            ("memcheck", "float32_of_any_size or (against_float64 and 1024)"),
            ("racecheck", "float32_of_any_size and 33"),
        ):
            command = (sanitizer, "--tool", tool, *_tests(lstm, "-k", chosen))
            found.append(Step(tool, 90, command))
    return found


def environment() -> dict[str, str]:
    """Compiled kernels, for the architecture of this device alone."""
    import torch

    variables = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1"}
    variables["PYTHONPATH"] = os.pathsep.join(
        p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p
    )
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        variables.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}{'a' if major >= 9 else ''}")
    return variables


def run(step: Step, folder: Path, variables: dict[str, str]) -> dict[str, object]:
    """Runs one step and writes NAME.txt while it runs. The whole process group ends at the limit."""
    start = time.monotonic()
    path = folder / f"{step.name}.txt"
    try:
        with open(path, "w") as log:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=variables,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | str = process.wait(step.seconds)
            except subprocess.TimeoutExpired:
                code = "time limit"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
    except OSError as error:
        code = str(error)
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return {
        "step": step.name,
        "result": code,
        "seconds": round(time.monotonic() - start, 1),
        "last": next((line.strip()[-160:] for line in reversed(lines) if line.strip()), ""),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-logs", help="folder of the results")
    parser.add_argument("--only", help="names of steps, separated by commas")
    parser.add_argument("--skip", default="", help="names of steps, separated by commas")
    parser.add_argument("--list", action="store_true", help="print the steps and run nothing")
    options = parser.parse_args(arguments)
    folder = options.out.resolve()
    chosen = steps(folder)
    names = {step.name for step in chosen}
    wanted = set(options.only.split(",")) if options.only else names
    skipped = set(filter(None, options.skip.split(",")))
    if (wanted | skipped) - names:
        parser.error(f"no step {', '.join(sorted((wanted | skipped) - names))}")
    chosen = [step for step in chosen if step.name in wanted - skipped]
    if options.list:
        for step in chosen:
            print(f"{step.name:16} {step.seconds:4} s  {' '.join(step.command)}")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    variables = environment()
    failed = 0
    with open(folder / "steps.jsonl", "a", buffering=1) as summary:
        for step in chosen:
            line = run(step, folder, variables)
            failed += line["result"] != 0
            summary.write(json.dumps(line) + "\n")
            print(
                f"{step.name:16} {line['result']!s:10} {line['seconds']:6} s  {line['last']}",
                flush=True,
            )
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
