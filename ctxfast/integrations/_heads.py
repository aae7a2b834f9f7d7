"""Heads of transformers on an unpadded encoder: what in them would see the padding is told where it lies."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxfast.integrations._first_tokens import first_token_first
from ctxfast.integrations._swap import call_arguments, state_of, stock_forward


def _padding(model: Any, call: dict[str, Any] | None) -> Tensor | None:
    """bool [B, S], true at padding, None where the head runs as it is."""
    if call is None or not state_of(model).options.unpad or torch.compiler.is_exporting():
        return None
    mask = call.get("attention_mask")
    return mask == 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def token_head(model: Any, *args: Any, **kwargs: Any) -> Any:
    """A head with one label a token: labels in padding count as -100."""
    call = call_arguments(model, args, kwargs)
    padding = _padding(model, call)
    labels = None if call is None else call.get("labels")
    if padding is None or not isinstance(labels, Tensor) or labels.shape != padding.shape:
        return stock_forward(model, *args, **kwargs)
    assert call is not None
    return stock_forward(model, **{**call, "labels": labels.masked_fill(padding, -100)})


def sequence_head(model: Any, *args: Any, **kwargs: Any) -> Any:
    """A head that reads the first column: the encoder puts the first token there."""
    if not state_of(model).options.unpad:
        return stock_forward(model, *args, **kwargs)
    with first_token_first(model):
        return stock_forward(model, *args, **kwargs)


def span_head(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Question answering: logits in padding are the lowest value, so that neither answer nor loss lies there."""
    call = call_arguments(model, args, kwargs)
    padding = _padding(model, call)
    if padding is None:
        return stock_forward(model, *args, **kwargs)
    assert call is not None
    wanted = call.pop("return_dict", None)
    starts, ends = call.pop("start_positions", None), call.pop("end_positions", None)
    output = stock_forward(model, **call, return_dict=True)
    lowest = torch.finfo(output.start_logits.dtype).min
    output["start_logits"] = output.start_logits.masked_fill(padding, lowest)
    output["end_logits"] = output.end_logits.masked_fill(padding, lowest)
    if starts is not None and ends is not None:
        losses = [
            _span_loss(output.start_logits, starts, padding),
            _span_loss(output.end_logits, ends, padding),
        ]
        output = type(output)(**{**output, "loss": (losses[0] + losses[1]) / 2})
    wanted = model.config.return_dict if wanted is None else wanted
    return output if wanted else output.to_tuple()


def _span_loss(logits: Tensor, positions: Tensor, padding: Tensor) -> Tensor:
    """Cross entropy over the text. A position beyond the grid, or in padding, counts for nothing."""
    beyond = logits.shape[1]
    positions = (positions.squeeze(-1) if positions.dim() > 1 else positions).clamp(0, beyond)
    unknown = F.pad(padding, (0, 1), value=True).gather(1, positions[:, None]).squeeze(1)
    return F.cross_entropy(logits, positions.masked_fill(unknown, beyond), ignore_index=beyond)
