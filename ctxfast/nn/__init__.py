"""Thin modules: parameters and one call into `ctxfast.ops`."""

from ctxfast.nn.character_encoder import CharacterEncoder
from ctxfast.nn.highway import Highway
from ctxfast.nn.lstm import LSTM
from ctxfast.nn.multihead_attention import MultiheadAttention
from ctxfast.nn.packed_linear import (
    PackedLinear,
    PackedModule,
    packed_bytes,
    refresh,
    set_packing,
    set_precision,
)
from ctxfast.nn.scalar_mix import ScalarMix
from ctxfast.nn.transformer import TransformerEncoder, TransformerEncoderLayer

__all__ = [
    "CharacterEncoder",
    "Highway",
    "LSTM",
    "MultiheadAttention",
    "PackedLinear",
    "PackedModule",
    "ScalarMix",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "packed_bytes",
    "refresh",
    "set_packing",
    "set_precision",
]
