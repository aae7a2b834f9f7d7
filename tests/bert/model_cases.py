"""Models and batches that the tests of BertModel share."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from ctxfast.bert import BertConfig, BertModel

TOLERANCE = 2e-5  # float32, of vectors whose entries are a few units at most
SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
    "initializer_range": 0.3,  # far from linear, so that a missing or wrong step shows
}


def pair(device: str = "cpu", **changes: Any) -> tuple[BertModel, Any]:
    """Our model and transformers' with the same random parameters, in evaluation mode."""
    values = {**SMALL, **changes}
    ours = BertModel(BertConfig(**values)).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("bias") or "LayerNorm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    theirs = transformers.BertModel(transformers.BertConfig(**values)).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def batch(lengths: list[int], width: int, vocabulary: int = 60) -> tuple[Tensor, Tensor]:
    """Random ids [B, S] and a right-padded mask; ids in padding mean nothing."""
    ids = torch.randint(1, vocabulary, (len(lengths), width))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return ids, mask.long()


def assert_valid_equal(
    ours: Tensor, theirs: Tensor, mask: Tensor, tolerance: float = TOLERANCE
) -> None:
    """Close at tokens, zero elsewhere."""
    valid = mask.bool()
    assert ours.shape == theirs.shape
    assert (ours - theirs)[valid].abs().max() <= tolerance
    assert torch.equal(ours[~valid], torch.zeros_like(ours[~valid]))
