"""Grids and launches of the layer normalisation kernels in `ctxfast.kernels`. Imported only where Triton is."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ctxfast.kernels.layer_norm import add_layer_norm_fwd, embed_layer_norm_fwd
from ctxfast.ops._triton_attention import launch


def _warps(block: int) -> int:
    return min(max(block // 256, 1), 16)


def _rows(x: Tensor) -> Tensor:
    """[..., N] as [rows, N] with unit stride in the last dimension; a copy only where needed."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def add_layer_norm(
    input: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    features = input.shape[-1]
    output = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    rows = _rows(input)
    added = None if residual is None else _rows(residual)
    block = triton.next_power_of_2(features)
    launch(
        add_layer_norm_fwd,
        rows.shape[0],
        output,
        dict(
            input_ptr=rows,
            residual_ptr=added,
            weight_ptr=weight.contiguous(),
            bias_ptr=bias.contiguous(),
            output_ptr=output,
            stride_input=rows.stride(0),
            stride_residual=0 if added is None else added.stride(0),
            eps=eps,
            N=features,
            BLOCK_N=block,
            RESIDUAL=added is not None,
            num_warps=_warps(block),
        ),
    )
    return output


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
    features = word_embeddings.shape[-1]
    ids = input_ids.contiguous()
    output = word_embeddings.new_empty((*input_ids.shape, features))
    block = triton.next_power_of_2(features)
    launch(
        embed_layer_norm_fwd,
        ids.numel(),
        output,
        dict(
            ids_ptr=ids,
            type_ids_ptr=token_type_ids.expand(ids.shape).contiguous(),
            position_ids_ptr=position_ids.expand(ids.shape).contiguous(),
            word_ptr=word_embeddings.contiguous(),
            type_ptr=token_type_embeddings.contiguous(),
            position_ptr=position_embeddings.contiguous(),
            weight_ptr=weight.contiguous(),
            bias_ptr=bias.contiguous(),
            output_ptr=output,
            words=word_embeddings.shape[0],
            types=token_type_embeddings.shape[0],
            positions=position_embeddings.shape[0],
            eps=eps,
            N=features,
            BLOCK_N=block,
            num_warps=_warps(block),
        ),
    )
    return output
