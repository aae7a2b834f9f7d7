"""How every layer of one call attends: on packed tokens where it can be, on the padded grid where it must be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxfast import ops
from ctxfast.bert.inputs import ROW_MULTIPLE, dense_batch
from ctxfast.nn.packed_linear import takes_any_rows
from ctxfast.ops._native_mask import all_set
from ctxfast.packed import PackedBatch


@dataclass(frozen=True)
class Plan:
    """T = rows of packed tokens, of which the first batch.total count.

    attn_mask: a caller's own mask, broadcastable to [B, heads, S, S]
    key_mask:  bool [B, S], where padded rows are computed too
    bias:      [1, heads, L, L], of relative positions; L is max_seqlen on packed tokens, S on the grid
    padded:    attend on the grid
    weights:   return the attention weights, which takes the grid
    """

    batch: PackedBatch
    rows: int
    attn_mask: Tensor | None = None
    key_mask: Tensor | None = None
    bias: Tensor | None = None
    padded: bool = False
    weights: bool = False

    @cached_property
    def tile_map(self) -> Tensor | None:
        """What all layers and their backward share: which rows each program of the attention takes."""
        return ops.attention_tile_map(self.batch.cu_seqlens, self.rows)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float,
        scale: float | None,
        queries: PackedBatch | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """query, key, value: [T, heads, D] -> [T, heads, D], and weights [B, heads, S, S] where they are asked for.

        queries: where the rows of query lie, by default where those of key and value do; not on the grid
        """
        if self.padded:
            return self._attend_padded(query, key, value, dropout_p, scale)
        batch, bias = self.batch, self._bias(query)
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
            bias=bias,
            dropout_p=dropout_p,
            scale=scale,
        )
        return output, None

    def _bias(self, query: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.to(query.dtype)

    def _attend_padded(
        self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float, scale: float | None
    ) -> tuple[Tensor, Tensor | None]:
        batch = self.batch
        query, key, value = (
            batch.pad(x[: batch.total]).transpose(1, 2) for x in (query, key, value)
        )  # [B, heads, S, D]
        mask = self.attn_mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        keys = self.key_mask
        if keys is None and not batch.dense:
            keys = valid_tokens(batch)
        if not self.weights:
            output = ops.attention(
                query,
                key,
                value,
                attn_mask=mask,
                key_padding_mask=keys,
                bias=self._bias(query),
                dropout_p=dropout_p,
                scale=scale,
            )
            return self._rows(output), None
        weights = ops.attention_weights(
            query,
            key,
            attn_mask=mask,
            key_padding_mask=keys,
            bias=self._bias(query),
            dropout_p=dropout_p,
            scale=scale,
        )
        if not batch.dense:
            weights = weights.masked_fill(~valid_tokens(batch)[:, None, :, None], 0.0)
        return self._rows(weights @ value), weights

    def _rows(self, output: Tensor) -> Tensor:
        packed = self.batch.pack(output.transpose(1, 2))
        return F.pad(packed, (0, 0, 0, 0, 0, self.rows - self.batch.total))

    def pack(self, x: Tensor) -> Tensor:
        """[B, S, ...] -> [T, ...], zero beyond the last token."""
        packed = self.batch.pack(x)
        extra = self.rows - self.batch.total
        return F.pad(packed, (0, 0) * (packed.dim() - 1) + (0, extra)) if extra else packed

    def pad(self, x: Tensor) -> Tensor:
        """[T, ...] -> [B, S, ...], zero in padding."""
        total = self.batch.total
        return self.batch.pad(x if x.shape[0] == total else x[:total])

    def coordinates(self) -> tuple[Tensor, Tensor]:
        """sequence_ids and positions of every row, where dropout draws."""
        beyond = (0, self.rows - self.batch.total)
        return F.pad(self.batch.sequence_ids, beyond), F.pad(self.batch.positions, beyond)


def valid_tokens(batch: PackedBatch) -> Tensor:
    """bool [B, S]: where the tokens are."""
    return batch.pad(torch.ones_like(batch.indices, dtype=torch.bool))


def row_count(
    total: int, model: nn.Module, dtype: torch.dtype | None, quantization: str | None
) -> int:
    """T for this many tokens: a multiple of ROW_MULTIPLE where the GEMM library should see few shapes.

    dtype, quantization: what the layers of model compute in, by default in the type of its parameters
    """
    weight = next((p for p in model.parameters() if p.dim() == 2), None)
    precision = quantization or ("bfloat16" if dtype is torch.bfloat16 else None)
    served = weight is not None and (precision is not None or dtype in (None, weight.dtype))
    if total and served and not model.training and takes_any_rows(weight, precision):  # type: ignore[arg-type]
        return total
    return max(ROW_MULTIPLE, -(-total // ROW_MULTIPLE) * ROW_MULTIPLE)


def layout(mask: Tensor | None, size: torch.Size, device: torch.device, unpad: bool) -> PackedBatch:
    """The layout of a [B, S] grid under a mask [B, S], None where every position counts."""
    batch_size, seq_len = size
    if mask is None or not unpad or (device.type == "cpu" and all_set(mask)):
        return dense_batch(batch_size, seq_len, device)
    return PackedBatch.from_mask(mask)


def contiguous(batch: PackedBatch) -> bool:
    """Whether the tokens of every sequence lie in one run of columns, so that distances survive packing."""
    if batch.dense or batch.total < 2:
        return True
    same = batch.sequence_ids[1:] == batch.sequence_ids[:-1]
    return bool((~same | (batch.indices.diff() == 1)).all())
