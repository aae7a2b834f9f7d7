"""BERT with heads beside transformers': the same parameters, batches with labels, losses and gradients compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ctxfast import bert
from tests.bert.model_cases import SMALL, TOLERANCE

HEADS = (
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "BertForMultipleChoice",
)
POOLED = {
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForMultipleChoice",
}
CHOICES = 3


def pair(name: str, **changes: Any) -> tuple[Any, Any]:
    """Our model and transformers' with the same random parameters, no bias zero, in evaluation mode."""
    values = {**SMALL, **changes}
    ours = getattr(bert, name)(bert.BertConfig(**values)).eval()
    with torch.no_grad():
        for parameter_name, parameter in ours.named_parameters():
            if parameter_name.endswith("bias") or "LayerNorm" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    sparse = values.pop("sparse_prediction", None)
    theirs = getattr(transformers, name)(transformers.BertConfig(**values)).eval()
    theirs.load_state_dict(ours.state_dict())
    assert sparse is None or ours.config.sparse_prediction == sparse
    return ours, theirs


@dataclass
class Example:
    """Arguments of a forward: inputs, labels, and the valid tokens [B, S] (of all choices in one)."""

    inputs: dict[str, Tensor]
    labels: dict[str, Tensor]
    valid: Tensor
    lengths: list[int] = field(default_factory=list)

    def arguments(self, **changes: Any) -> dict[str, Any]:
        return {**self.inputs, **self.labels, **changes}


def example(
    name: str, lengths: list[int], width: int, *, num_labels: int = 2, vocabulary: int = 60
) -> Example:
    """A right-padded batch of random ids and token types, with labels for a head at valid tokens."""
    if name == "BertForMultipleChoice":
        lengths = [n for n in lengths for _ in range(CHOICES)]
        lengths[1::2] = [max(1, n - 1) for n in lengths[1::2]]
    count = len(lengths)
    valid = torch.arange(width) < torch.tensor(lengths)[:, None]
    inputs = {
        "input_ids": torch.randint(1, vocabulary, (count, width)),
        "attention_mask": valid.long(),
        "token_type_ids": torch.randint(2, (count, width)),
    }
    words = torch.randint(vocabulary, (count, width))
    words = words.masked_fill(~valid | (torch.rand(count, width) < 0.6), -100)
    words[0, 0] = 0  # a label like any other, though it is the id of [PAD]
    labels: dict[str, Tensor] = {
        "BertForPreTraining": {
            "labels": words,
            "next_sentence_label": torch.randint(2, (count,)),
        },
        "BertForMaskedLM": {"labels": words},
        "BertForNextSentencePrediction": {"labels": torch.randint(2, (count,))},
        "BertForSequenceClassification": {"labels": torch.randint(num_labels, (count,))},
        "BertForTokenClassification": {"labels": words.clamp(max=num_labels - 1)},
        "BertForQuestionAnswering": {
            "start_positions": torch.tensor([torch.randint(n, ()) for n in lengths]),
            "end_positions": torch.tensor([torch.randint(n, ()) for n in lengths]),
        },
        "BertForMultipleChoice": {"labels": torch.randint(CHOICES, (count // CHOICES,))},
    }[name]
    if name == "BertForMultipleChoice":
        inputs = {key: x.unflatten(0, (-1, CHOICES)) for key, x in inputs.items()}
    return Example(inputs, labels, valid, lengths)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter that takes part."""
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(
    ours: Tensor, theirs: Tensor, name: str = "", tolerance: float = TOLERANCE
) -> None:
    """Close in units of the largest value, at least 1."""
    assert ours.shape == theirs.shape, name
    if not theirs.numel():
        return
    error = (ours - theirs).abs().max()
    assert error <= tolerance * theirs.abs().max().clamp(min=1.0), f"{name}: {error:.2e}"


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, name, 5e-5)


def assert_same_outputs(ours: Any, theirs: Any, valid: Tensor) -> None:
    """Every field; fields of tokens at valid tokens, with zeros, or for spans the lowest value, elsewhere."""
    assert list(ours) == list(theirs)
    for name in theirs:
        if isinstance(theirs[name], tuple):
            assert len(ours[name]) == len(theirs[name]), name
            continue
        mine, other = ours[name], theirs[name]
        if mine.shape[:2] == valid.shape:
            rest = torch.finfo(mine.dtype).min if name in ("start_logits", "end_logits") else 0.0
            assert mine[~valid].eq(rest).all(), name
            mine, other = mine[valid], other[valid]
        assert_close(mine, other, name)
