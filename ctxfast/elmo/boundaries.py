"""Begin and end of sentence: put around the tokens of each row, and taken off again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def add_sentence_boundary_token_ids(
    tensor: Tensor, mask: Tensor, sentence_begin_token: Any, sentence_end_token: Any
) -> tuple[Tensor, Tensor]:
    """Rows of n tokens become begin, tokens, end.

    tensor: ids [B, T], or ids or vectors [B, T, N];  mask: [B, T], n true values in each row, at its beginning
    sentence_begin_token, sentence_end_token: a number for [B, T], a tensor [N] otherwise

    Returns [B, T + 2] or [B, T + 2, N], zero behind the end, and the mask [B, T + 2], bool.
    """
    lengths = mask.bool().sum(1)
    batch, size = tensor.shape[:2]
    result = tensor.new_zeros((batch, size + 2, *tensor.shape[2:]))
    if tensor.dim() not in (2, 3):
        raise ValueError(
            f"add_sentence_boundary_token_ids: tensor must be [B, T] or [B, T, N], got shape {tuple(tensor.shape)}"
        )
    result[:, 1:-1] = tensor
    rows = torch.arange(batch, device=tensor.device)
    result[:, 0] = sentence_begin_token
    end = torch.as_tensor(sentence_end_token, dtype=tensor.dtype, device=tensor.device)
    result[rows, lengths + 1] = end.expand(batch, *tensor.shape[2:])
    positions = torch.arange(size + 2, device=tensor.device)
    return result, positions < (lengths + 2).unsqueeze(1)


def remove_sentence_boundaries(tensor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens between begin and end of each row.

    tensor: [B, T, N];  mask: [B, T], true from the begin to the end of a row

    Returns [B, T - 2, N], zero behind the tokens, and their mask, bool. Rows without tokens are empty.
    """
    lengths = (mask.bool().sum(1) - 2).clamp(min=0)
    size = max(tensor.shape[1] - 2, 0)
    inner = torch.arange(size, device=tensor.device) < lengths.unsqueeze(1)
    tokens = tensor[:, 1 : 1 + size]
    return tokens.masked_fill(~inner.unsqueeze(-1), 0.0), inner
