"""From the padded tensors that a caller gives to the packed tokens that the encoder runs on."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxfast.bert.configuration import BertConfig
from ctxfast.ops import _dispatch
from ctxfast.ops._native_mask import all_set
from ctxfast.packed import PackedBatch, bucket_length

# Each new row count costs the GEMM library about a millisecond a layer shape, so counts are rounded up.
ROW_MULTIPLE = 16
# Layouts of grids with up to so many tokens are kept: of 64 grids at most, which is 2 MB.
_MOST_KEPT_TOKENS = 1024


@dataclass(frozen=True)
class PackedInputs:
    """T tokens, of which the first batch.total count and the rest may round T up to a multiple of ROW_MULTIPLE.

    batch:          where the tokens lie in the padded grid [B, S]
    input_ids:      [T], None where embeddings are given
    inputs_embeds:  [T, H], None where ids are given
    token_type_ids, position_ids: [T]
    attn_mask:      a caller's own [B, 1 or heads, 1 or S, S] mask, bool or additive; then T = B * S
    """

    batch: PackedBatch
    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    token_type_ids: Tensor
    position_ids: Tensor
    attn_mask: Tensor | None = None

    @property
    def padding(self) -> float:
        """The share of the grid that is skipped."""
        grid = self.batch.batch_size * self.batch.seq_len
        return 1.0 - self.batch.total / grid if grid else 0.0


def pack_inputs(
    config: BertConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> PackedInputs:
    """Validates the arguments of `BertModel.forward` and drops the padding.

    Raises ValueError for a wrong shape, TypeError for a wrong dtype.
    """
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("BertModel: exactly one of input_ids and inputs_embeds must be given")
    name, dims = ("input_ids", 2) if inputs_embeds is None else ("inputs_embeds", 3)
    if given.dim() != dims or (dims == 3 and given.shape[2] != config.hidden_size):
        expected = "[batch, sequence]" if dims == 2 else f"[batch, sequence, {config.hidden_size}]"
        raise ValueError(f"BertModel: {name} must be {expected}, got shape {tuple(given.shape)}")
    batch_size, seq_len = given.shape[:2]
    if seq_len > config.max_position_embeddings:
        raise ValueError(
            "BertModel: the sequence must be no longer than max_position_embeddings "
            f"{config.max_position_embeddings}, got {seq_len}"
        )
    attn_mask = None
    if attention_mask is not None and attention_mask.dim() == 4:
        attn_mask, attention_mask = _four_dimensional(config, attention_mask, given), None
    batch = _layout(attention_mask, batch_size, seq_len, given.device)
    types = _grid("token_type_ids", token_type_ids, given)
    positions = _grid("position_ids", position_ids, given)
    if positions is not None:
        packed_positions = batch.pack(positions)
    elif batch.dense:
        packed_positions = batch.positions
    else:
        packed_positions = batch.indices % seq_len if seq_len else batch.indices
    return PackedInputs(
        batch,
        None if input_ids is None else batch.pack(_ids("input_ids", input_ids)),
        None if inputs_embeds is None else batch.pack(inputs_embeds),
        torch.zeros_like(packed_positions) if types is None else batch.pack(types),
        packed_positions,
        attn_mask,
    )


def packed_inputs(
    input_ids: Tensor,
    batch: PackedBatch,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> PackedInputs:
    """Validates the arguments of `BertModel.forward_packed`: tokens that were never padded."""
    types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
    positions = batch.positions if position_ids is None else position_ids
    for name, ids in (
        ("input_ids", input_ids),
        ("token_type_ids", types),
        ("position_ids", positions),
    ):
        if _ids(name, ids).shape != (batch.total,):
            raise ValueError(
                f"BertModel: {name} must be the [{batch.total}] tokens of the batch, "
                f"got shape {tuple(ids.shape)}"
            )
    return PackedInputs(batch, input_ids, None, types, positions)


def round_rows(inputs: PackedInputs) -> PackedInputs:
    """Appends rows of zeros up to a multiple of ROW_MULTIPLE, at least one."""
    total = inputs.position_ids.shape[0]
    extra = -total % ROW_MULTIPLE if total else ROW_MULTIPLE
    if extra == 0 or inputs.attn_mask is not None:
        return inputs
    ids, embeds = inputs.input_ids, inputs.inputs_embeds
    return PackedInputs(
        inputs.batch,
        None if ids is None else F.pad(ids, (0, extra)),
        None if embeds is None else F.pad(embeds, (0, 0, 0, extra)),
        F.pad(inputs.token_type_ids, (0, extra)),
        F.pad(inputs.position_ids, (0, extra)),
    )


def coordinates(batch: PackedBatch, rows: int) -> tuple[Tensor, Tensor]:
    """Sequence and position of `rows` rows that begin with the batch's: dropout is drawn by them."""
    beyond = (0, rows - batch.total)
    return F.pad(batch.sequence_ids, beyond), F.pad(batch.positions, beyond)


