"""Which classes of transformers are accelerated, and by which forward."""

from __future__ import annotations

from typing import Any

from ctxfast.integrations._encoder import encoder_forward
from ctxfast.integrations._families import FAMILIES, family_of
from ctxfast.integrations._heads import sequence_head, span_head, token_head

_HEADS = {
    "ForQuestionAnswering": span_head,
    "ForMaskedLM": token_head,
    "ForTokenClassification": token_head,
    "ForPreTraining": token_head,
    "ForSequenceClassification": sequence_head,
    "ForMultipleChoice": sequence_head,
}
# ELECTRA's discriminator reads the mask itself.
_AS_THEY_ARE = ("ElectraForPreTraining",)
_MODULES = {family.module for family in FAMILIES}


def head_forward(cls: type) -> Any:
    """The forward of an accelerated head, None for classes that are none or have a forward of their own."""
    for stock in cls.__mro__:
        if stock.__module__ in _MODULES and cls.forward is stock.__dict__.get("forward"):  # type: ignore[attr-defined]
            for suffix, forward in _HEADS.items():
                if stock.__name__.endswith(suffix) and stock.__name__ not in _AS_THEY_ARE:
                    return forward
    return None


def model_forward(cls: type) -> Any:
    """The forward of an accelerated encoder, None for classes that are none or have a forward of their own."""
    family = family_of(cls)
    if family is None:
        return None
    stock = family.stock(family.model)
    return encoder_forward if cls.forward is stock.forward else None  # type: ignore[attr-defined,union-attr]


def forward_for(cls: type) -> Any:
    """The forward that replaces the one of `cls`, or None."""
    return model_forward(cls) or head_forward(cls)
