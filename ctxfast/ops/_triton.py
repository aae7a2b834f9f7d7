"""The Triton implementations of the operators, as functions of tensors: the way to `ctxfast.kernels`.

Triton is imported by the first call and not before. On a GPU the kernels are compiled; CPU tensors are taken only where
Triton's interpreter is on (TRITON_INTERPRET=1), which is how they are tested without a GPU.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_MINIMUM_CAPABILITY = (8, 0)
_MINIMUM_VERSION = (3, 6)
_LARGEST_HEAD = 256
# The longest rows that a program holds without spilling registers, by ahead-of-time compilation.
LARGEST_NORM = 32768
LARGEST_NORM_BACKWARD = 8192
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def _missing() -> str | None:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _MINIMUM_VERSION:
        return f"Triton {triton.__version__} is older than 3.6"
    return None


@functools.cache
def available(device: torch.device) -> str | None:
    """Why no kernel can run on this device, or None where they can."""
    reason = _missing()
    if reason is not None:
        return reason
    if importlib.import_module("triton").knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, got {device.type} (or TRITON_INTERPRET=1)"
    if torch.version.hip is not None:
        return "the launch tables cover NVIDIA devices only"
    capability = torch.cuda.get_device_capability(device)
    if capability < _MINIMUM_CAPABILITY:
        return f"needs compute capability 8.0, got {capability[0]}.{capability[1]}"
    return None


def _attention() -> ModuleType:
    return importlib.import_module("ctxfast.ops._triton_attention")


def _attention_backward() -> ModuleType:
    return importlib.import_module("ctxfast.ops._triton_attention_backward")


def attention_refuses(query: Tensor, *arguments: Any) -> str | None:
    """Why an attention call, padded or packed, cannot run on Triton, or None."""
    reason = available(query.device)
    if reason is not None:
        return reason
    if query.dtype not in _DTYPES:
        return f"no kernel for {query.dtype}"
    if query.shape[-1] > _LARGEST_HEAD:
        return f"head size {query.shape[-1]} is above {_LARGEST_HEAD}"
    return None


attention_backward_refuses = (
    attention_refuses  # grad_output has the device, dtype and head size of query
)


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    window_left: int,
    window_right: int,
    dropout_p: float,
    scale: float,
    *,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Sq, D] over [B, Sq, H, D] memory, and lse float32 [B, H, Sq]; arguments as `ctxfast.ops.attention`.

    attn_mask and bias have four dimensions. allow_tf32 lets float32 products round their factors to TF32.
    """
    module = _attention()
    problem = module.Problem(
        query,
        key,
        value,
        bias,
        seed,
        is_causal,
        window_left,
        window_right,
        dropout_p,
        scale,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        allow_tf32=allow_tf32,
    )
    return module.forward(problem)


