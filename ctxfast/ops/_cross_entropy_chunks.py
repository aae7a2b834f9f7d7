"""The loss of a language model's head, a bounded number of labelled rows at a time.

Each chunk of rows takes one product for its logits. Where gradients are wanted they come at once from the logits that
are there, two more products, as in Liger Kernel (Hsu et al., 2024): keeping only the log-sum-exp and computing logits
again in the backward pass would take four products instead of three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Elements of the buffer of logits: 128 MiB in float32, 1,088 rows of BERT's vocabulary.
_BUFFER = 1 << 25
# Columns of the vocabulary whose weight gradient is added to the sum at a time: 24 MiB at 768 features.
_BLOCK = 8192

Wanted = tuple[bool, bool, bool]  # gradients of hidden, weight, bias
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x, w, b) -> x @ w^T + b
Softmax = Callable[[Tensor, Tensor, Any, bool], Tensor]  # `_native_linear.cross_entropy_`


def rows_per_chunk(vocabulary: int) -> int:
    """Rows whose logits fit the buffer, a multiple of 16 where more than 16 do."""
    rows = max(1, _BUFFER // max(vocabulary, 1))
    return rows - rows % 16 if rows > 16 else rows


def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    wanted: Wanted,
    logits_of: Product,
    product: Product,
    softmax: Softmax,
    every_row: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss [] of hidden [T, K], weight [V, K], labels [T], and the wanted gradients, empty where not wanted.

    every_row: compute the rows without a label as well, for a softmax that ignores them; no size then depends on data.
    """
    count: Any  # of labels
    if every_row:
        ignored = labels == ignore_index
        labelled = torch.arange(labels.shape[0], device=labels.device)
        x = hidden.masked_fill(ignored.unsqueeze(1), 0.0)  # 0 times a NaN there would be a NaN
        y, count = labels.long(), (~ignored).sum()
    else:
        labelled = (labels != ignore_index).nonzero().squeeze(1)
        x, y = hidden.index_select(0, labelled), labels.index_select(0, labelled).long()
        count = x.shape[0]
    total, vocabulary = x.shape[0], weight.shape[0]
    step = rows_per_chunk(vocabulary)
    losses = []
    parts = []
    dweight = dbias = None
    for start in range(0, total, step):
        rows = x[start : start + step]
        logits = logits_of(rows, weight, bias)
        losses.append(softmax(logits, y[start : start + step], 1.0 / count, any(wanted)))
        if wanted[0]:
            parts.append(product(logits, weight.t(), None))
        if wanted[1]:
            if total <= step:
                dweight = product(logits.t(), rows.t(), None)
            else:
                dweight = _accumulate(dweight, logits, rows, product)
        if wanted[2]:
            column_sums = logits.sum(0, dtype=losses[-1].dtype)
            dbias = column_sums if dbias is None else dbias.add_(column_sums)
    empty = hidden.new_empty(0)
    dhidden = (
        torch.zeros_like(hidden, memory_format=torch.contiguous_format) if wanted[0] else empty
    )
    if parts:
        dhidden.index_copy_(0, labelled, torch.cat(parts))
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    loss = (
        (torch.cat(losses).sum(dtype=torch.float64) / count).to(wide)
        if losses
        else hidden.new_full((), torch.nan, dtype=wide)
    )
    return (
        loss,
        dhidden,
        _finish(dweight, weight) if wanted[1] else empty,
        _finish(dbias, weight[:, 0]) if wanted[2] else empty,
    )


def _accumulate(total: Tensor | None, logits: Tensor, rows: Tensor, product: Product) -> Tensor:
    """total + dlogits^T @ rows, in float32 for narrower types."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    if total is None:
        total = rows.new_zeros((logits.shape[1], rows.shape[1]), dtype=wide)
    for start in range(0, logits.shape[1], _BLOCK):
        block = logits[:, start : start + _BLOCK]
        total[start : start + _BLOCK] += product(block.t(), rows.t(), None)
    return total


def _finish(gradient: Tensor | None, like: Tensor) -> Tensor:
    if gradient is None:  # no row has a label
        return like.new_zeros(like.shape)
    return gradient.to(like.dtype)
