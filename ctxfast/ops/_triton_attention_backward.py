"""Grids and launches of the attention backward: one launch where the keys of a sequence fit one block, else three."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ctxfast.kernels import attention_tables
from ctxfast.kernels.attention_bwd_bias import attention_bwd_bias, attention_bwd_bias_sum
from ctxfast.kernels.attention_bwd_key import attention_bwd_key
from ctxfast.kernels.attention_bwd_query import attention_bwd_delta, attention_bwd_query
from ctxfast.kernels.attention_tables import GRANULE
from ctxfast.ops._triton_attention import Problem, launch, row_strides, with_rows

_BIAS_PROGRAMS = (
    512  # how many programs a bias gradient is spread over at least, where its sums are long enough
)
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def backward(
    problem: Problem,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor,
    lse: Tensor,
    needs_bias_grad: bool,
) -> Gradients:
    """Gradients of query, key, value and bias (an empty tensor where it is not needed)."""
    if (
        problem.dropout_p > 0.0 and problem.drop[1] == 0.0
    ):  # no weight is kept: only lse has a gradient
        problem.dropout_p, grad_output = 0.0, torch.zeros_like(grad_output)
    grad_output = with_rows(grad_output)
    lse = lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    dq = problem.empty_like_rows(problem.query)
    dk = problem.empty_like_rows(problem.key)
    dv = problem.empty_like_rows(problem.value)
    one_block = attention_tables.one_block_launch(
        problem.arch, problem.dtype, problem.features, problem.max_seqlen_k
    )
    dbias = dq.new_empty(0)
    if one_block is not None:
        _one_block(problem, one_block, grad_output, grad_lse, lse, dq, dk, dv)
    if one_block is None or needs_bias_grad:
        delta, shifted = _delta(problem, grad_output, grad_lse, with_rows(output), lse)
        if one_block is None:
            _split(problem, grad_output, shifted, delta, dq, dk, dv)
        if needs_bias_grad:
            dbias = _bias(problem, grad_output, shifted, delta)
    if problem.sign != 1.0:
        dq = dq * problem.sign
    return dq, dk, dv, dbias


def _delta(
    problem: Problem, grad_output: Tensor, grad_lse: Tensor | None, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    delta, shifted = torch.empty_like(lse), torch.empty_like(lse)
    table = attention_tables.delta_launch(problem.features)
    programs, tiles = problem.query_programs(table.block_m)
    names = ("cu_seqlens_q_ptr", "keep_scale", "rows_q", "num_heads", "num_sequences")
    launch(
        attention_bwd_delta,
        programs,
        output,
        dict(
            do_ptr=grad_output,
            output_ptr=output,
            lse_ptr=lse,
            grad_lse_ptr=grad_lse,
            delta_ptr=delta,
            shifted_lse_ptr=shifted,
            tile_ptr=tiles,
            **{name: problem.arguments[name] for name in names},
            **row_strides(grad_output, "do", problem.varlen),
            **row_strides(output, "o", problem.varlen),
            **problem.lse_strides(),
            HEAD_DIM=problem.features.head_dim,
            BLOCK_D=problem.features.block_d,
            BLOCK_M=table.block_m,
            GRANULE=GRANULE,
            VARLEN=problem.varlen,
            BIAS=problem.features.bias,
            num_warps=table.num_warps,
        ),
    )
    return delta, shifted


def _one_block(
    problem: Problem,
    table: attention_tables.Launch,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    programs = problem.num_sequences * problem.heads
    if problem.varlen:
        programs += -(-max(problem.rows_q, problem.rows_k) // GRANULE)
    launch(
        attention_bwd_key,
        programs,
        dq,
        dict(
            do_ptr=grad_output,
            dq_ptr=dq,
            dk_ptr=dk,
            dv_ptr=dv,
            lse_ptr=lse,
            delta_ptr=grad_lse,
            tile_ptr=None,
            GRANULE=GRANULE,
            ONE_BLOCK=True,
            **row_strides(grad_output, "do", problem.varlen),
            **row_strides(dq, "dq", problem.varlen),
            **row_strides(dk, "dk", problem.varlen),
            **problem.lse_strides(),
            **problem.arguments,
            **table.constants(),
            **table.options(),
        ),
    )


def _split(
    problem: Problem,
    grad_output: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    shared = dict(
        do_ptr=grad_output,
        lse_ptr=lse,
        delta_ptr=delta,
        GRANULE=GRANULE,
        **row_strides(grad_output, "do", problem.varlen),
        **problem.lse_strides(),
        **problem.arguments,
    )
    table = attention_tables.query_launch(problem.arch, problem.dtype, problem.features)
    programs, tiles = problem.query_programs(table.block_m)
    launch(
        attention_bwd_query,
        programs,
        dq,
        dict(
            dq_ptr=dq,
            tile_ptr=tiles,
            **row_strides(dq, "dq", problem.varlen),
            **shared,
            **table.constants(),
            **table.options(),
        ),
    )
    table = attention_tables.key_launch(problem.arch, problem.dtype, problem.features)
    programs, tiles = problem.key_programs(table.block_n)
    launch(
        attention_bwd_key,
        programs,
        dk,
        dict(
            dq_ptr=None,
            dk_ptr=dk,
            dv_ptr=dv,
            tile_ptr=tiles,
            ONE_BLOCK=False,
            **row_strides(dk, "dq", problem.varlen),
            **row_strides(dk, "dk", problem.varlen),
            **shared,
            **table.constants(),
            **table.options(),
        ),
    )


def _bias(problem: Problem, grad_output: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    assert problem.bias is not None
    table = attention_tables.bias_launch(problem.arch, problem.dtype, problem.features)
    sizes = (problem.num_sequences, problem.heads, problem.max_seqlen_q, problem.max_seqlen_k)
    tiles = (*sizes[:2], -(-sizes[2] // table.block_m), -(-sizes[3] // table.block_n))
    dims = list(zip(problem.bias.shape, tiles, strict=True))
    # A dimension of one is not summed where one tile is all there is.
    is_summed = [size == 1 for size, _ in dims]
    own = math.prod(count for size, count in dims if size != 1)
    summed = math.prod(count for size, count in dims if size == 1)
    dbias = problem.bias.new_zeros(problem.bias.shape)
    if own * summed == 0:
        return dbias
    chunk_size = -(-summed // max(1, min(summed, _BIAS_PROGRAMS // own)))
    chunks = -(-summed // chunk_size)
    partial = dbias
    if chunks > 1:
        partial = dbias.new_empty((chunks, *dbias.shape), dtype=torch.float32)
    launch(
        attention_bwd_bias,
        chunks * own,
        dbias,
        dict(
            do_ptr=grad_output,
            dbias_ptr=partial,
            lse_ptr=lse,
            delta_ptr=delta,
            seqlen_q=sizes[2],
            seqlen_k=sizes[3],
            summed=summed,
            chunk_size=chunk_size,
            **row_strides(grad_output, "do", problem.varlen),
            **problem.lse_strides(),
            **problem.arguments,
            **{f"SUM_{name}": flag for name, flag in zip("BHMN", is_summed, strict=True)},
            **table.constants(),
            **table.options(),
        ),
    )
    if chunks > 1:
        block = 1024
        launch(
            attention_bwd_bias_sum,
            -(-dbias.numel() // block),
            dbias,
            dict(
                partial_ptr=partial,
                dbias_ptr=dbias,
                count=dbias.numel(),
                chunks=chunks,
                BLOCK=block,
            ),
        )
    return dbias
