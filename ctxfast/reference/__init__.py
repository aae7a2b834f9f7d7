"""Eager PyTorch implementations of every operator: the specification that the fused kernels are tested against.

They run in any floating dtype up to float64 and are differentiable any number of times through autograd.
"""

from ctxfast.reference.attention import (
    attention,
    attention_backward,
    attention_varlen,
    attention_varlen_backward,
    attention_weights,
    attention_with_lse,
)
from ctxfast.reference.char_cnn import char_cnn, char_cnn_backward
from ctxfast.reference.dropout import dropout_mask, dropout_scale, hidden_dropout
from ctxfast.reference.highway import highway, highway_gate, highway_gate_backward
from ctxfast.reference.layer_norm import (
    add_layer_norm,
    add_layer_norm_backward,
    embed_layer_norm,
    embed_layer_norm_backward,
)
from ctxfast.reference.linear import linear, linear_backward
from ctxfast.reference.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_backward,
)
from ctxfast.reference.linear_int8 import (
    linear_int8,
    pack_weight,
    quantize_rows,
    quantize_weight,
    unpack_weight,
)
from ctxfast.reference.lstm import bilstm, lstm
from ctxfast.reference.scalar_mix import scalar_mix, weighted_sum, weighted_sum_backward

__all__ = [
    "add_layer_norm",
    "add_layer_norm_backward",
    "attention",
    "attention_backward",
    "attention_varlen",
    "attention_varlen_backward",
    "attention_weights",
    "attention_with_lse",
    "bilstm",
    "char_cnn",
    "char_cnn_backward",
    "dropout_mask",
    "dropout_scale",
    "embed_layer_norm",
    "embed_layer_norm_backward",
    "hidden_dropout",
    "highway",
    "highway_gate",
    "highway_gate_backward",
    "linear",
    "linear_backward",
    "lstm",
    "scalar_mix",
    "weighted_sum",
    "weighted_sum_backward",
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
    "linear_int8",
    "pack_weight",
    "quantize_rows",
    "quantize_weight",
    "unpack_weight",
]
