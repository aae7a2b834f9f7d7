"""Grids and launches of the kernels in `ctxfast.kernels.char_cnn`. Imported only where Triton is."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ctxfast.kernels.char_cnn import char_cnn_fwd, highway_gate_fwd, weighted_sum_fwd
from ctxfast.ops._triton_attention import launch

_BLOCK_FILTERS = 64
_BLOCK = 1024


def char_cnn(
    ids: Tensor,
    embedding: Tensor,
    weight: Tensor,
    bias: Tensor,
    widths: list[int],
    counts: list[int],
    activation: str,
) -> Tensor:
    characters, channels = ids.shape[-1], embedding.shape[1]
    rows = ids.reshape(-1, characters).contiguous()
    output = embedding.new_empty((*ids.shape[:-1], bias.shape[0]))
    flat = output.view(rows.shape[0], bias.shape[0])
    sizes = [n * width * channels for n, width in zip(counts, widths, strict=True)]
    start = 0
    for own, width, count in zip(weight.contiguous().split(sizes), widths, counts, strict=True):
        blocks = triton.cdiv(count, _BLOCK_FILTERS)
        launch(
            char_cnn_fwd,
            rows.shape[0] * blocks,
            output,
            dict(
                ids_ptr=rows,
                embedding_ptr=embedding.contiguous(),
                weight_ptr=own,
                bias_ptr=bias[start : start + count].contiguous(),
                output_ptr=flat[:, start:],
                stride_output=flat.stride(0),
                vocabulary=embedding.shape[0],
                filters=count,
                blocks=blocks,
                CHARACTERS=characters,
                CHANNELS=channels,
                WIDTH=width,
                RELU=activation == "relu",
                BLOCK_P=max(triton.next_power_of_2(characters - width + 1), 16),
                BLOCK_C=max(triton.next_power_of_2(channels), 16),
                BLOCK_F=_BLOCK_FILTERS,
                INPUT_PRECISION="ieee",
                num_warps=4,
            ),
        )
        start += count
    return output


def highway_gate(projected: Tensor, input: Tensor) -> Tensor:
    output = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    columns = input.shape[-1]
    blocks = triton.cdiv(columns, _BLOCK)
    launch(
        highway_gate_fwd,
        input.shape[:-1].numel() * blocks,
        output,
        dict(
            projected_ptr=projected.contiguous(),
            input_ptr=input.contiguous(),
            output_ptr=output,
            columns=columns,
            blocks=blocks,
            BLOCK_N=_BLOCK,
            num_warps=4,
        ),
    )
    return output


def weighted_sum(layers: Tensor, coefficients: Tensor) -> Tensor:
    output = torch.empty(layers.shape[1:], dtype=layers.dtype, device=layers.device)
    launch(
        weighted_sum_fwd,
        triton.cdiv(output.numel(), _BLOCK),
        output,
        dict(
            layers_ptr=layers.contiguous(),
            coefficients_ptr=coefficients.float().contiguous(),
            output_ptr=output,
            size=output.numel(),
            LAYERS=layers.shape[0],
            BLOCK=_BLOCK,
            num_warps=4,
        ),
    )
    return output
