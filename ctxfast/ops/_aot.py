"""Compile a Triton kernel for a GPU that is not there, and read back what it needs.

    registers, stack     per thread; a stack above a few bytes means spilled registers
    shared               bytes of shared memory per block
    matmul               its tensor-core instructions: "mma" (sm_80), "wgmma" (sm_90), "tcgen05" (sm_100) or "none"
    load                 bits of the widest load from global memory
    loops                instructions of every innermost loop, most first

Works without a driver: Triton's own wheel carries ptxas, cuobjdump and nvdisasm. Kernels must have been imported with
the interpreter off.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MATMUL = (("UTCHMMA", "tcgen05"), ("UTCQMMA", "tcgen05"), ("HGMMA", "wgmma"), ("HMMA", "mma"))

SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs of one multiprocessor."""

    registers: int
    stack: int
    shared: int
    matmul: str
    load: int
    loops: tuple[int, ...]


def compile_kernel(
    kernel: Any,
    arch: int,
    types: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, Any],
    unaligned: tuple[str, ...] = (),
    aligned: tuple[str, ...] = (),
) -> Resources:
    """Compile for sm_<arch>. types: "*bf16", "fp32", ... by argument name, i32 where absent.

    Pointers and strides count as divisible by 16, except for the names in `unaligned`; so do the numbers in `aligned`.
    """
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in constants
        and name not in unaligned
        and (name.endswith("_ptr") or name.startswith("stride") or name in aligned)
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options=dict(enable_fp_fusion=True, **options),
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", cubin)
        assembly = _run("nvdisasm", "-c", cubin)
    return Resources(
        registers=_field(usage, "REG"),
        stack=_field(usage, "STACK"),
        shared=compiled.metadata.shared,
        matmul=next((name for opcode, name in _MATMUL if opcode in assembly), "none"),
        load=_widest_load(assembly),
        loops=tuple(sorted((sum(loop.values()) for loop in inner_loops(assembly)), reverse=True)),
    )


def _run(tool: str, *arguments: str | Path) -> str:
    return subprocess.run(
        [_BIN / tool, *arguments], capture_output=True, text=True, check=True
    ).stdout


def _field(usage: str, name: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no {name}")
    return int(found[1])


def _widest_load(assembly: str) -> int:
    """Loads of 32 bits and less carry no number, asynchronous copies none either."""
    found = re.findall(r"\b(?:LDG|LDGSTS)\.E\S*?\.(64|128|256)\b", assembly)
    return max(map(int, found), default=32)


def inner_loops(assembly: str) -> list[Counter[str]]:
    """Instructions by opcode of every loop that holds no other loop."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in assembly.splitlines():
        label = re.match(r"\s*(\.L_x_\w+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line)
        if label:
            labels[label[1]] = len(instructions)
        elif instruction:
            instructions.append(instruction[1])
    spans = []
    for index, text in enumerate(instructions):
        target = re.search(r"BRA.*?`\((\.L_x_\w+)\)", text)
        if target and labels.get(target[1], index + 1) <= index:
            spans.append((labels[target[1]], index))
    inner = [
        (a, b)
        for a, b in spans
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)
    ]
    return [
        Counter(_opcode(text) for text in instructions[a : b + 1]) for a, b in inner if b - a > 8
    ]


def _opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0]


def write_rows(
    rows: Iterable[dict[str, Any]],
    columns: dict[str, str],
    head: str,
    *,
    as_json: bool,
) -> None:
    """Prints each row when it is done: a JSON object a line, or under `head` a Markdown table of the named columns."""
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET must be off")
    if not as_json:
        print(head)
        print("| " + " | ".join(columns.values()) + " |")
        print("|" + "---|" * len(columns))
    for row in rows:
        cells = " | ".join(str(row[name]) for name in columns)
        print(json.dumps(row) if as_json else f"| {cells} |", flush=True)
