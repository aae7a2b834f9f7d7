"""Dropout as a pure function of logical coordinates: the specification of the random mask.

Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):

    key     = (seed mod 2^32, seed div 2^32)
    counter = ((j div 64) * 8 + j mod 8, i, head, sequence)
    field   = 16-bit word number (j mod 64) div 8 of the 128-bit result, low half of each 32-bit word first
    dropped = field < round(p * 2^16);   kept values are multiplied by 2^16 / (2^16 - round(p * 2^16))

i and j are positions inside one sequence, so padded, packed, re-tiled and recomputed runs on any device draw the same
mask. Hidden dropout uses i = position, j = feature, head = 0xFFFFFFFF.
"""

from __future__ import annotations

import torch
from torch import Tensor

HIDDEN_HEAD = 0xFFFFFFFF

_ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def dropout_threshold(p: float) -> int:
    """The 16-bit threshold below which a field drops its element."""
    return int(p * 65536 + 0.5)


def dropout_scale(p: float) -> float:
    """Reciprocal of the realised keep probability; 0 where everything is dropped."""
    kept = 65536 - dropout_threshold(p)
    return 65536 / kept if kept else 0.0


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, in int64 without overflow."""
    low = word * (multiplier & 0xFFFF)  # < 2^48
    high = word * (multiplier >> 16)
    total = (low >> 16) + high  # < 2^49
    return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words (as int64) per broadcast counter. seed: int64 [1]."""
    c0, c1, c2, c3 = (c & _WORD for c in counter)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def dropout_mask(
    seed: Tensor, p: float, *, i: Tensor, j: Tensor, head: Tensor, sequence: Tensor
) -> Tensor:
    """True where the element at these broadcast int64 coordinates is kept. seed: int64 [1]."""
    counter = ((j // 64) * 8 + j % 8, i, head, sequence)
    words = torch.stack(torch.broadcast_tensors(*philox(seed, counter)))  # [4, ...]
    number = ((j % 64) // 8).expand(words.shape[1:])  # which of the eight fields
    word = words.gather(0, (number // 2).unsqueeze(0)).squeeze(0)
    field = (word >> (16 * (number % 2))) & 0xFFFF
    return field >= dropout_threshold(p)


def hidden_dropout(
    input: Tensor, p: float, seed: Tensor, sequence_ids: Tensor, positions: Tensor
) -> Tensor:
    """Dropout on features [..., N]; sequence_ids and positions are int64 [...], one pair a row.

    `dropout_mask` of every feature, with each counter computed once for the eight features that share it.
    """
    size = input.shape[-1]
    lanes = torch.arange(-(-size // 64) * 8, device=input.device)  # 8 a block of 64 features
    i, sequence = (x.long().unsqueeze(-1) for x in (positions, sequence_ids))
    words = philox(seed, (lanes, i, torch.full_like(lanes, HIDDEN_HEAD), sequence))
    fields = torch.stack([part for word in words for part in (word & 0xFFFF, word >> 16)], -2)
    fields = fields.unflatten(-1, (-1, 8)).transpose(
        -3, -2
    )  # [..., 8, N / 8] -> [..., N / 64, 8, 8]
    keep = fields.flatten(-3)[..., :size] >= dropout_threshold(p)
    return torch.where(keep, input * dropout_scale(p), torch.zeros_like(input))
