"""csrc/simt for the tests: compiles it once, and runs the CUDA kernels on CPU tensors."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ctxfast.ops._native_lstm_cuda import Kernel

CSRC = Path(__file__).resolve().parent.parent.parent / "csrc"
FLAGS = [
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-shared",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-U_FORTIFY_SOURCE",
]

NO_FAULT, DROP_FENCE, RELAX_ACQUIRE, SKIP_BARRIER, SKIP_GENERATION, LOSE_ARRIVAL, NARROW_FENCE = (
    range(7)
)


@cache
def library() -> ctypes.CDLL:
    """The compiled library, kept in the temporary folder under a hash of its sources."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    sources = sorted(p for folder in ("simt", "cuda") for p in (CSRC / folder).iterdir())
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"ctxfast-simt-{digest}"
    folder.mkdir(exist_ok=True)
    path = folder / "simt.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            files = [str(p) for p in sources if p.suffix == ".cpp"]
            run = subprocess.run(
                [compiler, *FLAGS, f"-I{CSRC}", *files, "-o", str(path) + ".new"],
                capture_output=True,
                text=True,
            )
            assert run.returncode == 0, run.stderr
            assert "warning" not in run.stderr, run.stderr
            Path(str(path) + ".new").rename(path)
    found = ctypes.CDLL(str(path))
    for name in ("simt_persistent", "simt_stepwise", "simt_barriers", "simt_self_test"):
        getattr(found, name).restype = ctypes.c_char_p
    return found


def self_test(name: str, data: Tensor, blocks: int, threads: int, cluster: int, seed: int) -> str:
    """What the machine says of one of its own small kernels on `data`; empty if nothing is wrong."""
    library().simt_clear()
    library().simt_plan(ctypes.c_uint64(seed), NO_FAULT, 0)
    size = ctypes.c_size_t(data.nbytes)
    library().simt_add(b"data", ctypes.c_void_p(data.data_ptr()), size, 0)
    address = ctypes.c_void_p(data.data_ptr())
    return library().simt_self_test(name.encode(), address, blocks, threads, cluster).decode()


def kernel(name: str, hidden: int, features: int, dtype: torch.dtype) -> Kernel:
    """One of the sizes that the library holds."""
    facts = (ctypes.c_int * 5)()
    assert library().simt_describe(f"forward {name}".encode(), facts), name
    cluster, clusters, _, rows, depth = facts
    return Kernel(name, dtype, hidden, features, cluster, clusters, rows, depth)


def barriers() -> list[str]:
    """Places of the barriers met in the last launch that left none out, as SKIP_BARRIER counts them."""
    return library().simt_barriers().decode().split()


def _integers(values: Sequence[int]):
    return (ctypes.c_int64 * len(values))(*values)


@dataclass
class HostRunner:
    """A runner for `_native_lstm_cuda`. seed: of the order of threads;  fault: its kind and value;  timeout: of the
    watchdog, in units of a hundredth of a poll."""

    seed: int = 0
    fault: tuple[int, int] = (NO_FAULT, 0)
    timeout: int = 1 << 60
    launches: int = 0

    def _prepare(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """What a launch may touch: whole storages, those of inputs only to read."""
        library().simt_clear()
        library().simt_plan(ctypes.c_uint64(self.seed), *self.fault)
        written = {x.untyped_storage().data_ptr() for x in outputs}
        for x in (*inputs, *outputs):
            storage = x.untyped_storage()
            begin = storage.data_ptr()
            constant = int(begin not in written)
            name = f"{'input' if constant else 'output'} {tuple(x.shape)}"
            library().simt_add(
                name.encode(), ctypes.c_void_p(begin), ctypes.c_size_t(storage.nbytes()), constant
            )
        self.launches += 1

    def persistent(self, kernel, backward, values, clips, slots, exchange, inputs, outputs):
        self._prepare(inputs, outputs)
        answer = library().simt_persistent(
            f"{'backward' if backward else 'forward'} {kernel.key}".encode(),
            _integers(values),
            *(ctypes.c_double(x) for x in clips),
            slots,
            *(ctypes.c_void_p(x) for x in exchange[:-1]),
            ctypes.c_uint64(self.timeout),
        )
        return answer.decode() or None

    def stepwise(self, dtype, backward, values, clips, scratch, inputs, outputs):
        self._prepare(inputs, outputs)
        answer = library().simt_stepwise(
            dtype,
            int(backward),
            _integers(values),
            *(ctypes.c_double(x) for x in clips),
            ctypes.c_void_p(scratch),
        )
        return answer.decode() or None
