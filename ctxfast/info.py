"""What this installation is and can do: `ctxfast info`."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "h5py", "transformers")

# name, when it is read, meaning
ENVIRONMENT = (
    ("CTXFAST_BACKEND", "run", "auto, native, triton or reference: which implementations may run"),
    (
        "CTXFAST_CPU_ISA",
        "run",
        "baseline, avx2, avx512, avx512_vnni, avx512_bf16 or amx: highest instruction set",
    ),
    ("CTXFAST_LSTM", "run", "auto, persistent or stepwise: how the LSTM runs on a CUDA device"),
    ("TRITON_INTERPRET", "run", "1 runs Triton kernels on CPU tensors, slowly, for tests"),
    ("OMP_NUM_THREADS", "run", "threads of torch and of the native code"),
    ("HF_HOME", "run", "where models of the Hugging Face cache are looked up"),
    ("NO_COLOR", "run", "anything: no colours on the terminal"),
    ("CTXFAST_TEST_DATA", "test", "directory of the data sets that some tests read"),
    ("CTXFAST_NATIVE", "build", "0 builds no compiled module"),
    ("CTXFAST_CUDA", "build", "0 builds no CUDA module"),
    ("CTXFAST_REQUIRE_NATIVE", "build", "1 fails the build where the CPU module does not compile"),
    ("CXX", "build", "C++ compiler"),
    ("NVCC", "build", "CUDA compiler"),
    ("MAX_JOBS", "build", "parallel compilations"),
    ("TORCH_CUDA_ARCH_LIST", "build", "CUDA architectures, such as 8.0;9.0a"),
)


def collect() -> dict[str, Any]:
    """Versions, devices, native modules, operators and environment, ready for JSON."""
    import torch

    import ctxfast
    from ctxfast.ops import _dispatch, _native

    return {
        "versions": {
            "ctxfast": ctxfast.__version__,
            "commit": commit(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{name: _version(name) for name in PACKAGES},
        },
        "cpu": {
            "model": cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "threads": torch.get_num_threads(),
            "isa": _native.isa() if _native.available() else None,
            "available_isas": list(_native.available_isas()) if _native.available() else [],
        },
        "cuda": _cuda_devices(),
        "native": {
            "cpu": _module("ctxfast._C", _native.unavailable_reason()),
            "cuda": _module("ctxfast._C_cuda", _native.cuda_unavailable_reason()),
            "build": _native.build_log(),
        },
        "backend": _dispatch.backend(),
        "operators": {device: survey_operators(device) for device in _devices()},
        "environment": [
            {"name": name, "read": when, "value": os.environ.get(name), "meaning": meaning}
            for name, when, meaning in ENVIRONMENT
        ],
    }


def survey_operators(device: str) -> dict[str, dict[str, str | None]]:
    """For every operator and implementation: why a small float32 call is refused, or None.

    The calls run forward and backward; an operator that fails altogether has {"error": message}.
    """
    import torch

    from ctxfast.ops import _dispatch

    failed: dict[str, dict[str, str | None]] = {}
    quiet = _dispatch.logger.disabled
    _dispatch.logger.disabled = True  # the survey says it all
    try:
        with _dispatch.survey() as found, torch.random.fork_rng(), torch.enable_grad():
            for name, call in _sample_calls(device).items():
                try:
                    # A gradient that is not 1 is a product of its own.
                    (2 * call().sum()).backward()
                except Exception as error:  # one broken operator must not hide the others
                    failed[name] = {"error": f"{type(error).__name__}: {error}"}
    finally:
        _dispatch.logger.disabled = quiet
    return {**failed, **found}


def cpu_model() -> str:
    """The name that the processor gives itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The git commit this was installed from, where it is known."""
    try:
        direct = metadata.distribution("ctxfast").read_text("direct_url.json")
        found = json.loads(direct or "{}").get("vcs_info", {}).get("commit_id")
        if found:
            return str(found)
    except metadata.PackageNotFoundError:
        pass
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _module(name: str, reason: str | None) -> dict[str, str | None]:
    spec = importlib.util.find_spec(name)
    return {"path": spec.origin if spec else None, "reason": reason}


def _devices() -> list[str]:
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _cuda_devices() -> list[dict[str, Any]]:
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": facts.name,
                "capability": f"{facts.major}.{facts.minor}",
                "memory_gib": round(facts.total_memory / 2**30, 1),
                "multiprocessors": facts.multi_processor_count,
            }
        )
    return devices


def _sample_calls(device: str) -> dict[str, Callable[[], Any]]:
    """One small call of each public operator."""
    import torch

    from ctxfast import ops

    def randn(*shape: int) -> Any:
        return torch.randn(shape, device=device, requires_grad=True)

    heads, packed = randn(1, 2, 16, 64), randn(16, 2, 64)
    rows, table, square, vector = randn(16, 64), randn(32, 64), randn(64, 64), randn(64)
    ids = torch.arange(16, device=device)
    bounds = torch.tensor([0, 16], dtype=torch.int32, device=device)
    varlen = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
    longest = {"max_seqlen_q": 16, "max_seqlen_k": 16}
    return {
        "attention": lambda: ops.attention(heads, heads, heads),
        "attention_varlen": lambda: ops.attention_varlen(
            packed, packed, packed, **varlen, **longest
        ),
        "attention_tile_map": lambda: torch.ops.ctxfast.attention_tile_map(bounds, 16),
        "char_cnn": lambda: ops.char_cnn(
            ids.view(2, 8), table, [randn(64, 64, 3)], [vector], "relu"
        ),
        "highway_gate": lambda: torch.ops.ctxfast.highway_gate(randn(4, 16), randn(4, 8)),
        "lstm": lambda: ops.lstm(randn(2, 3, 8), randn(64, 8), randn(64, 16))[0],
        "scalar_mix": lambda: ops.scalar_mix(randn(3, 4, 8), randn(3), randn(1)),
        "linear_activation": lambda: torch.ops.ctxfast.linear_activation(
            rows, square, vector, "gelu", None
        )[0],
        "linear": lambda: ops.linear(rows, square, vector, activation="gelu"),
        "add_layer_norm": lambda: ops.add_layer_norm(rows, rows, vector, vector, 1e-12),
        "embed_layer_norm": lambda: ops.embed_layer_norm(
            ids, torch.zeros_like(ids), ids, table, table, table, vector, vector, 1e-12
        ),
        "linear_int8": lambda: ops.linear_int8(
            rows, ops.quantize_weight(square), vector
        ).requires_grad_(),
        "linear_cross_entropy": lambda: ops.linear_cross_entropy(rows, table, None, ids),
    }
