"""Masked words: how many, which, and what they become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ctxfast import bert

MASK, SPECIAL = 103, (0, 101, 102)


def grid(rows: int, width: int, low: int = 1000, high: int = 2000) -> Tensor:
    """[CLS] words [SEP] on every row."""
    ids = torch.randint(low, high, (rows, width))
    ids[:, 0], ids[:, -1] = 101, 102
    return ids


def test_counts_are_those_of_the_original() -> None:
    """max(1, round(length * k)), rounded half to even, specials counted, at most max_predictions."""
    for width, expected in ((4, 1), (10, 2), (30, 4), (128, 19), (512, 77)):
        ids = grid(3, width)
        labels = bert.mask_tokens(ids)[1]
        assert (labels != -100).sum(1).tolist() == [expected] * 3
    labels = bert.mask_tokens(ids, max_predictions=20)[1]
    assert (labels != -100).sum(1).tolist() == [20] * 3
    assert (bert.mask_tokens(grid(2, 3), 1.0)[1] != -100).sum(1).tolist() == [1, 1]


@pytest.mark.parametrize("exact", [True, False])
def test_what_chosen_tokens_become(exact: bool) -> None:
    ids = grid(400, 102)
    original = ids.clone()
    masked, labels = bert.mask_tokens(ids, exact=exact)
    assert torch.equal(ids, original)
    chosen = labels != -100
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(masked[~chosen], ids[~chosen])
    assert not chosen[:, 0].any() and not chosen[:, -1].any()
    count = int(chosen.sum())
    if exact:
        assert chosen.sum(1).tolist() == [15] * 400
    else:
        assert abs(count / 40_000 - 0.15) < 0.008 and len(set(chosen.sum(1).tolist())) > 5
    became = masked[chosen]
    hidden = (became == MASK).float().mean().item()
    kept = (became == labels[chosen]).float().mean().item()
    assert abs(hidden - 0.8) < 0.02 and abs(kept - 0.1) < 0.016
    drawn = became[(became != MASK) & (became != labels[chosen])]
    assert drawn.min() < 1000 and drawn.max() > 29_000  # from the whole vocabulary
    # Every place is as likely as any other.
    assert chosen[:, 1:-1].float().mean(0).std() < 0.04


def test_padding_and_specials_are_left_alone() -> None:
    ids = grid(50, 20)
    ids[:, 12:] = 0
    ids[:, 11] = 102
    ids[:, 5] = MASK
    for options in ({}, {"exact": False}, {"attention_mask": (ids != 0).long()}):
        _, labels = bert.mask_tokens(ids, 0.5, **options)
        assert not (labels[:, 11:] != -100).any() and not (labels[:, [0, 5]] != -100).any()
        if options != {"exact": False}:
            assert (labels != -100).sum(1).tolist() == [6] * 50
    masked, labels = bert.mask_tokens(ids[0], 1.0, mask_share=1.0, random_share=0.0)
    assert masked.shape == (20,)
    assert (masked == MASK).sum() == 10 and (labels != -100).sum() == 9
    only = torch.tensor([[101, 102]])
    assert torch.equal(bert.mask_tokens(only)[0], only)
    assert bert.mask_tokens(ids[:0])[0].shape == (0, 20)


def test_generator() -> None:
    ids = grid(4, 30)
    runs = [bert.mask_tokens(ids, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][1], runs[2][1])


@pytest.fixture
def tokenizer(tmp_path: Path) -> bert.BertTokenizer:
    """Words w0 ... w99, each with pieces ##a ... ##e behind it."""
    pytest.importorskip("tokenizers")
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(100)),
               *(f"##{c}" for c in "abcde")]  # fmt: skip
    (tmp_path / "vocab.txt").write_text("\n".join(entries))
    return bert.BertTokenizer.from_pretrained(tmp_path)


def words_of(row: list[int]) -> list[list[int]]:
    """Places of each word's pieces."""
    found: list[list[int]] = []
    for place, token in enumerate(row):
        if 5 <= token < 105:
            found.append([place])
        elif token >= 105:
            found[-1].append(place)
    return found


@pytest.mark.parametrize("exact", [True, False])
def test_whole_words(tokenizer: Any, exact: bool) -> None:
    rows = []
    for _ in range(200):
        row = [2]
        while len(row) < 39:
            row += [int(torch.randint(5, 105, ()))] + [105, 106, 107][: int(torch.randint(4, ()))]
        rows.append([*row[:39], 3])
    ids = torch.tensor(rows)
    masked, labels = bert.mask_tokens(ids, tokenizer=tokenizer, whole_words=True, exact=exact)
    chosen = labels != -100
    hits, total = 0, 0
    for row, picked in zip(rows, chosen.tolist(), strict=True):
        words = words_of(row)
        states = [{picked[place] for place in word} for word in words]
        assert all(len(state) == 1 for state in states)
        hits += sum(True in state for state in states)
        total += len(words)
    if exact:
        assert (chosen.sum(1) <= 6).all() and (chosen.sum(1) >= 5).float().mean() > 0.9
    else:
        assert abs(hits / total - 0.15) < 0.02
    # Each piece of a chosen word meets its own fate.
    became = masked[chosen]
    assert abs((became == tokenizer.mask_token_id).float().mean() - 0.8) < 0.05
    assert masked.max() < len(tokenizer)
    with pytest.raises(ValueError, match="whole_words needs a tokenizer"):
        bert.mask_tokens(ids, whole_words=True)


def test_a_long_word_is_passed_over(tokenizer: Any) -> None:
    ids = torch.tensor([[2, 5, 105, 105, 105, 105, 6, 3]])
    for _ in range(20):
        _, labels = bert.mask_tokens(ids, 0.25, tokenizer=tokenizer, whole_words=True)
        assert (labels != -100).nonzero().tolist() == [[0, 6]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ids": [1, 2]}, TypeError, "ids must be an int64 tensor, got list"),
        ({"ids": torch.ones(2, 2)}, TypeError, "ids must be an int64 tensor, got torch.float32"),
        ({"ids": torch.ones(1, 2, 2).long()}, ValueError, r"ids must be \[B, S\] or \[S\]"),
        ({"k": 1.5}, ValueError, r"k must be in \[0, 1\], got 1.5"),
        ({"mask_share": 0.95}, ValueError, "must add up to at most 1"),
        ({"attention_mask": torch.ones(1, 2)}, ValueError, r"attention_mask must be \(2, 3\)"),
        ({"max_predictions": 0}, ValueError, "max_predictions must be at least 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"mask_tokens: .*{message}"):
        bert.mask_tokens(**{"ids": torch.ones(2, 3).long(), **arguments})
