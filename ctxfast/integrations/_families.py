"""The encoders of transformers that can be accelerated, and where each keeps its parts.

A family is a table: names of classes, paths of submodules. transformers itself is never imported here; a model that
exists has brought its module along.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class LayerTable:
    """Where the parts of one layer lie: paths below the layer, None where there is no such part.

    classes: path -> name of the stock class, for everything but torch's own modules
    sampler: the module whose `training` switches attention dropout on
    """

    classes: dict[str, str]
    attention: str
    query: str
    key: str
    value: str
    attention_dropout: str
    sampler: str
    attention_output: str
    attention_output_dropout: str | None
    attention_norm: str
    intermediate: str
    activation: str
    output: str
    output_dropout: str | None
    output_norm: str
    heads: str = "num_attention_heads"

    def linears(self) -> tuple[str, ...]:
        names = "query", "key", "value", "attention_output", "intermediate", "output"
        return tuple(getattr(self, name) for name in names)


@dataclass(frozen=True)
class Family:
    """One model type.

    model, embeddings, encoder: names of the stock classes of the model, its embedding and its stack of layers
    positions:  "grid": positions count columns; "ids": they count ids other than padding, from padding_idx + 1
    projection: path below the model of the linear layer between embeddings and layers
    arguments:  how the model calls its embeddings: (positional, by name)
    output:     the class of transformers.modeling_outputs that the model returns
    """

    name: str
    model: str
    embeddings: str
    encoder: str
    layer: LayerTable
    encoder_path: str = "encoder"
    layers_path: str = "encoder.layer"
    positions: str = "grid"
    projection: str | None = None
    relative_bias: bool = False
    arguments: tuple[tuple[str, ...], tuple[str, ...]] = (
        (),
        ("input_ids", "position_ids", "token_type_ids", "inputs_embeds"),
    )
    output: str = "BaseModelOutputWithPoolingAndCrossAttentions"

    @property
    def module(self) -> str:
        return f"transformers.models.{self.name}.modeling_{self.name}"

    def stock(self, name: str) -> type[nn.Module] | None:
        """A class of this family's module, None where transformers has not loaded it."""
        return getattr(sys.modules.get(self.module), name, None)


def _bert_layer(prefix: str) -> LayerTable:
    return LayerTable(
        classes={
            "": f"{prefix}Layer",
            "attention": f"{prefix}Attention",
            "attention.self": f"{prefix}SelfAttention",
            "attention.output": f"{prefix}SelfOutput",
            "intermediate": f"{prefix}Intermediate",
            "output": f"{prefix}Output",
        },
        attention="attention.self",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        attention_dropout="attention.self.dropout",
        sampler="attention.self",
        attention_output="attention.output.dense",
        attention_output_dropout="attention.output.dropout",
        attention_norm="attention.output.LayerNorm",
        intermediate="intermediate.dense",
        activation="intermediate.intermediate_act_fn",
        output="output.dense",
        output_dropout="output.dropout",
        output_norm="output.LayerNorm",
    )


def _bert_like(name: str, prefix: str, **fields: Any) -> Family:
    return Family(
        name,
        f"{prefix}Model",
        f"{prefix}Embeddings",
        f"{prefix}Encoder",
        _bert_layer(prefix),
        **fields,
    )


_DISTILBERT = LayerTable(
    classes={"": "TransformerBlock", "attention": "DistilBertSelfAttention", "ffn": "FFN"},
    attention="attention",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_dropout="attention.dropout",
    sampler="attention",
    attention_output="attention.out_lin",
    attention_output_dropout=None,
    attention_norm="sa_layer_norm",
    intermediate="ffn.lin1",
    activation="ffn.activation",
    output="ffn.lin2",
    output_dropout="ffn.dropout",
    output_norm="output_layer_norm",
    heads="n_heads",
)
_MPNET = LayerTable(
    classes={
        "": "MPNetLayer",
        "attention": "MPNetAttention",
        "attention.attn": "MPNetSelfAttention",
        "intermediate": "MPNetIntermediate",
        "output": "MPNetOutput",
    },
    attention="attention.attn",
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    attention_dropout="attention.attn.dropout",
    sampler="attention.attn.dropout",
    attention_output="attention.attn.o",
    attention_output_dropout="attention.dropout",
    attention_norm="attention.LayerNorm",
    intermediate="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    output="output.dense",
    output_dropout="output.dropout",
    output_norm="output.LayerNorm",
)
_ALBERT = LayerTable(
    classes={"": "AlbertLayer", "attention": "AlbertAttention"},
    attention="attention",
    query="attention.query",
    key="attention.key",
    value="attention.value",
    attention_dropout="attention.attention_dropout",
    sampler="attention",
    attention_output="attention.dense",
    attention_output_dropout="attention.output_dropout",
    attention_norm="attention.LayerNorm",
    intermediate="ffn",
    activation="activation",
    output="ffn_output",
    output_dropout=None,
    output_norm="full_layer_layer_norm",
)

FAMILIES = (
    _bert_like("bert", "Bert"),
    _bert_like("roberta", "Roberta", positions="ids"),
    _bert_like("xlm_roberta", "XLMRoberta", positions="ids"),
    _bert_like("camembert", "Camembert", positions="ids"),
    _bert_like(
        "electra",
        "Electra",
        projection="embeddings_project",
        output="BaseModelOutputWithPastAndCrossAttentions",
    ),
    Family(
        "distilbert",
        "DistilBertModel",
        "Embeddings",
        "Transformer",
        _DISTILBERT,
        encoder_path="transformer",
        layers_path="transformer.layer",
        arguments=(("input_ids", "inputs_embeds", "position_ids"), ()),
        output="BaseModelOutput",
    ),
    Family(
        "mpnet",
        "MPNetModel",
        "MPNetEmbeddings",
        "MPNetEncoder",
        _MPNET,
        positions="ids",
        relative_bias=True,
        arguments=((), ("input_ids", "position_ids", "inputs_embeds")),
        output="BaseModelOutputWithPooling",
    ),
    Family(
        "albert",
        "AlbertModel",
        "AlbertEmbeddings",
        "AlbertTransformer",
        _ALBERT,
        layers_path="encoder.albert_layer_groups",
        projection="encoder.embedding_hidden_mapping_in",
        arguments=(("input_ids",), ("position_ids", "token_type_ids", "inputs_embeds")),
        output="BaseModelOutputWithPooling",
    ),
)
SUPPORTED = "BERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT, ELECTRA, MPNet and ALBERT"


def family_of(cls: type) -> Family | None:
    """The family whose model `cls` is or extends."""
    for family in FAMILIES:
        stock = family.stock(family.model)
        if stock is not None and issubclass(cls, stock):
            return family
    return None


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    """The module at `path`, or None; cheaper than `get_submodule`."""
    for name in path.split(".") if path else ():
        found = module._modules.get(name)
        if found is None:
            return None
        module = found
    return module
