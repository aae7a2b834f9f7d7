"""Accelerated classes by name: what pickles of accelerated models look up here when they are loaded.

`getattr(ctxfast.integrations.pickled, "package.module:Class")` gives the accelerated form of a stock class.
"""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    module, _, qualname = name.partition(":")
    if not qualname:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ctxfast.integrations._swap import accelerated_class
    from ctxfast.integrations._targets import forward_for

    stock = importlib.import_module(module)
    for part in qualname.split("."):
        stock = getattr(stock, part)
    forward = forward_for(stock)  # type: ignore[arg-type]
    if forward is None:
        raise AttributeError(f"{name} is no class that can be accelerated")
    return accelerated_class(stock, forward)
