"""Other people's models on ctxfast's operators: transformers and what is built on it."""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = ("transformers",)

__all__ = ["transformers"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