def pack_labels(caller: str, labels: Tensor | None, batch: PackedBatch) -> Tensor | None:
    """Labels [B, S] of tokens as int64 [batch.total]. Raises ValueError and TypeError, speaking for `caller`."""
    if labels is None:
        return None
    if labels.shape != (batch.batch_size, batch.seq_len):
        raise ValueError(
            f"{caller}: labels must be [{batch.batch_size}, {batch.seq_len}], got shape {tuple(labels.shape)}"
        )
    return batch.pack(_integers(caller, "labels", labels).long())


def sequence_labels(caller: str, name: str, labels: Tensor, count: int) -> Tensor:
    """Labels of sequences as int64 [count], from that shape or [count, 1]. Errors as `pack_labels`."""
    if labels.numel() != count:
        raise ValueError(f"{caller}: {name} must be [{count}], got shape {tuple(labels.shape)}")
    return _integers(caller, name, labels).reshape(-1).long()


def _integers(caller: str, name: str, labels: Tensor) -> Tensor:
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"{caller}: {name} must be integers, got {labels.dtype}")
    return labels


def _layout(
    mask: Tensor | None, batch_size: int, seq_len: int, device: torch.device
) -> PackedBatch:
    if mask is None:
        return dense_batch(batch_size, seq_len, device)
    if mask.shape != (batch_size, seq_len):
        raise ValueError(
            f"BertModel: attention_mask must be [{batch_size}, {seq_len}] or 4-dimensional, "
            f"got shape {tuple(mask.shape)}"
        )
    if mask.device != device:
        raise ValueError(f"BertModel: attention_mask must be on {device}, got {mask.device}")
    if device.type == "cpu" and all_set(mask):
        return dense_batch(batch_size, seq_len, device)
    return PackedBatch.from_mask(mask)


def dense_batch(batch_size: int, seq_len: int, device: torch.device) -> PackedBatch:
    """The layout of a grid without padding."""
    if (
        device.type == "cpu"
        and type(batch_size) is type(seq_len) is int  # not the symbol of a graph
        and batch_size * seq_len <= _MOST_KEPT_TOKENS
        and _dispatch.parts_unseen("cpu")
    ):
        return _kept_dense_batch(batch_size, seq_len)
    return _dense_batch(batch_size, seq_len, device)


@functools.lru_cache(maxsize=64)
def _kept_dense_batch(batch_size: int, seq_len: int) -> PackedBatch:
    with torch.inference_mode(False):
        return _dense_batch(batch_size, seq_len, torch.device("cpu"))


def _dense_batch(batch_size: int, seq_len: int, device: torch.device) -> PackedBatch:
    total = batch_size * seq_len
    indices = torch.arange(total, device=device)
    starts = torch.arange(batch_size + 1, device=device, dtype=torch.int32) * seq_len
    width = max(seq_len, 1)
    return PackedBatch(
        starts,
        bucket_length(seq_len),
        indices,
        indices // width,
        indices % width,
        batch_size,
        seq_len,
        dense=True,
    )


def _four_dimensional(config: BertConfig, mask: Tensor, given: Tensor) -> Tensor:
    batch_size, seq_len = given.shape[:2]
    full = (batch_size, config.num_attention_heads, seq_len, seq_len)
    fits = all(n in (1, whole) for n, whole in zip(mask.shape, full, strict=True))
    if not fits or mask.device != given.device:
        raise ValueError(
            f"BertModel: a 4-dimensional attention_mask must broadcast to {full} on {given.device}, "
            f"got shape {tuple(mask.shape)} on {mask.device}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            "BertModel: a 4-dimensional attention_mask must be bool (true = attend) or floating "
            f"point (added to the scores), got {mask.dtype}"
        )
    return mask


def _ids(name: str, ids: Tensor) -> Tensor:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"BertModel: {name} must be int64 or int32, got {ids.dtype}")
    return ids


def _grid(name: str, ids: Tensor | None, given: Tensor) -> Tensor | None:
    """`ids` as [B, S], from that shape, [1, S] or [S]."""
    if ids is None:
        return None
    batch_size, seq_len = given.shape[:2]
    if tuple(ids.shape) not in ((batch_size, seq_len), (1, seq_len), (seq_len,)):
        raise ValueError(
            f"BertModel: {name} must be [{batch_size}, {seq_len}], got shape {tuple(ids.shape)}"
        )
    return _ids(name, ids).expand(batch_size, seq_len)
