"""PackedBatch: where the tokens of a ragged batch lie once the padding is gone.

As in ByteTransformer (Zhai et al., 2022), a model removes padding once, before its embeddings, runs every layer on
[T, ...] tokens with cumulative offsets, and scatters the result back at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree

_BUCKETS = (16, 32, 64, 128, 256, 512, 1024)


def bucket_length(length: int) -> int:
    """The smallest of 16, 32, 64, ... 1024, then the next multiple of 1024, that holds `length`."""
    for bucket in _BUCKETS:
        if length <= bucket:
            return bucket
    return -(-length // _BUCKETS[-1]) * _BUCKETS[-1]


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """The layout of T packed tokens that came from a padded grid [B, S].

    cu_seqlens:   int32 [B + 1]; sequence b owns packed rows cu_seqlens[b] to cu_seqlens[b + 1]
    max_seqlen:   an upper bound of the longest sequence, rounded up to a bucket so that kernels are reused
    indices:      int64 [T]; b * S + s of each packed token; B * S marks a row beyond the last token
    sequence_ids: int64 [T]; b, or B beyond the last token
    positions:    int64 [T]; 0, 1, 2, ... inside each sequence
    dense:        True where it is known that there is no padding: then packing is a view
    exact:        True where it is known that no row lies beyond the last token
    """

    cu_seqlens: Tensor
    max_seqlen: int
    indices: Tensor
    sequence_ids: Tensor
    positions: Tensor
    batch_size: int
    seq_len: int
    dense: bool = False
    exact: bool = False

    @property
    def total(self) -> int:
        """T, rows beyond the last token included."""
        return self.indices.shape[0]

    @classmethod
    def from_mask(cls, mask: Tensor, capacity: int | None = None) -> PackedBatch:
        """From a padding mask [B, S], true or non-zero at tokens: prefixes, left padding and holes alike.

        Without `capacity` the number of tokens is read from the device: one synchronisation. With it T = capacity, no
        synchronisation takes place, and rows beyond the last token are zero; on a CPU a capacity below the number of
        tokens raises ValueError, on a GPU it fails a device assertion.
        """
        if mask.dim() != 2:
            raise ValueError(
                f"PackedBatch: mask must be [batch, sequence], got shape {tuple(mask.shape)}"
            )
        mask = mask if mask.dtype == torch.bool else mask != 0
        batch_size, seq_len = mask.shape
        lengths = mask.sum(1, dtype=torch.int32)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        flat = mask.reshape(-1)
        if capacity is None:
            indices = flat.nonzero().squeeze(1)
            longest = int(lengths.max()) if mask.device.type == "cpu" and batch_size else seq_len
            dense = indices.shape[0] == batch_size * seq_len
        else:
            _require_capacity(cu_seqlens[-1], capacity)
            indices = flat.nonzero_static(size=capacity, fill_value=batch_size * seq_len).squeeze(1)
            longest, dense = seq_len, False
        exact = capacity is None
        return cls._from_indices(
            cu_seqlens, bucket_length(longest), indices, batch_size, seq_len, dense, exact
        )

    @classmethod
    def from_lengths(
        cls,
        lengths: Tensor | Sequence[int],
        seq_len: int | None = None,
        capacity: int | None = None,
        device: torch.device | str | None = None,
    ) -> PackedBatch:
        """From the lengths of right-padded sequences, [B]; on the host no synchronisation takes place.

        seq_len is the width S of the padded grid, by default the longest sequence.
        """
        if isinstance(lengths, Tensor):
            if lengths.dim() != 1 or lengths.is_floating_point():
                raise ValueError(
                    f"PackedBatch: lengths must be integers [batch], "
                    f"got {lengths.dtype} of shape {tuple(lengths.shape)}"
                )
            device = lengths.device if device is None else device
        host = torch.as_tensor(lengths, dtype=torch.int64, device="cpu")
        longest = int(host.max()) if host.numel() else 0
        if host.numel() and int(host.min()) < 0:
            raise ValueError(f"PackedBatch: lengths must not be negative, got {int(host.min())}")
        width = longest if seq_len is None else seq_len
        if width < longest:
            raise ValueError(
                f"PackedBatch: seq_len must be at least the longest length {longest}, got {seq_len}"
            )
        cu_seqlens = torch.nn.functional.pad(host.cumsum(0).to(torch.int32), (1, 0))
        total = int(cu_seqlens[-1])
        rows = torch.repeat_interleave(torch.arange(host.numel()), host, output_size=total)
        indices = rows * width + torch.arange(total) - cu_seqlens.long()[rows]
        if capacity is not None:
            _require_capacity(cu_seqlens[-1], capacity)
            indices = torch.nn.functional.pad(
                indices, (0, capacity - total), value=host.numel() * width
            )
        exact = capacity is None
        dense = exact and total == host.numel() * width
        packed = cls._from_indices(
            cu_seqlens, bucket_length(longest), indices, host.numel(), width, dense, exact
        )
        return packed if device is None else packed.to(device)

    @classmethod
    def _from_indices(
        cls,
        cu_seqlens: Tensor,
        max_seqlen: int,
        indices: Tensor,
        batch_size: int,
        seq_len: int,
        dense: bool,
        exact: bool,
    ) -> PackedBatch:
        sequence_ids = indices // seq_len if seq_len else indices
        rows = torch.arange(indices.shape[0], device=indices.device)
        positions = rows - cu_seqlens.long()[sequence_ids]
        tensors = (indices, sequence_ids, positions)
        return cls(cu_seqlens, max_seqlen, *tensors, batch_size, seq_len, dense, exact)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same layout on another device."""
        tensors = (
            t.to(device) for t in (self.cu_seqlens, self.indices, self.sequence_ids, self.positions)
        )
        cu_seqlens, indices, sequence_ids, positions = tensors
        return PackedBatch(
            cu_seqlens,
            self.max_seqlen,
            indices,
            sequence_ids,
            positions,
            self.batch_size,
            self.seq_len,
            self.dense,
            self.exact,
        )

    def pack(self, x: Tensor) -> Tensor:
        """[B, S, ...] -> [T, ...]; rows beyond the last token are zero. Differentiable."""
        if x.shape[:2] != (self.batch_size, self.seq_len):
            raise ValueError(
                f"PackedBatch.pack: x must be [{self.batch_size}, {self.seq_len}, ...], got shape {tuple(x.shape)}"
            )
        flat = x.flatten(0, 1)
        if self.dense:
            return flat
        if flat.shape[0] == 0:
            return flat.new_zeros((self.total, *flat.shape[1:]))
        if self.exact:
            return flat.index_select(0, self.indices)
        beyond = self.indices >= flat.shape[0]
        rows = flat.index_select(0, self.indices.clamp(max=flat.shape[0] - 1))
        return rows.masked_fill(beyond.view(-1, *(1,) * (rows.dim() - 1)), 0)

    def pad(self, x: Tensor) -> Tensor:
        """[T, ...] -> [B, S, ...], zero in padding. Differentiable."""
        if x.shape[:1] != (self.total,):
            raise ValueError(
                f"PackedBatch.pad: x must be [{self.total}, ...], got shape {tuple(x.shape)}"
            )
        shape = (self.batch_size, self.seq_len, *x.shape[1:])
        if self.dense:
            return x.view(shape) if x.is_contiguous() else x.reshape(shape)
        grid = self.batch_size * self.seq_len
        padded = x.new_zeros(
            (grid + 1, *x.shape[1:])
        )  # the last row takes what lies beyond the last token
        padded[self.indices] = x
        return padded[:grid].view(shape)


def _require_capacity(total: Tensor, capacity: int) -> None:
    if total.device.type == "cpu" and not torch.compiler.is_compiling():
        if int(total) > capacity:
            raise ValueError(
                f"PackedBatch: capacity must be at least the number of tokens {int(total)}, got {capacity}"
            )
    else:
        torch._assert_async(
            total <= capacity, "PackedBatch: capacity is below the number of tokens"
        )


def _flatten(batch: PackedBatch):
    tensors = [batch.cu_seqlens, batch.indices, batch.sequence_ids, batch.positions]
    return tensors, (batch.max_seqlen, batch.batch_size, batch.seq_len, batch.dense, batch.exact)


def _unflatten(tensors, context) -> PackedBatch:
    cu_seqlens, indices, sequence_ids, positions = tensors
    max_seqlen, *grid = context
    return PackedBatch(cu_seqlens, max_seqlen, indices, sequence_ids, positions, *grid)


_pytree.register_pytree_node(
    PackedBatch, _flatten, _unflatten, serialized_type_name="ctxfast.PackedBatch"
)
