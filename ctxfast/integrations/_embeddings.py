"""The input layer of a model on packed tokens, or as its own module where somebody changed it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxfast import ops
from ctxfast.bert.embeddings import dropout
from ctxfast.bert.inputs import coordinates
from ctxfast.integrations._families import Family
from ctxfast.integrations._layer import require_norm
from ctxfast.integrations._plan import Plan
from ctxfast.integrations._stock import (
    NotStock,
    require_class,
    require_dropout,
    require_parameters,
    require_plain,
)
from ctxfast.nn.fusion import parameter_of


@dataclass(frozen=True)
class Embeddings:
    """Tables and norm of an input layer that nobody has tampered with."""

    module: nn.Module
    word: nn.Embedding
    position: nn.Embedding
    token_type: nn.Embedding | None
    norm: nn.Module
    dropout: nn.Dropout

    @classmethod
    def of(cls, family: Family, module: nn.Module | None) -> Embeddings:
        """Inspects an input layer; raises NotStock with the reason why it has to be called."""
        require_class("embeddings", module, family.stock(family.embeddings))
        assert module is not None
        require_plain("embeddings", module)
        parts = module._modules
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
            table = parts.get(name)
            if table is None and name == "token_type_embeddings":
                continue
            require_class(name, table, nn.Embedding)
            assert isinstance(table, nn.Embedding)
            require_plain(name, table)
            require_parameters(name, table, ("weight",))
            if table.max_norm is not None or table.sparse or table.scale_grad_by_freq:
                raise NotStock(f"{name} has max_norm, sparse or scale_grad_by_freq")
        require_norm("embeddings.LayerNorm", parts.get("LayerNorm"))
        require_dropout("embeddings.dropout", parts.get("dropout"))
        return cls(
            module,
            parts["word_embeddings"],  # type: ignore[arg-type]
            parts["position_embeddings"],  # type: ignore[arg-type]
            parts.get("token_type_embeddings"),  # type: ignore[arg-type]
            parts["LayerNorm"],  # type: ignore[arg-type]
            parts["dropout"],  # type: ignore[arg-type]
        )

    def __call__(self, family: Family, call: dict[str, Any], plan: Plan) -> Tensor:
        """[T, E]"""
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        positions = plan.pack(self._positions(family, call))
        types = self._types(call, plan, positions)
        word, position = parameter_of(self.word, "weight"), parameter_of(self.position, "weight")
        weight, bias = parameter_of(self.norm, "weight"), parameter_of(self.norm, "bias")
        eps = self.norm.__dict__["eps"]
        word_padding, position_padding = self.word.padding_idx, self.position.padding_idx
        if self.token_type is None:
            token_type = word.new_zeros(1, word.shape[1])
        else:
            token_type = parameter_of(self.token_type, "weight")
        # The operator withholds the gradient of one padding row, that of the words.
        two_padding_rows = torch.is_grad_enabled() and position_padding is not None
        if embeds is None and not two_padding_rows:
            x = ops.embed_layer_norm(
                plan.pack(ids),  # type: ignore[arg-type]
                types,
                positions,
                word,
                token_type,
                position,
                weight,
                bias,
                eps,
                padding_idx=word_padding,
            )
        else:
            x = (
                F.embedding(plan.pack(ids), word, word_padding)  # type: ignore[arg-type]
                if embeds is None
                else plan.pack(embeds)
            )
            if self.token_type is not None:
                x = x + F.embedding(types, token_type, self.token_type.padding_idx)  # type: ignore[arg-type]
            x = x + F.embedding(positions, position, position_padding)  # type: ignore[arg-type]
            x = ops.add_layer_norm(x, None, weight, bias, eps)
        if self.dropout.training and self.dropout.p > 0.0:
            x = dropout(x, self.dropout.p, *coordinates(plan.batch, x.shape[0]))  # type: ignore[arg-type]
        return x

    def _positions(self, family: Family, call: dict[str, Any]) -> Tensor:
        """[B, S]: the caller's, or those of the columns, as the module has them, or of the ids that are not padding."""
        ids, embeds, given = (
            call.get(name) for name in ("input_ids", "inputs_embeds", "position_ids")
        )
        size = (ids if embeds is None else embeds).shape[:2]  # type: ignore[union-attr]
        if given is not None:
            return given.expand(size)
        columns = self.module._buffers.get("position_ids")
        if family.positions == "grid" and columns is not None and columns.shape[1] >= size[1]:
            columns = columns[:, : size[1]]
            return columns if size[0] == 1 else columns.expand(size)
        device = (ids if embeds is None else embeds).device  # type: ignore[union-attr]
        columns = torch.arange(size[1], device=device)
        if family.positions == "grid":
            return columns.expand(size)
        padding: Any = self.module.padding_idx
        if ids is None:
            return (columns + padding + 1).expand(size)
        real = ids.ne(padding)
        return real.cumsum(1) * real + padding

    def _types(self, call: dict[str, Any], plan: Plan, positions: Tensor) -> Tensor:
        given = call.get("token_type_ids")
        if given is not None and self.token_type is not None:
            return plan.pack(given.expand(plan.batch.batch_size, plan.batch.seq_len))
        buffered = self.module._buffers.get("token_type_ids")
        if buffered is None or self.token_type is None:
            return torch.zeros_like(positions)
        return buffered[0].index_select(
            0, positions
        )  # what a user wrote there counts, as it does unaccelerated


def call_embeddings(module: nn.Module, family: Family, call: dict[str, Any], plan: Plan) -> Tensor:
    """[T, E] from the module itself, which sees the padded grid as it does unaccelerated."""
    positional, by_name = family.arguments
    grid = module(
        *(call.get(name) for name in positional), **{name: call.get(name) for name in by_name}
    )
    return plan.pack(grid)
