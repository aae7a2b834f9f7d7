"""BERT (Devlin et al., 2019) under Hugging Face's names: configuration, model, tokenizer, weights in and out."""

from ctxfast.bert.configuration import BertConfig
from ctxfast.bert.model import BertModel
from ctxfast.bert.outputs import BaseModelOutputWithPooling, ModelOutput
from ctxfast.bert.pretrained import BertPreTrainedModel
from ctxfast.bert.tokenizer import BertTokenizer

__all__ = [
    "BaseModelOutputWithPooling",
    "BertConfig",
    "BertModel",
    "BertPreTrainedModel",
    "BertTokenizer",
    "ModelOutput",
]
