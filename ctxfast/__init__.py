"""Contextual word representations, fast: BERT and ELMo on fused kernels, for GPU and CPU, inference and training."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctxfast.embeddings import load_embeddings
    from ctxfast.explanation import explain
    from ctxfast.integrations._accelerate import accelerate, accelerated, refresh, restore
    from ctxfast.ops._native_lstm_paths import synchronize
    from ctxfast.packed import PackedBatch

try:
    __version__ = version("ctxfast")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

# Public names and submodules are loaded on first use, so that `import ctxfast` costs next to nothing.
_NAMES = {
    "PackedBatch": "ctxfast.packed",
    "accelerate": "ctxfast.integrations._accelerate",
    "accelerated": "ctxfast.integrations._accelerate",
    "explain": "ctxfast.explanation",
    "load_embeddings": "ctxfast.embeddings",
    "refresh": "ctxfast.integrations._accelerate",
    "restore": "ctxfast.integrations._accelerate",
    "synchronize": "ctxfast.ops._native_lstm_paths",
}
_MODULES = ("bert", "integrations", "nn", "ops", "reference")

__all__ = [
    "PackedBatch",
    "accelerate",
    "accelerated",
    "bert",
    "explain",
    "integrations",
    "load_embeddings",
    "nn",
    "ops",
    "reference",
    "refresh",
    "restore",
    "synchronize",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"ctxfast.{name}")
    else:
        raise AttributeError(f"module 'ctxfast' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
