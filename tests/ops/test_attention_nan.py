"""A NaN reaches the results and gradients of what attends it and no others, whatever the kernels compute together.

The exact ones come from a loop over query rows, each with no other keys than those it attends.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.ops.attention_cases import (
    DTYPES,
    ISAS,
    Case,
    Inputs,
    build,
    names,
    run,
    run_reference,
)
from tests.oracle import assert_matches

POISONED = ("query", "key", "value", "grad_output", "grad_lse")  # one in each head
ALL = Case(heads=len(POISONED), seqlen_q=200, seqlen_k=210, head_dim=24, bias=(1, 1, 1, 1))
WIDE = replace(ALL, batch=1, seqlen_q=190, seqlen_k=190, head_dim=256)  # two blocks of keys

# Case, row of the queries, row of the keys. In WIDE the key is such that the forward leaves the rows alone whose keys
# lie in both blocks, but where they are near: these take another way then, with other roundings.
CASES = {
    "causal": (replace(ALL, is_causal=True), 100, 60),
    "left": (replace(ALL, window=(5, -1)), 70, 60),
    "right": (replace(ALL, window=(-1, 5), threads=1), 3, 199),
    "both": (replace(ALL, window=(20, 11)), 131, 140),
    "holes": (replace(ALL, key_padding="holes"), 100, 60),
    "padding": (replace(ALL, key_padding="left", window=(-1, 3), bias=(0, 1, 1, 0)), 180, 160),
    "left padding": (replace(ALL, key_padding="left", bias=None), 100, 190),
    "packed": (
        replace(ALL, lengths_q=(70, 0, 130), lengths_k=(60, 3, 130), window=(9, 4), tail=3),
        90,
        100,
    ),
    "wide": (replace(WIDE, window=(20, 11)), 131, 40),
    "wide left": (replace(WIDE, window=(5, -1), threads=1), 20, 90),
    "near": (replace(WIDE, window=(20, 11)), 131, 106),
    "any mask": (replace(ALL, attn_mask=(1, 0, 1, 1), bias=None), 100, 60),
    "shared bias": (replace(ALL, is_causal=True, bias=(0, 0, 1, 1)), 100, 60),
}


def poison(inputs: Inputs, case: Case, row: int, key: int) -> None:
    """NaN in one element of a tensor of each head, of the last sequence if padded."""
    for head, name in enumerate(POISONED):
        at = key if name in ("key", "value") else row
        tensor = getattr(inputs, name)
        if name == "grad_lse":
            tensor[(head, at) if case.packed else (-1, head, at)] = torch.nan
        else:
            tensor[(at, head, 3) if case.packed else (-1, head, at, 3)] = torch.nan


def sequences(case: Case, tensor: Tensor, side: str, row_dim: int = -2) -> list[Tensor]:
    """[H, S, ...] of each sequence."""
    if not case.packed:
        return list(tensor)
    lengths = list(case.lengths_q if side == "q" else case.lengths_k)
    by_head = tensor.transpose(0, 1) if tensor.dim() == 3 else tensor
    return list(by_head.split([*lengths, case.tail], dim=1))[:-1]


def attended(case: Case, inputs: Inputs, b: int, row: int, keys: int) -> Tensor:
    left, right = case.window
    j = torch.arange(keys)
    allowed = j >= row - left if left >= 0 else torch.ones(keys, dtype=torch.bool)
    if case.is_causal:
        right = 0
    if right >= 0:
        allowed &= j <= row + right
    if (padding := inputs.arguments.get("key_padding_mask")) is not None:
        allowed &= padding[b]
    if (mask := inputs.arguments.get("attn_mask")) is not None:
        allowed &= mask[b, 0, row]
    return allowed.nonzero()[:, 0]


def exact_results(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Those of `run`, in float64."""
    tensors = [x.double() for x in (inputs.query, inputs.key, inputs.value)]
    gradients = [torch.zeros_like(x) for x in tensors]
    outputs = [torch.zeros_like(tensors[0]), torch.full_like(inputs.grad_lse.double(), -torch.inf)]
    per_sequence = [
        *(sequences(case, x, side) for x, side in zip(tensors, "qkk", strict=True)),
        *(sequences(case, x, side) for x, side in zip(gradients, "qkk", strict=True)),
        sequences(case, inputs.grad_output.double(), "q"),
        sequences(case, inputs.grad_lse.double(), "q"),
        *(sequences(case, x, "q") for x in outputs),
    ]
    bias = inputs.bias.double() if case.bias else torch.zeros(1)
    bias, dbias = bias.expand(case.scores), torch.zeros(case.scores, dtype=torch.float64)
    scale = case.head_dim**-0.5
    for b, (query, key, value, dquery, dkey, dvalue, grad, grad_lse, output, lse) in enumerate(
        zip(*per_sequence, strict=True)
    ):
        # From the last row on: in the order of the eager functions, sums would share their rounding of float64.
        for row in reversed(range(query.shape[1])):
            seen = attended(case, inputs, b, row, key.shape[1])
            if len(seen) == 0:
                continue
            q, k, v, g = query[:, row, None], key[:, seen], value[:, seen], grad[:, row, None]
            scores = (q * k).sum(-1) * scale + bias[b, :, row, seen]
            weights = scores.softmax(-1)
            output[:, row] = (weights[..., None] * v).sum(-2)
            lse[:, row] = scores.logsumexp(-1)
            along = (g * v).sum(-1)  # [H, seen], like the weights and the gradients of the scores
            centred = along - (weights * along).sum(-1, keepdim=True)
            dscores = weights * (centred + grad_lse[:, row, None])
            dquery[:, row] = scale * (dscores[..., None] * k).sum(-2)
            dkey[:, seen] += scale * dscores[..., None] * q
            dvalue[:, seen] += weights[..., None] * g
            dbias[b, :, row, seen] = dscores
    if case.bias:
        gradients.append(dbias.sum_to_size(inputs.bias.shape))
    return dict(zip(names(case), [*outputs, *gradients], strict=True))


@cache
def expected(name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The exact results, and those of the eager functions without a NaN."""
    case, row, key = CASES[name]
    case = replace(case, dtype=dtype)
    inputs = build(case)
    eager = run_reference(case, inputs)
    poison(inputs, case, row, key)
    return exact_results(case, inputs), eager


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES["native"], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_nan_reaches_what_attends_it_and_no_others(name, dtype, isa):
    case, row, key = CASES[name]
    case = replace(case, dtype=dtype, isa=isa)
    inputs = build(case)
    clean = run(case, inputs, "native")
    poison(inputs, case, row, key)
    found = run(case, inputs, "native")
    exact, eager = expected(name, dtype)
    for result, truth in exact.items():
        reached = truth.isnan()
        assert reached.any() and not reached.all()
        assert_matches(found[result], eager[result], truth, name=result)
        if name == "near" or result == "output":  # of rows that are attended without neighbours
            continue
        if result != "dbias":
            reached = reached.any(-1, keepdim=True)
        untouched = found[result].masked_fill(reached, 0.0)
        assert torch.equal(untouched, clean[result].masked_fill(reached, 0.0)), result
