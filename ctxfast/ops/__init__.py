"""Operators: fused kernels behind one validated function each.

Shapes use one set of letters everywhere: B batch, S sequence (Sq queries, Sk keys), T packed tokens, H heads,
D head size, N and K features, V vocabulary.
"""

from ctxfast.ops._dispatch import use_backend
from ctxfast.ops.attention import (
    attention,
    attention_varlen,
    attention_varlen_with_lse,
    attention_weights,
    attention_with_lse,
)
from ctxfast.ops.attention_tile_map import attention_tile_map
from ctxfast.ops.char_cnn import char_cnn
from ctxfast.ops.embed_layer_norm import embed_layer_norm
from ctxfast.ops.highway import highway
from ctxfast.ops.layer_norm import add_layer_norm
from ctxfast.ops.linear import linear
from ctxfast.ops.linear_cross_entropy import linear_cross_entropy
from ctxfast.ops.linear_int8 import QuantizedWeight, linear_int8, quantize_weight
from ctxfast.ops.lstm import bilstm, lstm, pack_lstm
from ctxfast.ops.scalar_mix import scalar_mix

__all__ = [
    "QuantizedWeight",
    "add_layer_norm",
    "attention",
    "attention_tile_map",
    "attention_varlen",
    "attention_varlen_with_lse",
    "attention_weights",
    "attention_with_lse",
    "bilstm",
    "char_cnn",
    "embed_layer_norm",
    "highway",
    "linear",
    "linear_cross_entropy",
    "linear_int8",
    "lstm",
    "scalar_mix",
    "linear_cross_entropy",
    "pack_lstm",
    "quantize_weight",
    "use_backend",
]
