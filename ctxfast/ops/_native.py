"""The boundary between tensors and csrc: the only file that calls `data_ptr()` or the compiled modules.

Each operator has two functions. `<operator>_refuses(...)` says why the native code cannot take a call, or gives None.
`<operator>(...)` runs it: it brings inputs into a layout that the kernels read, allocates the outputs, keeps every
tensor alive through the call, passes torch's number of threads and turns error codes into exceptions.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}  # as in csrc/status.h
_PLAIN = (Tensor, torch.nn.Parameter)
# Of DLPack 1.3: through it csrc reads tensors.
_TABLE = getattr(Tensor, "__dlpack_c_exchange_api__", None)
_OUT_OF_MEMORY, _UNSUPPORTED_DTYPE, _INDEX_OUT_OF_RANGE, _NOT_MONOTONE = 1, 2, 3, 4


def build_log() -> dict[str, dict[str, Any]]:
    """What setup.py wrote about the two modules ("cpu", "cuda"): status, compiler, reason of a failure."""
    path = Path(__file__).resolve().parent.parent / "_build_log.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _missing(half: str) -> str:
    facts = build_log().get(half, {})
    if facts.get("status") in ("failed", "skipped"):
        return f"not built: {facts['reason']}"
    return "not built: install the package (pip install .) with a C++17 compiler"


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The module ctxfast._C and None, or None and the reason why it cannot be used."""
    try:
        return importlib.import_module("ctxfast._C"), None
    except ModuleNotFoundError:
        return None, _missing("cpu")
    except ImportError as error:
        first = error
    # The module takes its OpenMP symbols from the runtime that torch made global. Where torch keeps that
    # runtime to itself, load it by its usual name, which finds the same file.
    import ctypes

    for name in ("libgomp.so.1", "libiomp5.so", "libomp.so"):
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            return importlib.import_module("ctxfast._C"), None
        except (ImportError, OSError):
            continue
    return None, f"ctxfast._C cannot be loaded: {first}"


@functools.cache
def _load_cuda() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("ctxfast._C_cuda")
    except ModuleNotFoundError:
        return None, _missing("cuda")
    except ImportError as error:
        return None, f"ctxfast._C_cuda cannot be loaded: {error}"
    count = module.device_count()
    if isinstance(count, str):
        return None, f"built, but CUDA does not start: {count}"
    if count == 0:
        return None, "built, but there is no CUDA device"
    if not torch.cuda.is_available():
        return None, "built, but this torch has no CUDA"
    return module, None


def available() -> bool:
    """Whether the CPU module is loaded."""
    return _load()[0] is not None


def unavailable_reason() -> str | None:
    """Why the CPU module is not available, with the compiler's message if it did not build; None if it is."""
    return _load()[1]


def cuda_available() -> bool:
    """Whether the CUDA module is loaded and finds a device."""
    return _load_cuda()[0] is not None


def cuda_unavailable_reason() -> str | None:
    """Why the CUDA module is not available; None if it is."""
    return _load_cuda()[1]


def _module() -> ModuleType:
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"ctxfast: the native CPU module is not available ({reason})")
    return module


def isa() -> str:
    """The instruction set in use, one of those in csrc/dispatch.cpp (CTXFAST_CPU_ISA sets an upper bound)."""
    return _module().isa()


def available_isas() -> tuple[str, ...]:
    """The instruction sets that the module holds and this CPU runs, in rising order."""
    return tuple(_module().available_isas())


def set_isa(name: str) -> None:
    """Choose the instruction set of all later calls."""
    if not _module().set_isa(name):
        raise ValueError(
            f"set_isa: name must be one of {', '.join(available_isas())}, got {name!r}"
        )


def _refusal(*tensors: Tensor | None) -> str | None:
    """Why the native code cannot read these tensors, whatever the operator."""
    if _load()[0] is None:
        return f"native module: {_load()[1]}"
    for x in tensors:
        if x is None:
            continue
        if type(x) not in _PLAIN:
            return f"tensor subclass {type(x).__name__}"
        if not x.is_cpu:
            return f"device {x.device}"
        if x.layout is not torch.strided:
            return f"layout {x.layout}"
        if x.is_neg():
            return "a lazily negated tensor"
    return None


def _check(op: str, status: tuple[int, int, int] | None) -> None:
    if status is None:
        return
    code, argument, value = status
    if code == _OUT_OF_MEMORY:
        raise MemoryError(f"{op}: no memory for the working space")
    raise RuntimeError(f"{op}: native error {code} (argument {argument}, value {value})")


_FLOAT_PARTS = {"tf32": 2, "bf16": 1}
_MOST_WHOLE_ROWS = 48  # that csrc/cpu/amx_matrix_product.h never multiplies by parts


def _float_parts(dtype: torch.dtype, rows: int) -> int:
    """How many parts of 8 bits of float32's mantissa products may read, as torch has been told; 3 are all of them.

    `torch.set_float32_matmul_precision` and `torch.backends.mkldnn.matmul.fp32_precision` tell it, the latter in a
    microsecond: it is asked only where it matters.
    """
    if dtype != torch.float32 or rows <= _MOST_WHOLE_ROWS:
        return 3
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return _FLOAT_PARTS.get(precision, 3)


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy where its address is no multiple of its element size."""
    return x if x.data_ptr() % x.element_size() == 0 else x.clone()


_LARGE_BYTES = 4 << 20


def _large(x: Tensor) -> Tensor:
    """x, fresh and not yet written, on large pages if it is large: first writes then cost a third."""
    bytes = x.numel() * x.element_size()
    if bytes >= _LARGE_BYTES:
        _module().advise_large_pages(x.data_ptr(), bytes)
    return x


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x as rows [..., N] with unit stride inside a row, and the stride from row to row."""
    if not x.is_contiguous():
        if x.dim() == 2 and (x.stride(1) == 1 or x.shape[1] == 1):
            return _aligned(x), x.stride(0)
        x = x.contiguous()
    return _aligned(x), x.shape[-1]


def _float_refusal(x: Tensor, *parameters: Tensor | None) -> str | None:
    if x.dtype not in _DTYPES:
        return f"dtype {x.dtype}"
    for parameter in parameters:
        if parameter is not None and parameter.dtype != x.dtype:
            if x.dtype == torch.bfloat16 and parameter.dtype == torch.float32:
                continue
            return f"parameters of {parameter.dtype} with {x.dtype}"
    return None


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
