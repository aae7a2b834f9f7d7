"""PackedBatch against indexing by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree

import ctxfast
from ctxfast import PackedBatch

MASKS = {
    "right padding": [[1, 1, 1, 0], [1, 0, 0, 0]],
    "left padding": [[0, 0, 1, 1], [0, 1, 1, 1]],
    "holes": [[1, 0, 1, 0], [0, 1, 0, 1]],
    "an empty sequence": [[0, 0, 0, 0], [1, 1, 0, 0]],
    "all empty": [[0, 0, 0, 0], [0, 0, 0, 0]],
    "dense": [[1, 1, 1, 1], [1, 1, 1, 1]],
}


@pytest.mark.parametrize("capacity", [None, 8, 11])
@pytest.mark.parametrize("name", MASKS)
def test_pack_and_pad_move_exactly_the_tokens(name, capacity):
    mask = torch.tensor(MASKS[name], dtype=torch.bool)
    batch = PackedBatch.from_mask(mask, capacity)
    x = torch.randn(2, 4, 3)
    poisoned = x.masked_fill(~mask[..., None], float("nan"))
    packed = batch.pack(poisoned)
    total = int(mask.sum())
    assert packed.shape[0] == batch.total == (total if capacity is None else capacity)
    assert torch.equal(packed[:total], x[mask]) and (packed[total:] == 0).all()
    assert torch.equal(batch.pad(packed), x.masked_fill(~mask[..., None], 0))
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert torch.equal(batch.sequence_ids[:total], mask.nonzero()[:, 0])
    assert batch.positions[:total].tolist() == [n for row in mask.sum(1) for n in range(row)]
    assert batch.max_seqlen >= int(mask.sum(1).max())


def test_lengths_and_mask_give_the_same_layout():
    lengths = torch.tensor([3, 0, 5, 1])
    mask = torch.arange(6) < lengths[:, None]
    for capacity in (None, 12):
        a = PackedBatch.from_mask(mask, capacity)
        b = PackedBatch.from_lengths(lengths, 6, capacity)
        for name in ("cu_seqlens", "indices", "sequence_ids"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert torch.equal(a.positions[:9], b.positions[:9])


def test_gradients_reach_tokens_only():
    mask = torch.tensor(MASKS["holes"], dtype=torch.bool)
    batch = PackedBatch.from_mask(mask, capacity=6)
    x = torch.randn(2, 4, 3, requires_grad=True)
    batch.pad(batch.pack(x) * 2).sum().backward()
    assert torch.equal(x.grad, 2 * mask[..., None].expand(2, 4, 3).float())


def test_transforms_reach_tokens_only():
    batch = PackedBatch.from_lengths([2, 0, 3], 4)
    x = torch.randn(6, 5, 2)
    padded = torch.func.vmap(batch.pad)(x)
    assert torch.equal(padded, torch.stack([batch.pad(sample) for sample in x]))
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        derivative = jacobian(lambda x: batch.pack(batch.pad(x)))(x[0]).view(10, 10)
        assert torch.equal(derivative, torch.eye(10))


def test_capacity_mode_compiles_without_a_break():
    def roundtrip(x, mask):
        batch = PackedBatch.from_mask(mask, capacity=8)
        return batch.pad(batch.pack(x) + 1)

    compiled = torch.compile(roundtrip, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 3)
    for name in ("holes", "right padding"):
        mask = torch.tensor(MASKS[name], dtype=torch.bool)
        assert torch.equal(compiled(x, mask), roundtrip(x, mask))


def test_is_a_pytree_and_immutable():
    batch = PackedBatch.from_lengths([2, 3])
    leaves, spec = _pytree.tree_flatten(batch)
    assert len(leaves) == 4 and isinstance(_pytree.tree_unflatten(leaves, spec), PackedBatch)
    with pytest.raises(AttributeError):
        batch.batch_size = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: PackedBatch.from_mask(torch.ones(3)),
            r"mask must be \[batch, sequence\], got shape \(3,\)",
        ),
        (
            lambda: PackedBatch.from_mask(torch.ones(2, 3), capacity=5),
            "capacity must be at least .* 6, got 5",
        ),
        (lambda: PackedBatch.from_lengths([2, -1]), "lengths must not be negative, got -1"),
        (
            lambda: PackedBatch.from_lengths([2, 9], 4),
            "seq_len must be at least the longest length 9, got 4",
        ),
        (
            lambda: PackedBatch.from_lengths([2]).pack(torch.ones(2, 2)),
            r"x must be \[1, 2, ...\], got",
        ),
        (lambda: PackedBatch.from_lengths([2]).pad(torch.ones(3, 2)), r"x must be \[2, ...\], got"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_public_name():
    assert ctxfast.PackedBatch is PackedBatch
