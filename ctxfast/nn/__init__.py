"""Thin modules: parameters and one call into `ctxfast.ops`."""

from ctxfast.nn.multihead_attention import MultiheadAttention
from ctxfast.nn.packed_linear import (
    PackedLinear,
    PackedModule,
    packed_bytes,
    refresh,
    set_packing,
    set_precision,
)
from ctxfast.nn.transformer import TransformerEncoder, TransformerEncoderLayer

__all__ = [
    "MultiheadAttention",
    "PackedLinear",
    "PackedModule",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "packed_bytes",
    "refresh",
    "set_packing",
    "set_precision",
]
