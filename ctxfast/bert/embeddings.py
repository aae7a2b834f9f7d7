"""BERT's input layer: word, token type and position vectors, their sum normalised (Devlin et al., 2019, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxfast import ops, reference
from ctxfast.bert.configuration import BertConfig
from ctxfast.bert.inputs import PackedInputs, coordinates
from ctxfast.nn.fusion import parameter_of, submodules


class BertEmbeddings(nn.Module):
    """T packed tokens -> [T, H]. The names of the parameters are those of transformers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = _embedding(config.vocab_size, size, config.pad_token_id)
        self.position_embeddings = _embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = _embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, inputs: PackedInputs) -> Tensor:
        parts = submodules(self)
        norm = parts["LayerNorm"]
        weight, bias = parameter_of(norm, "weight"), parameter_of(norm, "bias")
        names = ("word_embeddings", "token_type_embeddings", "position_embeddings")
        words, types, positions = (parameter_of(parts[name], "weight") for name in names)
        if inputs.input_ids is not None:
            x = ops.embed_layer_norm(
                inputs.input_ids,
                inputs.token_type_ids,
                inputs.position_ids,
                words,
                types,
                positions,
                weight,
                bias,
                norm.eps,
                padding_idx=parts["word_embeddings"].padding_idx,
            )
        else:
            assert inputs.inputs_embeds is not None
            x = inputs.inputs_embeds + _lookup("token_type_ids", inputs.token_type_ids, types)
            x = x + _lookup("position_ids", inputs.position_ids, positions)
            x = ops.add_layer_norm(x, None, weight, bias, norm.eps)
        drop = parts["dropout"]
        if not drop.training or drop.p == 0.0:
            return x
        return dropout(x, drop.p, *coordinates(inputs.batch, x.shape[0]))


def _embedding(rows: int, size: int, padding_idx: int | None = None) -> nn.Embedding:
    """A table without values: the model draws them."""
    table = torch.empty(rows, size)
    return nn.Embedding.from_pretrained(table, freeze=False, padding_idx=padding_idx)


def _lookup(name: str, ids: Tensor, table: Tensor) -> Tensor:
    if ids.device.type == "cpu" and ids.numel():
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= table.shape[0]:
            raise ValueError(
                f"BertModel: {name} must be in [0, {table.shape[0]}), got {low if low < 0 else high}"
            )
    return F.embedding(ids, table)


def dropout(x: Tensor, p: float, sequence_ids: Tensor, positions: Tensor) -> Tensor:
    """Dropout of rows [R, H] by their logical coordinates, so that padded and packed runs drop the same elements."""
    seed = torch.randint(2**63 - 1, (1,), device=x.device)
    return reference.hidden_dropout(x, p, seed, sequence_ids, positions)
