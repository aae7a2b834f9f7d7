"""What a result was measured on: device, versions, commit, threads."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import ctxfast

from .case import CPU

_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile")


def describe(device: torch.device = CPU) -> dict[str, Any]:
    """A JSON-able record of this process and machine, and of the device that is measured."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "processor": cpu_name(),
        "cuda": torch.version.cuda,
        "cpu_flags": _cpu_flags(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "libraries": _torch_libraries(),
        "ctxfast": ctxfast.__version__,
        "commit": commit(),
        "settings": {
            name: value for name, value in sorted(os.environ.items()) if _is_setting(name)
        },
    }


def _is_setting(name: str) -> bool:
    prefixes = ("OMP_", "KMP_", "GOMP_", "MKL_", "ONEDNN_", "CTXFAST_")
    return name.startswith(prefixes) and name != "CTXFAST_TEST_DATA"


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor (Linux); empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def cpu_name() -> str:
    """The processor's name with family and model, which tell generations of one name apart."""
    info = _cpuinfo()
    name = info.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in info and "model" in info:
        name += f" (family {info['cpu family']}, model {info['model']})"
    return name


def _cpu_flags() -> list[str]:
    present = set(_cpuinfo().get("flags", "").split())
    return [flag for flag in _FLAGS if flag in present]


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16; True where that is unknown."""
    info = _cpuinfo()
    flags = set(info.get("flags", info.get("Features", "")).split())
    return not flags or bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _torch_libraries() -> dict[str, str]:
    """Versions of the GEMM libraries inside torch."""
    text = torch.__config__.show()
    found = {
        "MKL": re.search(r"oneAPI Math Kernel Library Version (\S+)", text),
        "oneDNN": re.search(r"MKL-DNN v(\S+)", text),
    }
    return {name: match[1] for name, match in found.items() if match}


def commit() -> str | None:
    """The commit of the checkout that this file lies in, with "+changes"; None for an installed copy."""
    root = Path(__file__).resolve().parent.parent
    if not ((root / "setup.py").is_file() and (root / ".git").exists()):
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None
