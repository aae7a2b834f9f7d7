"""Seeded random attention cases: drawing, shrinking, and which pairs of features a run has covered."""

from __future__ import annotations

import functools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from itertools import combinations

import torch

from tests.ops.attention_cases import DTYPES, ISAS, Case

BOUNDARIES = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
LONG = 129  # in every fourth case one side has at least so many tokens
HEAD_DIMS = (8, 32, 64, 64, 64, 80, 128, 256)

# Largest sequence and largest number of scores [B, H, Sq, Sk]: what the eager float64 answer, or the interpreter, can
# afford many times.
LIMITS = {"native": (640, 1 << 16), "reference": (640, 1 << 16), "triton": (200, 1 << 13)}


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return min(high, int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))


def _length(rng: random.Random, longest: int, shortest: int = 1) -> int:
    if rng.random() < 0.25:
        return rng.choice([n for n in BOUNDARIES if shortest <= n <= longest])
    return _log_uniform(rng, shortest, longest)


def _broadcast(rng: random.Random) -> tuple[int, int, int, int]:
    return tuple(int(rng.random() < share) for share in (0.4, 0.6, 0.8, 0.8))


def _limited(rng: random.Random, case: Case, scores: int) -> Case:
    """case with fewer sequences and heads, then with a shorter side, until its scores are within the limit.

    The longest side stays.
    """
    while math.prod(case.scores) > scores:
        if case.packed and len(case.lengths_q) > 2:
            count = len(case.lengths_q)
            longest = max(range(count), key=lambda b: max(case.lengths_q[b], case.lengths_k[b]))
            others = [b for b in range(count) if b != longest]
            keep = sorted([longest, *rng.sample(others, count // 2 - 1)])
            case = replace(
                case,
                lengths_q=tuple(case.lengths_q[b] for b in keep),
                lengths_k=tuple(case.lengths_k[b] for b in keep),
            )
        elif case.heads > 1:
            case = replace(case, heads=case.heads // 2)
        elif case.batch > 1 and not case.packed:
            case = replace(case, batch=case.batch // 2)
        elif case.packed:
            side = "lengths_q" if max(case.lengths_q) < max(case.lengths_k) else "lengths_k"
            case = replace(case, **{side: tuple(n // 2 for n in getattr(case, side))}, slack=0)
        else:
            side = "seqlen_q" if case.seqlen_q < case.seqlen_k else "seqlen_k"
            case = replace(case, **{side: getattr(case, side) // 2})
    return case


def draw(seed: int, index: int, backend: str) -> Case:
    """Case number `index` of a seed: the same on every machine.

    Every fourth has a side of more than 128, and two of five have strides.
    """
    rng = random.Random(f"{seed}:{index}")
    longest, scores = LIMITS[backend]
    strided = index % 5 < 2
    long_side = rng.choice("qk") if index % 4 == 0 else ""
    memories = ("transposed", "columns", "gaps", "fused", "expanded")
    case = Case(
        batch=_log_uniform(rng, 1, 6),
        heads=_log_uniform(rng, 1, 6),
        seqlen_q=_length(rng, longest, LONG if long_side == "q" else 1),
        seqlen_k=_length(rng, longest, LONG if long_side == "k" else 1),
        head_dim=rng.choice(HEAD_DIMS) if rng.random() < 0.4 else _log_uniform(rng, 1, 256),
        dtype=rng.choice(DTYPES[backend]),
        key_padding=rng.choice(("none", "none", "prefix", "left", "holes", "empty")),
        attn_mask=_broadcast(rng) if rng.random() < 0.3 else None,
        bias=_broadcast(rng) if rng.random() < 0.4 else None,
        bias_kind=rng.choice(("finite", "infinite")),
        bias_grad=rng.random() < 0.75,
        is_causal=rng.random() < 0.3,
        window=rng.choice(
            [(-1, -1)] * 3 + [(_log_uniform(rng, 1, 99) - 1, -1), (-1, 5), (0, 0), (7, 70)]
        ),
        dropout_p=rng.choice((0.0, 0.0, 0.1, 0.17, 0.5, 1.0)),
        scale=rng.choice((None, None, 0.3, -0.2)),
        memory=rng.choice(memories) if strided else "contiguous",
        grad_memory=rng.choice(("transposed", "columns", "rows", "scalar"))
        if strided
        else "contiguous",
        lse_grad=rng.random() < 0.5,
        magnitude=rng.choice((1.0, 1.0, 1.0, 3.0)),
        seed=rng.randrange(1, 1 << 32),
        threads=rng.choice((1, 1, 2, 3)),
        isa=rng.choice(ISAS),
    )
    if rng.random() < 0.4:
        count = _log_uniform(rng, 1, 9)
        lengths = [
            tuple(0 if rng.random() < 0.15 else _length(rng, longest) for _ in range(count))
            for _ in "qk"
        ]
        if long_side:
            of_side = lengths["qk".index(long_side)]
            lengths["qk".index(long_side)] = (_length(rng, longest, LONG), *of_side[1:])
        same = rng.random() < 0.5
        case = replace(
            case,
            lengths_q=lengths[0],
            lengths_k=lengths[0] if same and long_side != "k" else lengths[1],
            tail=rng.choice((0, 0, 1, 37)),
            slack=rng.choice((0, 0, 13)),
            key_padding="none",
            attn_mask=None,
        )
    # The eager path keeps its scores in the dtype of the case: half precision does not hold large ones.
    if backend == "reference" and case.dtype in (torch.bfloat16, torch.float16):
        case = replace(case, magnitude=1.0)
    return _limited(rng, case, scores)


_SIMPLER = {
    "dtype": torch.float32,
    "threads": 1,
    "magnitude": 1.0,
    "tail": 0,
    "slack": 0,
    "window": (-1, -1),
    "head_dim": 16,
}


def shrink(case: Case, fails: Callable[[Case], bool], attempts: int = 60) -> Case:
    """A simpler case that still fails: fields one by one at their default, then sizes halved."""
    defaults = {f.name: f.default for f in fields(Case)} | _SIMPLER
    skip = {"batch", "heads", "seqlen_q", "seqlen_k", "lengths_q", "lengths_k", "seed", "isa"}
    candidates = [
        lambda c, n=name, v=value: replace(c, **{n: v})
        for name, value in defaults.items()
        if name not in skip
    ]
    candidates += [
        lambda c, n=name: replace(c, **{n: max(1, getattr(c, n) // 2)})
        for name in ("batch", "heads", "seqlen_q", "seqlen_k", "head_dim") * 4
    ]
    candidates += [
        lambda c: (
            c
            if not c.packed or len(c.lengths_q) < 2
            else replace(c, lengths_q=c.lengths_q[:-1], lengths_k=c.lengths_k[:-1])
        )
    ] * 4
    for candidate in candidates[:attempts]:
        simpler = candidate(case)
        if simpler != case and fails(simpler):
            case = simpler
    return case


def describe(case: Case) -> str:
    """The case as Python, fields at their default left out."""
    changed = [f for f in fields(Case) if getattr(case, f.name) != f.default]
    return f"Case({', '.join(f'{f.name}={getattr(case, f.name)!r}' for f in changed)})"


def _bucket(n: int) -> str:
    buckets = {0: "0", 1: "1", 16: "2-16", 128: "17-128"}
    return next((name for bound, name in buckets.items() if n <= bound), ">128")


def features(case: Case) -> dict[str, str]:
    """The features of a case, by name."""
    rows, columns = (
        (max(x) for x in (case.lengths_q, case.lengths_k)) if case.packed else case.scores[2:]
    )
    masks = [case.key_padding] if case.key_padding != "none" else []
    masks += ["mask"] if case.attn_mask else []
    bias = "none"
    if case.bias is not None:
        bias = f"{'shared' if not case.bias[0] else 'own'}{'+rows' if case.bias[2] else ''}"
    sides = ("left" if case.window[0] >= 0 else "", "right" if case.window[1] >= 0 else "")
    return {
        "layout": "packed" if case.packed else "padded",
        "dtype": str(case.dtype).removeprefix("torch."),
        "queries": _bucket(rows),
        "keys": _bucket(columns),
        "head": f"{'odd' if case.head_dim % 2 else 'even'}{'>64' if case.head_dim > 64 else ''}",
        "mask": "+".join(masks) or "none",
        "bias": bias,
        "-inf": "yes" if case.bias and case.bias_kind == "infinite" else "no",
        "dbias": "yes" if case.bias and case.bias_grad else "no",
        "causal": str(case.is_causal),
        "window": "+".join(filter(None, sides)) or "none",
        "dropout": {0.0: "0", 1.0: "1"}.get(case.dropout_p, "p"),
        "memory": case.memory,
        "grad": case.grad_memory,
        "dlse": str(case.lse_grad),
        "isa": case.isa,
    }


Pairs = dict[tuple[str, str], set[tuple[str, str]]]


def pairs(cases: Iterable[Case]) -> Pairs:
    """For every two features, the pairs of values that some case has."""
    seen: Pairs = defaultdict(set)
    for case in cases:
        for (a, x), (b, y) in combinations(features(case).items(), 2):
            seen[a, b].add((x, y))
    return seen


@functools.cache
def possible_pairs(backend: str) -> Pairs:
    """Every pair of values that the generator draws at all, found by drawing many cases without running them."""
    return pairs(draw(-1, index, backend) for index in range(10000))


def coverage_table(seen: Pairs, possible: Pairs) -> tuple[str, float]:
    """A table of seen/possible value pairs for every two features, and the share seen."""
    rows = list(dict.fromkeys(a for a, _ in possible))
    columns = list(dict.fromkeys(b for _, b in possible))
    lines = ["".rjust(8) + "".join(name.rjust(9) for name in columns)]
    for a in rows:
        cells = [
            f"{len(seen[a, b] & possible[a, b])}/{len(possible[a, b])}"
            if (a, b) in possible
            else ""
            for b in columns
        ]
        lines.append(a.rjust(8) + "".join(cell.rjust(9) for cell in cells))
    total = sum(len(values) for values in possible.values())
    share = sum(len(seen[key] & values) for key, values in possible.items()) / total
    return "\n".join(lines), share
