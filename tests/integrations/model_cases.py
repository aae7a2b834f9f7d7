"""Small models of every family, ragged batches, and the two truths: each sentence alone, and the padded batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

VOCABULARY, PAD = 50, 1
TOLERANCE = 2e-5

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
    "initializer_range": 0.3,
}
# prefix of the classes, name of the model's attribute in a head, fields of the configuration
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _SIZES),
    "roberta": ("Roberta", _SIZES),
    "xlm-roberta": ("XLMRoberta", _SIZES),
    "camembert": ("Camembert", _SIZES),
    "distilbert": (
        "DistilBert",
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 40,
            "pad_token_id": PAD,
            "initializer_range": 0.3,
        },
    ),
    "electra": ("Electra", {**_SIZES, "embedding_size": 20}),
    "mpnet": ("MPNet", _SIZES),
    "albert": (
        "Albert",
        {
            **_SIZES,
            "embedding_size": 20,
            "num_hidden_layers": 4,
            "num_hidden_groups": 2,
            "inner_group_num": 1,
        },
    ),
}
HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForPreTraining",
    "ForNextSentencePrediction",
)
_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout_prob",
    "classifier_dropout",
    "dropout",
    "attention_dropout",
    "qa_dropout",
    "seq_classif_dropout",
    "summary_last_dropout",
)


def build(family: str, head: str = "Model", *, dropout: float = 0.0, **fields: Any) -> nn.Module:
    """A small model with random weights, norms and biases, in evaluation mode; skips heads that a family lacks."""
    prefix, sizes = FAMILIES[family]
    cls = getattr(transformers, f"{prefix}{head}", None)
    if cls is None:
        pytest.skip(f"there is no {prefix}{head}")
    labels = 2 if head in ("ForQuestionAnswering", "ForPreTraining") else 3
    config = cls.config_class(**{**sizes, "num_labels": labels, **fields})
    for name in _DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, dropout)
    torch.manual_seed(0)
    model = cls(config)
    if head == "ForMultipleChoice" and getattr(model.base_model, "pooler", model) is None:
        pytest.skip(f"this transformers gives {prefix}{head} no pooler, which its forward reads")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms are born 0 and 1
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def cases() -> list[tuple[str, str]]:
    """Every family with every head that it has."""
    return [
        (family, head)
        for family, (prefix, _) in FAMILIES.items()
        for head in HEADS
        if hasattr(transformers, f"{prefix}{head}")
    ]


def padding_mask(layout: str) -> Tensor:
    """[4, 9]: where the tokens are."""
    right = torch.arange(9) < torch.tensor([[9], [3], [1], [6]])
    masks = {
        "right": right,
        "left": right.flip(1),
        "holes": torch.tensor(
            [
                [1, 1, 0, 1, 1, 1, 0, 0, 1],
                [0, 1, 1, 0, 1, 0, 0, 0, 0],
                [1, 0, 1, 1, 1, 1, 1, 1, 1],
                [1, 1, 1, 1, 1, 1, 1, 1, 1],
            ]
        ).bool(),
        "ones": torch.ones(4, 9, dtype=torch.bool),
    }
    return masks[layout]


def batch(mask: Tensor, *, pad_ids: bool = True) -> dict[str, Tensor]:
    """Random ids under a mask; `pad_ids=False` leaves other ids in padding."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, VOCABULARY, mask.shape, generator=generator)
    if pad_ids:
        ids = ids.masked_fill(~mask, PAD)
    return {"input_ids": ids, "attention_mask": mask.long()}


def twin(model: nn.Module) -> nn.Module:
    """An independent copy."""
    return copy.deepcopy(model)


def positions_of(model: nn.Module, ids: Tensor) -> Tensor:
    """[B, S]: the position ids that the family gives to these ids."""
    if model.config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        real = ids.ne(PAD)
        return real.cumsum(1) * real + PAD
    return torch.arange(ids.shape[1]).expand(ids.shape)


def alone(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> list[tuple[Tensor, Any]]:
    """What the model gives for each sentence alone: its tokens without padding, at the positions they have.

    MPNet measures distances in columns, so there the columns between the first and the last token stay.
    """
    mask = inputs["attention_mask"].bool()
    extra = {"position_ids": positions_of(model, inputs["input_ids"])}
    if "token_type_ids" in inputs:
        extra["token_type_ids"] = inputs["token_type_ids"]
    outputs = []
    for row in range(len(mask)):
        keep = mask[row].clone()
        if model.config.model_type == "mpnet":
            columns = keep.nonzero()
            keep[int(columns[0]) : int(columns[-1]) + 1] = True
        call = {name: x[row : row + 1, keep] for name, x in extra.items()}
        call["input_ids"] = inputs["input_ids"][row : row + 1, keep]
        call["attention_mask"] = mask[row : row + 1, keep].long()
        outputs.append((mask[row, keep], model(**call, **options)))
    return outputs


def assemble(rows: list[tuple[Tensor, Tensor]], mask: Tensor) -> Tensor:
    """[B, S, ...] from what belongs to the tokens of each sentence alone; zero in padding."""
    result = rows[0][1].new_zeros(*mask.shape, *rows[0][1].shape[1:])
    pieces = torch.cat([values[kept] for kept, values in rows])
    return result.index_put((mask,), pieces)


def close(result: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal within tolerance, relative to the largest expected value where that is above 1."""
    assert result.shape == expected.shape
    scale = max(1.0, expected.detach().abs().max().item()) if expected.numel() else 1.0
    error = (result - expected).abs().max().item() if expected.numel() else 0.0
    assert error <= tolerance * scale, f"error {error:.2e} at scale {scale:.2e}"