def attention_varlen_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    tile_map_q: Tensor | None,
    tile_map_k: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    window_left: int,
    window_right: int,
    dropout_p: float,
    scale: float,
    *,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] and lse float32 [H, T]; arguments as `ctxfast.ops.attention_varlen`.

    tile_map_q: `build_tile_map(cu_seqlens_q, T)`, built here where it is not given. tile_map_k: for the backward.
    """
    module = _attention()
    problem = module.Problem(
        query,
        key,
        value,
        bias,
        seed,
        is_causal,
        window_left,
        window_right,
        dropout_p,
        scale,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        allow_tf32=allow_tf32,
        tile_map_q=tile_map_q,
        tile_map_k=tile_map_k,
    )
    return module.forward(problem)


def build_tile_map(cu_seqlens: Tensor, total: int) -> Tensor:
    """Tiles of a packed batch, longest sequences first: one map serves all layers and the backward of a batch.

    cu_seqlens: int32 [B + 1]; total: T. Returns int32 [T // 128 + B + 1, 2], without synchronisation.
    """
    return _attention().build_tile_map(cu_seqlens, total)


def attention_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    window_left: int,
    window_right: int,
    dropout_p: float,
    scale: float,
    needs_bias_grad: bool,
    *,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value over [B, S, H, D] memory, and of the bias: an empty tensor if not needed."""
    module = _attention()
    problem = module.Problem(
        query,
        key,
        value,
        bias,
        seed,
        is_causal,
        window_left,
        window_right,
        dropout_p,
        scale,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        allow_tf32=allow_tf32,
    )
    return _attention_backward().backward(
        problem, grad_output, grad_lse, output, lse, needs_bias_grad
    )


def attention_varlen_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    tile_map_q: Tensor | None,
    tile_map_k: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    window_left: int,
    window_right: int,
    dropout_p: float,
    scale: float,
    needs_bias_grad: bool,
    *,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value [T, H, D], and of the bias: an empty tensor if not needed."""
    module = _attention()
    problem = module.Problem(
        query,
        key,
        value,
        bias,
        seed,
        is_causal,
        window_left,
        window_right,
        dropout_p,
        scale,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        allow_tf32=allow_tf32,
        tile_map_q=tile_map_q,
        tile_map_k=tile_map_k,
    )
    return _attention_backward().backward(
        problem, grad_output, grad_lse, output, lse, needs_bias_grad
    )


def layer_norm_refuses(input: Tensor) -> str | None:
    """Why a layer normalisation over the last dimension of input cannot run on Triton, or None."""
    reason = available(input.device)
    if reason is not None:
        return reason
    if input.dtype not in _DTYPES:
        return f"no kernel for {input.dtype}"
    if not 0 < input.shape[-1] <= LARGEST_NORM:
        return f"rows of {input.shape[-1]} features are above {LARGEST_NORM}"
    return None


def layer_norm_backward_refuses(input: Tensor) -> str | None:
    """Why its gradients cannot: a program also holds the sums of both parameters' gradients."""
    reason = layer_norm_refuses(input)
    if reason is None and input.shape[-1] > LARGEST_NORM_BACKWARD:
        reason = f"rows of {input.shape[-1]} features are above {LARGEST_NORM_BACKWARD}"
    return reason


def add_layer_norm(*arguments: Any) -> Tensor:
    """LayerNorm(dropout(input) + residual); the arguments of the registered `ctxfast::add_layer_norm`."""
    return importlib.import_module("ctxfast.ops._triton_layer_norm").add_layer_norm(*arguments)


def add_layer_norm_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments and results of the registered `ctxfast::add_layer_norm_backward`."""
    module = importlib.import_module("ctxfast.ops._triton_layer_norm_backward")
    return module.add_layer_norm_backward(*arguments)


def embed_layer_norm_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The arguments and results of the registered `ctxfast::embed_layer_norm_backward`."""
    module = importlib.import_module("ctxfast.ops._triton_layer_norm_backward")
    return module.embed_layer_norm_backward(*arguments)


def embed_layer_norm(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word_embeddings: Tensor,
    token_type_embeddings: Tensor,
    position_embeddings: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """LayerNorm of the sum of three embeddings, ids [...] -> [..., N]; arguments as `ctxfast.ops.embed_layer_norm`."""
    module = importlib.import_module("ctxfast.ops._triton_layer_norm")
    return module.embed_layer_norm(
        input_ids,
        token_type_ids,
        position_ids,
        word_embeddings,
        token_type_embeddings,
        position_embeddings,
        weight,
        bias,
        eps,
    )


def char_cnn_refuses(embedding: Tensor) -> str | None:
    """Why character convolutions cannot run on Triton, or None."""
    reason = available(embedding.device)
    if reason is None and embedding.dtype not in _DTYPES:
        reason = f"no kernel for {embedding.dtype}"
    return reason


elementwise_refuses = char_cnn_refuses  # the device and the dtype decide


def _char_cnn() -> ModuleType:
    return importlib.import_module("ctxfast.ops._triton_char_cnn")


def char_cnn(
    ids: Tensor,
    embedding: Tensor,
    weight: Tensor,
    bias: Tensor,
    widths: list[int],
    counts: list[int],
    activation: str,
) -> Tensor:
    """ids [..., M] -> [..., N]; weight: one filter after another, each [width, C]."""
    return _char_cnn().char_cnn(ids, embedding, weight, bias, widths, counts, activation)


def highway_gate(projected: Tensor, input: Tensor) -> Tensor:
    """projected [..., 2N], input [..., N] -> [..., N]."""
    return _char_cnn().highway_gate(projected, input)


def weighted_sum(layers: Tensor, coefficients: Tensor) -> Tensor:
    """layers [L, ...], coefficients [L] -> [...]."""
    return _char_cnn().weighted_sum(layers, coefficients)


def linear_cross_entropy(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments and results of the registered `ctxfast::linear_cross_entropy`."""
    module = importlib.import_module("ctxfast.ops._triton_cross_entropy")
    return module.linear_cross_entropy(*arguments)


def _linear() -> ModuleType:
    return importlib.import_module("ctxfast.ops._triton_linear")


def linear(*arguments: Any) -> Tensor:
    """The arguments and result of the registered `ctxfast::linear`."""
    return _linear().linear(*arguments)


def linear_activation(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The arguments and results of the registered `ctxfast::linear_activation`."""
    return _linear().linear_activation(*arguments)


def linear_activation_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments and results of the registered `ctxfast::linear_activation_backward`."""
    return _linear().linear_activation_backward(*arguments)
