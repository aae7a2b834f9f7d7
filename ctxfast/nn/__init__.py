"""Thin modules: parameters and one call into `ctxfast.ops`."""

from ctxfast.nn.lstm import LSTM
from ctxfast.nn.multihead_attention import MultiheadAttention
from ctxfast.nn.packed_linear import (
    PackedLinear,
    PackedModule,
    packed_bytes,
    refresh,
    set_packing,
)
from ctxfast.nn.transformer import TransformerEncoder, TransformerEncoderLayer

__all__ = [
    "LSTM",
    "MultiheadAttention",
    "PackedLinear",
    "PackedModule",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "packed_bytes",
    "refresh",
    "set_packing",
]
