"""Rows of a packed batch that a head needs of the last layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxfast.bert.inputs import ROW_MULTIPLE
from ctxfast.packed import PackedBatch, bucket_length


@dataclass(frozen=True)
class Selection:
    """Packed rows in ascending order, and where they lie.

    index:   int64 [R], R a multiple of ROW_MULTIPLE; behind batch.total it names row 0, and nobody reads the result
    batch:   the layout of the selected tokens alone, with their sequences and positions in the whole batch
    leading: whether they are the first tokens of their sequences
    """

    index: Tensor
    batch: PackedBatch
    leading: bool = False

    @classmethod
    def first_tokens(cls, batch: PackedBatch) -> Selection:
        """One row a sequence; a sequence without tokens has none."""
        starts, ends = batch.cu_seqlens[:-1], batch.cu_seqlens[1:]
        if not batch.dense or batch.seq_len == 0:
            starts = starts[starts < ends]
        return cls._of(starts.long(), batch, leading=True)

    @classmethod
    def where(cls, wanted: Tensor, batch: PackedBatch) -> Selection:
        """The rows at which `wanted`, bool [batch.total], is true. Reads their number from the device."""
        return cls._of(wanted.nonzero().squeeze(1), batch, leading=False)

    @classmethod
    def _of(cls, index: Tensor, batch: PackedBatch, leading: bool) -> Selection:
        sequences = batch.sequence_ids[index]
        counts = index.new_zeros(batch.batch_size).index_add(
            0, sequences, torch.ones_like(sequences)
        )
        selected = PackedBatch(
            cu_seqlens=F.pad(counts.cumsum(0), (1, 0)).to(torch.int32),
            max_seqlen=bucket_length(1) if leading else batch.max_seqlen,
            indices=batch.indices[index],
            sequence_ids=sequences,
            positions=batch.positions[index],
            batch_size=batch.batch_size,
            seq_len=batch.seq_len,
        )
        count = index.shape[0]
        extra = -count % ROW_MULTIPLE if count else ROW_MULTIPLE
        return cls(F.pad(index, (0, extra)) if batch.total else index, selected, leading)

    @property
    def tokens(self) -> Tensor:
        """The rows that count: int64 [batch.total]."""
        return self.index[: self.batch.total]

    def take(self, rows: Tensor) -> Tensor:
        """[T, ...] -> [R, ...]"""
        return rows.index_select(0, self.index)
