"""What the life-cycle tests share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import ctxfast
from tests.integrations.model_cases import batch, padding_mask


def inputs() -> dict[str, Tensor]:
    return batch(padding_mask("right"))


def valid(model: nn.Module, call: dict[str, Tensor] | None = None) -> Tensor:
    """The output at the tokens: the last hidden state, or the logits of a head."""
    call = inputs() if call is None else call
    output = model(**call)
    result = output.logits if "logits" in output else output.last_hidden_state
    return result[call["attention_mask"].bool()] if result.dim() == 3 else result


def notes(model: Any) -> str:
    return "\n".join(ctxfast.explain(model).notes)


def fused(model: Any) -> bool:
    return "2 of 2 layers fused" in notes(model) and "own code" not in notes(model)
