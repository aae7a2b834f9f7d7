"""Grids and launches of the layer normalisation kernels in `ctxfast.kernels`. Imported only where Triton is."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ctxfast.kernels.layer_norm import add_layer_norm_fwd, embed_layer_norm_fwd
from ctxfast.ops._triton_attention import launch


def norm_warps(block: int) -> int:
    return min(max(block // 256, 1), 16)


def norm_rows(x: Tensor) -> Tensor:
    """[..., N] as [rows, N] with unit stride in the last dimension; a copy only where needed."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def dropout_arguments(
    p: float, seed: Tensor | None, sequence_ids: Tensor | None, positions: Tensor | None
) -> dict[str, Any]:
    """What the kernels take for hidden dropout of rows with these coordinates."""
    if seed is None or sequence_ids is None or positions is None:
        pointers = dict.fromkeys(("seed_ptr", "sequence_ptr", "position_ptr"))
        return dict(pointers, threshold=0, keep_scale=1.0, DROPOUT=False)
    threshold = int(p * 65536 + 0.5)
    nothing = threshold == 65536
    return dict(
        seed_ptr=seed,
        sequence_ptr=sequence_ids.reshape(-1).long().contiguous(),
        position_ptr=positions.reshape(-1).long().contiguous(),
        threshold=0 if nothing else threshold,
        keep_scale=0.0 if nothing else 65536 / (65536 - threshold),
        DROPOUT=True,
    )


def norm_block(features: int) -> int:
    """Features that one program holds: a power of two, whole blocks of the dropout generator."""
    return max(triton.next_power_of_2(features), 64)


def add_layer_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    features = input.shape[-1]
    output = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    rows = norm_rows(input)
    added = None if residual is None else norm_rows(residual)
    block = norm_block(features)
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
            **dropout_arguments(p, seed, sequence_ids, positions),
            num_warps=norm_warps(block),
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
    block = norm_block(features)
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
            num_warps=norm_warps(block),
        ),
    )
    return output
