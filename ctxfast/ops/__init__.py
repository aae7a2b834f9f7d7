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
from ctxfast.ops.embed_layer_norm import embed_layer_norm
from ctxfast.ops.layer_norm import add_layer_norm
from ctxfast.ops.linear import linear
from ctxfast.ops.linear_cross_entropy import linear_cross_entropy
from ctxfast.ops.linear_int8 import linear_int8, quantize_weight

__all__ = [
    "add_layer_norm",
    "attention",
    "attention_varlen",
    "attention_varlen_with_lse",
    "attention_weights",
    "attention_with_lse",
    "embed_layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_int8",
    "quantize_weight",
    "use_backend",
]
