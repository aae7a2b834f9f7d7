"""Registers and shared memory of every CUDA LSTM kernel, as the compiler reports them.

`python -m ctxfast.benchmarks.resources` writes results/resources_lstm.md. Needs nvcc, no GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
RESULT = Path(__file__).resolve().parent / "results" / "resources_lstm.md"
ARCHITECTURES = ("80", "90a", "100")
SOURCES = tuple(sorted(p.name for p in (CSRC / "cuda").glob("lstm_*_*.cu")))

_TYPES = {"f": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Resources:
    """What the compiler says of one kernel. stack: bytes of local memory a thread, spilled registers included."""

    kernel: str
    architecture: str
    registers: int
    stack: int
    spills: int


def nvcc() -> str | None:
    """The CUDA compiler, or None."""
    return os.environ.get("NVCC") or shutil.which("nvcc")


def kernel_name(mangled: str) -> str:
    """A readable name: kind, type, sizes."""
    kinds = re.findall(r"\d+(?:float16|bfloat16)|If|NS0_", mangled)
    kind = next((k.lstrip("0123456789") for k in kinds if "float" in k), "f")
    numbers = [int(n) for n in re.findall(r"Li(\d+)E", mangled)]
    persistent = re.search(r"persistent_(forward|backward)", mangled)
    if persistent:
        hidden, features, cluster, clusters, warps, rows, *_ = numbers
        blocks = f"{clusters} x {cluster} blocks of {32 * warps}, {rows} rows"
        return f"persistent {persistent[1]} {hidden}/{features} {_TYPES[kind]}, {blocks}"
    name = re.search(r"(Start\w+?|\w+?Step)I", re.sub(r".*stepwise_kernelINS0_\d+", "", mangled))
    aligned = ", unaligned" if "Lb0E" in mangled else ""
    rows = f", {8 * numbers[0]} rows" if numbers else ""
    return f"{name[1] if name else mangled} {_TYPES[kind]}{rows}{aligned}"


def parse(report: str) -> list[Resources]:
    """The kernels in what `nvcc -Xptxas -v` prints."""
    found = []
    pattern = (
        r"Compiling entry function '(\S+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill "
        r"stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    for name, arch, stack, stores, loads, registers in re.findall(pattern, report, re.DOTALL):
        spills = int(stores) + int(loads)
        found.append(Resources(kernel_name(name), arch, int(registers), int(stack), spills))
    return found


def compile_source(source: str, architectures: tuple[str, ...]) -> list[Resources]:
    """Compile one file of csrc/cuda. RuntimeError with the compiler's message if it does not compile."""
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc is not on PATH and NVCC is not set")
    with tempfile.TemporaryDirectory() as folder:
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
        flags = ["-std=c++17", "-O3", f"-I{CSRC}", "-Xptxas", "-v", *targets]
        output = ["-c", str(CSRC / "cuda" / source), "-o", str(Path(folder) / "object.o")]
        run = subprocess.run([compiler, *flags, *output], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return parse(run.stderr + run.stdout)


def shared_memory() -> dict[str, int]:
    """Bytes of a block of each persistent kernel, from the compiled module."""
    import importlib

    module = importlib.import_module("ctxfast._C_cuda")
    sizes = {}
    for dtype, hidden, features, cluster, clusters, rows, *both in module.lstm_kernels():
        for direction, size in zip(("forward", "backward"), both, strict=True):
            kind = {2: "bf16", 3: "fp16"}[dtype]
            key = (
                f"persistent {direction} {hidden}/{features} {kind}, {clusters} x {cluster} blocks"
            )
            sizes[f"{key}, {rows} rows"] = size
    return sizes


def table(found: list[Resources], shared: dict[str, int]) -> str:
    """Markdown: one row a kernel, registers by architecture."""
    lines = [
        "# Resources of the CUDA LSTM kernels",
        "",
        "Made by `python -m ctxfast.benchmarks.resources`, without a GPU. Registers of a thread by architecture;",
        "shared memory of a block. No kernel spills registers or keeps an array in local memory. -: needs clusters.",
        "",
        "| kernel | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " | shared KiB |",
        "|---|" + "---:|" * (len(ARCHITECTURES) + 1),
    ]
    by_kernel: dict[str, dict[str, int]] = {}
    for x in found:
        by_kernel.setdefault(x.kernel, {})[x.architecture] = x.registers
    for kernel, registers in sorted(by_kernel.items()):
        # A kernel that needs clusters is empty on an architecture without them.
        cells = [str(n) if (n := registers.get(a, 0)) > 8 else "-" for a in ARCHITECTURES]
        size = shared.get(re.sub(r" of \d+", "", kernel))
        kib = f"{size / 1024:.1f}" if size else ""
        lines.append(f"| {kernel} | {' | '.join(cells)} | {kib} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    found = [x for source in SOURCES for x in compile_source(source, ARCHITECTURES)]
    bad = [x for x in found if x.stack or x.spills]
    for x in bad:
        print(f"{x.kernel}, sm_{x.architecture}: {x.stack} bytes of stack", file=sys.stderr)
    if not bad:
        RESULT.write_text(table(found, shared_memory()))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
