"""The dropout mask of the kernels is the one of `ctxfast.reference.dropout`, element by element."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ctxfast.kernels import attention_tables
from ctxfast.kernels.attention_tables import Launch
from ctxfast.ops import _triton
from ctxfast.reference.dropout import dropout_mask
from tests.kernels.cases import SEED, offsets

P = 0.3
HEADS = 2


def expected(seed: Tensor, batch: int, rows: int, keys: int) -> Tensor:
    """bool [batch, HEADS, rows, keys], True = kept."""
    ranges = [torch.arange(n) for n in (batch, HEADS, rows, keys)]
    sequence, head, i, j = (
        r.reshape([-1 if d == k else 1 for k in range(4)]) for d, r in enumerate(ranges)
    )
    return dropout_mask(seed, P, i=i, j=j, head=head, sequence=sequence)


def uniform(batch: int, rows: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs whose weights are all 1 / keys, and values that show them one by one: output = kept weights."""
    query, key = torch.zeros(batch, HEADS, rows, 256), torch.zeros(batch, HEADS, keys, 256)
    return query, key, torch.eye(keys, 256).expand(batch, HEADS, -1, -1)


@pytest.mark.parametrize("seed", [-1, int(SEED)])
def test_forward(seed: int) -> None:
    seed = torch.tensor([seed])
    output, _ = _triton.attention_forward(
        *uniform(2, 70, 200), None, None, None, seed, False, -1, -1, P, 1.0
    )
    assert torch.equal(output[..., :200] != 0, expected(seed, 2, 70, 200))


def test_forward_of_packed_sequences() -> None:
    """Positions count inside the sequence, and the sequence is its number in the batch."""
    lengths = [40, 0, 70]
    query, key, value = (x[0].transpose(0, 1)[:110] for x in uniform(1, 110, 110))
    rows = torch.cat([torch.arange(n) for n in lengths])
    value = torch.eye(110, 256)[rows][:, None].expand(-1, HEADS, -1)
    cu = offsets(lengths)
    output, _ = _triton.attention_varlen_forward(
        query, key, value, cu, cu, 70, 70, None, None, None, SEED, False, -1, -1, P, 1.0
    )
    mask = expected(SEED, 3, 70, 70)
    for b, n in enumerate(lengths):
        mine = output[cu[b] : cu[b] + n, :, :n].transpose(0, 1) != 0
        assert torch.equal(mine, mask[b, :, :n, :n])


def test_backward(path: str) -> None:
    """With one-hot output gradients the gradient of the values is the transposed mask."""
    query, key, value = (x[..., :128] for x in uniform(2, 100, 128))
    arguments = (None, None, None, SEED, False, -1, -1, P, 1.0)
    output, lse = _triton.attention_forward(query, key, value, *arguments)
    grad_output = torch.eye(100, 128).expand(2, HEADS, -1, -1)
    _, _, dv, _ = _triton.attention_backward(
        grad_output, None, query, key, value, output, lse, *arguments, False
    )
    assert torch.equal(dv[..., :100] != 0, expected(SEED, 2, 100, 128).transpose(2, 3))


def test_blocks_of_32_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a block of 64, as the tables of float32 have it on GPUs."""
    monkeypatch.setattr(attention_tables, "forward_launch", lambda *_: Launch(64, 32, 4, 1))
    monkeypatch.setattr(attention_tables, "key_launch", lambda *_: Launch(16, 32, 4, 1))
    monkeypatch.setattr(attention_tables, "one_block_launch", lambda *_: None)
    test_forward(-1)
    test_backward("split")


def test_kept_weights_are_rescaled_by_the_realised_probability() -> None:
    output, _ = _triton.attention_forward(
        *uniform(1, 16, 64), None, None, None, SEED, False, -1, -1, P, 1.0
    )
    kept = output[output != 0]
    threshold = round(P * 65536)
    torch.testing.assert_close(kept, torch.full_like(kept, 65536 / (65536 - threshold) / 64))
