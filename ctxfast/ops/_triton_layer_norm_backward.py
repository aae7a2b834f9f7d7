"""Grids and launches of the kernels in `ctxfast.kernels.layer_norm_bwd`. Imported only where Triton is."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ctxfast.kernels.layer_norm_bwd import (
    add_layer_norm_bwd,
    column_sum,
    embed_layer_norm_bwd,
    segment_sum,
)
from ctxfast.ops._triton_attention import launch
from ctxfast.ops._triton_layer_norm import dropout_arguments, norm_block, norm_rows, norm_warps

# Ranges of rows of the first stage. Fixed, so that the order of every sum depends on the shape alone.
_PARTS = 256
# Parts of a segment where a table has so few rows that one program a row would be few programs.
_SEGMENT_PARTS = 64
_FEW_ROWS = 16
# Tiles of `column_sum` [BLOCK_P, BLOCK_N] and of `segment_sum` [BLOCK_T, SEGMENT_BLOCK_N].
BLOCK_P, BLOCK_N = 32, 64
BLOCK_T, SEGMENT_BLOCK_N = 16, 128
SUM_WARPS = 4


def _ranges(rows: int) -> tuple[int, int]:
    """Rows of a range and the number of ranges."""
    size = max(triton.cdiv(rows, _PARTS), 1)
    return size, triton.cdiv(rows, size)


def add_parts(partial: Tensor, like: Tensor) -> Tensor:
    """float32 [parts, ...] -> [...], in the shape and dtype of `like`."""
    output = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    columns = output.numel()
    launch(
        column_sum,
        triton.cdiv(columns, BLOCK_N),
        output,
        dict(
            partial_ptr=partial,
            output_ptr=output,
            parts=partial.shape[0],
            columns=columns,
            BLOCK_P=BLOCK_P,
            BLOCK_N=BLOCK_N,
            num_warps=SUM_WARPS,
        ),
    )
    return output


def add_layer_norm_backward(
    grad: Tensor,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
    sequence_ids: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, residual, weight and bias; that of residual is empty where it is not its own."""
    features = input.shape[-1]
    rows, grads = norm_rows(input), norm_rows(grad)
    added = None if residual is None else norm_rows(residual)
    dinput = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    own = residual is not None and p > 0.0
    dresidual = torch.empty(input.shape if own else 0, dtype=input.dtype, device=input.device)
    size, parts = _ranges(rows.shape[0])
    partial = torch.empty((2, parts, features), dtype=torch.float32, device=input.device)
    block = norm_block(features)
    launch(
        add_layer_norm_bwd,
        parts,
        dinput,
        dict(
            grad_ptr=grads,
            input_ptr=rows,
            residual_ptr=added,
            weight_ptr=weight.contiguous(),
            dinput_ptr=dinput,
            dresidual_ptr=dresidual if own else None,
            partial_ptr=partial,
            stride_grad=grads.stride(0),
            stride_input=rows.stride(0),
            stride_residual=0 if added is None else added.stride(0),
            eps=eps,
            rows=rows.shape[0],
            rows_per_part=size,
            parts=parts,
            N=features,
            BLOCK_N=block,
            RESIDUAL=added is not None,
            num_warps=norm_warps(block),
            **dropout_arguments(p, seed, sequence_ids, positions),
        ),
    )
    return dinput, dresidual, add_parts(partial[0], weight), add_parts(partial[1], bias)


def _table_gradient(rows: Tensor, ids: Tensor, table: Tensor, skipped: int) -> Tensor:
    """The gradient of a table: for each of its rows the sum of `rows` float32 [T, N] with that id."""
    ordered, order = ids.sort(stable=True)
    bounds = torch.arange(table.shape[0] + 1, dtype=ids.dtype, device=ids.device)
    offsets = torch.searchsorted(ordered, bounds)
    parts = _SEGMENT_PARTS if table.shape[0] <= _FEW_ROWS < ids.numel() else 1
    dtype = table.dtype if parts == 1 else torch.float32
    output = torch.empty((parts, *table.shape), dtype=dtype, device=table.device)
    blocks = triton.cdiv(table.shape[1], SEGMENT_BLOCK_N)
    launch(
        segment_sum,
        parts * table.shape[0] * blocks,
        output,
        dict(
            rows_ptr=rows,
            order_ptr=order,
            offsets_ptr=offsets,
            output_ptr=output,
            table_rows=table.shape[0],
            skipped=skipped,
            parts=parts,
            blocks=blocks,
            N=table.shape[1],
            BLOCK_T=BLOCK_T,
            BLOCK_N=SEGMENT_BLOCK_N,
            num_warps=SUM_WARPS,
        ),
    )
    return output[0] if parts == 1 else add_parts(output, table)


def embed_layer_norm_backward(
    grad: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    padding_idx: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the three tables, weight and bias; padding_idx is -1 for none."""
    features = word.shape[1]
    grads = norm_rows(grad)
    ids = [x.reshape(-1).contiguous() for x in (input_ids, token_type_ids, position_ids)]
    dsum = torch.empty(grads.shape, dtype=torch.float32, device=grad.device)
    size, parts = _ranges(grads.shape[0])
    partial = torch.empty((2, parts, features), dtype=torch.float32, device=grad.device)
    block = norm_block(features)
    launch(
        embed_layer_norm_bwd,
        parts,
        dsum,
        dict(
            grad_ptr=grads,
            ids_ptr=ids[0],
            type_ids_ptr=ids[1],
            position_ids_ptr=ids[2],
            word_ptr=word.contiguous(),
            type_ptr=token_type.contiguous(),
            position_ptr=position.contiguous(),
            weight_ptr=weight.contiguous(),
            dsum_ptr=dsum,
            partial_ptr=partial,
            stride_grad=grads.stride(0),
            words=word.shape[0],
            types=token_type.shape[0],
            positions=position.shape[0],
            eps=eps,
            rows=grads.shape[0],
            rows_per_part=size,
            parts=parts,
            N=features,
            BLOCK_N=block,
            num_warps=norm_warps(block),
        ),
    )
    tables = (word, token_type, position)
    skipped = (padding_idx, -1, -1)
    dword, dtype_table, dposition = (
        _table_gradient(dsum, i, t, s) for i, t, s in zip(ids, tables, skipped, strict=True)
    )
    dweight, dbias = add_parts(partial[0], weight), add_parts(partial[1], bias)
    return dword, dtype_table, dposition, dweight, dbias
