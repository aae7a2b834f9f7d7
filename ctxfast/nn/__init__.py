"""Thin modules: parameters and one call into `ctxfast.ops`."""

from ctxfast.nn.packed_linear import (
    PackedLinear,
    PackedModule,
    packed_bytes,
    refresh,
    set_packing,
)

__all__ = ["PackedLinear", "PackedModule", "packed_bytes", "refresh", "set_packing"]
