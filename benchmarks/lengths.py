"""Seeded batches whose sequence lengths follow real text: `draw("sms_spam", 32, seed=0)`.

The shipped counts say how many items of each public text set have each WordPiece length (special tokens counted,
pairs as one sequence). Padding is most of the work of a padded batch of such lengths, and uniform lengths hide it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

_FILE = Path(__file__).with_name("token_lengths.json")


@cache
def _sets() -> dict[str, dict[int, int]]:
    stored = json.loads(_FILE.read_text(encoding="utf-8"))["sets"]
    return {name: {length: count for length, count in pairs} for name, pairs in stored.items()}


def names() -> tuple[str, ...]:
    """The text sets whose length counts are shipped."""
    return tuple(_sets())


def counts(name: str) -> dict[int, int]:
    """{length in tokens: number of items} of one text set."""
    if name not in _sets():
        raise ValueError(f"lengths: name must be one of {', '.join(names())}, got {name!r}")
    return dict(_sets()[name])


def draw(name: str, size: int, *, seed: int = 0, maximum: int = 512) -> list[int]:
    """`size` lengths drawn with replacement from a text set; longer ones are cut to `maximum`, as a tokenizer does.

    The draw depends on the arguments alone: it is the same on every machine and Python version.
    """
    if size < 0:
        raise ValueError(f"lengths: size must be at least 0, got {size}")
    table = counts(name)
    generator = random.Random(f"{name}/{seed}")
    drawn = generator.choices(list(table), weights=list(table.values()), k=size)
    return [min(length, maximum) for length in drawn]


def draw_batches(
    name: str, batches: int, batch_size: int, *, seed: int = 0, maximum: int = 512
) -> list[list[int]]:
    """`batches` lists of `batch_size` lengths."""
    drawn = draw(name, batches * batch_size, seed=seed, maximum=maximum)
    return [drawn[i * batch_size : (i + 1) * batch_size] for i in range(batches)]


def fill(lengths: Sequence[int]) -> float:
    """The share of real tokens in one batch padded to its longest sequence, 0..1."""
    if not lengths:
        raise ValueError("lengths: lengths must be a non-empty sequence, got none")
    return sum(lengths) / (len(lengths) * max(lengths))


def length_buckets(lengths: Sequence[int], buckets: int) -> list[list[int]]:
    """Indices of a batch sorted by length and cut into at most `buckets` groups with the fewest padded tokens.

    The cut is exact (dynamic programming over the sorted lengths), so a peer that pads gets the best that sorting can
    give it.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    size = len(order)
    buckets = max(1, min(buckets, size))
    # best[j] = (padded tokens, cuts) of the j shortest sequences in the groups used so far
    best: list[tuple[int, tuple[int, ...]]] = [
        (j * lengths[order[j - 1]] if j else 0, ()) for j in range(size + 1)
    ]
    for _ in range(buckets - 1):
        best = [best[0]] + [
            min(
                [best[j]]
                + [
                    (best[i][0] + (j - i) * lengths[order[j - 1]], (*best[i][1], i))
                    for i in range(1, j)
                ]
            )
            for j in range(1, size + 1)
        ]
    edges = [0, *best[size][1], size] if size else []
    return [order[a:b] for a, b in zip(edges, edges[1:], strict=False)]
