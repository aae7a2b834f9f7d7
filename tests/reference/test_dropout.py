"""The dropout mask against known answers of Philox and against probability theory."""

from __future__ import annotations

import math

import pytest
import torch

from ctxfast.reference.dropout import (
    HIDDEN_HEAD,
    dropout_mask,
    dropout_scale,
    dropout_threshold,
    hidden_dropout,
    philox,
)


def scalar_philox(key: tuple[int, int], counter: tuple[int, ...], rounds: int) -> tuple[int, ...]:
    """Philox4x32 in Python integers, written from the paper."""
    mask = 0xFFFFFFFF
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(rounds):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q >> 32) ^ b ^ k0, q & mask, (p >> 32) ^ d ^ k1, p & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return a, b, c, d


def test_scalar_philox_gives_the_published_known_answers():
    """Known-answer vectors of the authors' Random123 library, ten rounds."""
    full = 0xFFFFFFFF
    assert scalar_philox((0, 0), (0, 0, 0, 0), 10) == (
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    )
    assert scalar_philox((full, full), (full,) * 4, 10) == (
        0x408F276D,
        0x41C83B0E,
        0xA20BC7C6,
        0x6D5451FD,
    )


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5, 2**63 - 1])
def test_tensor_philox_equals_scalar_philox(seed):
    counters = torch.randint(0, 2**32, (4, 50))
    words = philox(torch.tensor([seed]), tuple(counters))
    for n in range(50):
        expected = scalar_philox((seed & 0xFFFFFFFF, seed >> 32), tuple(counters[:, n].tolist()), 7)
        assert tuple(int(w[n]) for w in words) == expected


def test_mask_reads_the_fields_that_the_specification_names():
    seed, p = torch.tensor([77]), 0.3
    j = torch.arange(200)
    mask = dropout_mask(
        seed, p, i=torch.tensor(5), j=j, head=torch.tensor(2), sequence=torch.tensor(9)
    )
    for column in j.tolist():
        words = scalar_philox((77, 0), ((column // 64) * 8 + column % 8, 5, 2, 9), 7)
        field = (column % 64) // 8
        value = (words[field // 2] >> (16 * (field % 2))) & 0xFFFF
        assert bool(mask[column]) == (value >= dropout_threshold(p))


def coordinates(heads: int = 4, rows: int = 64, columns: int = 512) -> dict[str, torch.Tensor]:
    return {
        "i": torch.arange(rows)[:, None],
        "j": torch.arange(columns),
        "head": torch.arange(heads)[:, None, None],
        "sequence": torch.tensor(3),
    }


@pytest.mark.parametrize("p", [0.1, 0.17, 0.5, 0.9])
def test_keep_rate_is_binomial_in_every_head_and_overall(p):
    mask = dropout_mask(torch.tensor([42]), p, **coordinates())
    realised = 1 - dropout_threshold(p) / 65536
    assert abs(realised - (1 - p)) <= 2**-17
    for part in (mask, *mask):
        deviation = math.sqrt(realised * (1 - realised) / part.numel())
        assert abs(part.double().mean().item() - realised) < 5 * deviation


@pytest.mark.parametrize("shift", ["column", "row", "head", "eighth column", "seed"])
def test_neighbours_are_independent(shift):
    mask = dropout_mask(torch.tensor([42]), 0.5, **coordinates()).double() - 0.5
    other = {
        "column": mask.roll(1, 2),
        "row": mask.roll(1, 1),
        "head": mask.roll(1, 0),
        "eighth column": mask.roll(8, 2),
        "seed": dropout_mask(torch.tensor([43]), 0.5, **coordinates()).double() - 0.5,
    }[shift]
    correlation = (mask * other).mean().item() / 0.25
    assert abs(correlation) < 5 / math.sqrt(mask.numel())


def test_extreme_probabilities():
    keep_all = dropout_mask(torch.tensor([1]), 0.0, **coordinates())
    keep_none = dropout_mask(torch.tensor([1]), 1.0, **coordinates())
    assert keep_all.all() and dropout_scale(0.0) == 1.0
    assert not keep_none.any() and dropout_scale(1.0) == 0.0


@pytest.mark.parametrize("size", [1, 7, 64, 65, 200])
def test_hidden_dropout_draws_the_mask_of_every_feature(size):
    seed, p = torch.tensor([2**40 + 3]), 0.4
    sequence_ids, positions = torch.randint(2**20, (2, 3, 5))
    x = torch.randn(3, 5, size)
    keep = dropout_mask(
        seed,
        p,
        i=positions[..., None],
        j=torch.arange(size),
        head=torch.tensor(HIDDEN_HEAD),
        sequence=sequence_ids[..., None],
    )
    expected = torch.where(keep, x * dropout_scale(p), torch.zeros_like(x))
    assert torch.equal(hidden_dropout(x, p, seed, sequence_ids, positions), expected)
    assert hidden_dropout(x[:0], p, seed, sequence_ids[:0], positions[:0]).shape == (0, 5, size)
