"""How the layers of one call of BERT attend: on packed tokens, or padded where a mask or weights ask for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxfast import ops
from ctxfast.bert.inputs import PackedInputs, coordinates
from ctxfast.bert.selection import Selection
from ctxfast.packed import PackedBatch


@dataclass(frozen=True)
class AttentionPlan:
    """How every layer of one call attends. Only [T] rows below batch.total are tokens."""

    batch: PackedBatch
    rows: int
    attn_mask: Tensor | None
    output_attentions: bool

    @classmethod
    def of(cls, inputs: PackedInputs, output_attentions: bool) -> AttentionPlan:
        rows = inputs.position_ids.shape[0]
        return cls(inputs.batch, rows, inputs.attn_mask, output_attentions)

    @classmethod
    def of_rows(cls, selection: Selection) -> AttentionPlan:
        """Where the selected rows lie: what everything behind the attention needs to know of them."""
        return cls(selection.batch, selection.index.shape[0], None, False)

    @cached_property
    def coordinates(self) -> tuple[Tensor, Tensor]:
        """Sequence and position of every row [T], by which dropout is drawn."""
        return coordinates(self.batch, self.rows)

    @cached_property
    def tile_map(self) -> Tensor | None:
        """What all layers and their backward share: which rows each program of the attention takes."""
        return ops.attention_tile_map(self.batch.cu_seqlens, self.rows)

    def takes_queries(self, selection: Selection, dropout_p: float) -> bool:
        """Whether attention of the selected queries alone gives what it gives among all of them.

        Its dropout is drawn by the place of a query among those of its sequence, which only first tokens keep.
        """
        padded = self.output_attentions or self.attn_mask is not None
        return not padded and (selection.leading or dropout_p == 0.0)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float,
        queries: PackedBatch | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """query, key, value: [T, heads, D] -> [T, heads, D], and weights [B, heads, S, S] where they are asked for.

        queries: where the rows of query lie, by default where those of key and value do.
        """
        if self.output_attentions or self.attn_mask is not None:
            return self._attend_padded(query, key, value, dropout_p)
        batch = self.batch
        queries = batch if queries is None else queries
        output = ops.attention_varlen(
            query,
            key,
            value,
            cu_seqlens_q=queries.cu_seqlens,
            cu_seqlens_k=batch.cu_seqlens,
            max_seqlen_q=queries.max_seqlen,
            max_seqlen_k=batch.max_seqlen,
            tile_map_q=self.tile_map if queries is batch else None,
            tile_map_k=self.tile_map,
            dropout_p=dropout_p,
        )
        return output, None

    def _attend_padded(
        self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float
    ) -> tuple[Tensor, Tensor | None]:
        """The same on the padded grid, which masks of the caller and returned weights are about."""
        batch = self.batch
        query, key, value = (
            batch.pad(x[: batch.total]).transpose(1, 2) for x in (query, key, value)
        )  # [B, heads, S, D]
        mask = self.attn_mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        if not self.output_attentions:
            output = ops.attention(query, key, value, attn_mask=mask, dropout_p=dropout_p)
            return self._rows(output), None
        valid = None
        if not batch.dense:
            valid = batch.pad(torch.ones_like(batch.indices, dtype=torch.bool))  # [B, S]
        weights = ops.attention_weights(
            query, key, attn_mask=mask, key_padding_mask=valid, dropout_p=dropout_p
        )
        if valid is not None:
            weights = weights.masked_fill(~valid[:, None, :, None], 0.0)
        return self._rows(weights @ value), weights

    def _rows(self, output: Tensor) -> Tensor:
        packed = self.batch.pack(output.transpose(1, 2))
        return F.pad(packed, (0, 0, 0, 0, 0, self.rows - self.batch.total))
