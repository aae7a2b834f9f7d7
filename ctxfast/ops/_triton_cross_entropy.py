"""Products and launches of the loss of a language model's head on a GPU. Imported only where Triton is.

The products are cuBLAS's. Rows of logits start at multiples of 16 elements: with BERT's 30,522 columns side by side,
neither cuBLAS nor the kernel could move 16 bytes at a time.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ctxfast.kernels.cross_entropy import cross_entropy
from ctxfast.ops import _cross_entropy_chunks
from ctxfast.ops._triton_attention import launch

_ALIGNMENT = 16
_LARGEST_BLOCK = 4096


def block(columns: int) -> int:
    """Columns that a program reads at a time."""
    return min(max(triton.next_power_of_2(columns), 64), _LARGEST_BLOCK)


def warps(size: int) -> int:
    return min(max(size // 512, 1), 8)


def logits(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows @ weight^T + bias, [M, V]; a row and its padding are one aligned stretch of memory."""
    columns = weight.shape[0]
    width = -(-columns // _ALIGNMENT) * _ALIGNMENT
    output = torch.empty((rows.shape[0], width), dtype=rows.dtype, device=rows.device)
    output = output[:, :columns]
    if bias is None:
        return torch.mm(rows, weight.t(), out=output)
    return torch.addmm(bias, rows, weight.t(), out=output)


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    gradient: bool,
    *,
    ignore_index: int,
) -> Tensor:
    """The loss of every row of logits [M, V], as the function `logits` made them; labels int64 [M].

    With gradient, logits become (softmax - one_hot) * scale, and 0 in rows without a label.
    """
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=torch.float32, device=logits.device)
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    size = block(logits.shape[1])
    launch(
        cross_entropy,
        logits.shape[0],
        losses,
        dict(
            logits_ptr=logits,
            labels_ptr=labels.contiguous(),
            losses_ptr=losses,
            scale_ptr=scale.float(),
            stride_logits=logits.stride(0),
            ignore_index=ignore_index,
            columns=logits.shape[1],
            BLOCK=size,
            GRADIENT=gradient,
            num_warps=warps(size),
        ),
    )
    return losses


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded, into which no number that the data decide can enter."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    of_hidden: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and wanted gradients; arguments as `ctxfast::linear_cross_entropy`."""
    return _cross_entropy_chunks.loss_and_gradients(
        hidden,
        weight,
        bias,
        labels,
        ignore_index,
        (of_hidden, of_weight, of_bias),
        logits,
        F.linear,
        functools.partial(cross_entropy_, ignore_index=ignore_index),
        every_row=capturing(hidden.device),
    )
