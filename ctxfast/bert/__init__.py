"""BERT (Devlin et al., 2019) under Hugging Face's names: configuration, model, tokenizer, weights in and out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ctxfast.bert.classification import (
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from ctxfast.bert.configuration import BertConfig
from ctxfast.bert.masking import mask_tokens
from ctxfast.bert.model import BertModel
from ctxfast.bert.outputs import BaseModelOutputWithPooling, ModelOutput
from ctxfast.bert.pairs import SentencePair, sentence_pairs
from ctxfast.bert.pretrained import BertPreTrainedModel
from ctxfast.bert.pretraining import (
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
)

if TYPE_CHECKING:
    from ctxfast.bert.batch_encoding import BatchEncoding
    from ctxfast.bert.tokenizer import BertTokenizer

# Loaded on first use, so that models run where the `tokenizers` library is absent.
_TEXT = {
    "BatchEncoding": "ctxfast.bert.batch_encoding",
    "BertTokenizer": "ctxfast.bert.tokenizer",
}

__all__ = [
    "BaseModelOutputWithPooling",
    "BatchEncoding",
    "BertConfig",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "BertPreTrainedModel",
    "BertTokenizer",
    "ModelOutput",
    "SentencePair",
    "mask_tokens",
    "sentence_pairs",
]


def __getattr__(name: str) -> Any:
    if name not in _TEXT:
        raise AttributeError(f"module 'ctxfast.bert' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_TEXT[name]), name)
    globals()[name] = value
    return value
