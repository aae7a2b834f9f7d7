"""Pairs of spans: where they come from, how long they are, how many are random."""

from __future__ import annotations

import random

import pytest

from ctxfast import bert


def corpus(documents: int = 40, seed: int = 0) -> list[list[list[int]]]:
    """Sentences of tokens that count through each document: document * 10,000 + place."""
    rng = random.Random(seed)
    found = []
    for number in range(documents):
        place, sentences = number * 10_000, []
        for _ in range(rng.randint(1, 30)):
            length = rng.randint(1, 40)
            sentences.append(list(range(place, place + length)))
            place += length
        found.append(sentences)
    return found


def test_where_pairs_come_from() -> None:
    documents = corpus()
    pairs = list(bert.sentence_pairs(documents, seed=1, max_length=64))
    labels = [pair.label for pair in pairs]
    assert 0.45 < sum(labels) / len(labels) < 0.65
    short = 0
    for pair in pairs:
        assert pair.first and pair.second and len(pair.first) + len(pair.second) <= 61
        short += len(pair.first) + len(pair.second) < 30
        for span in (pair.first, pair.second):  # without a gap
            assert span == list(range(span[0], span[0] + len(span)))
        same = pair.first[0] // 10_000 == pair.second[0] // 10_000
        assert same == (pair.label == 0)
        if same:  # a gap only where the two were cut to fit
            gap = pair.second[0] - pair.first[-1]
            assert gap == 1 or (gap > 1 and len(pair.first) + len(pair.second) == 61)
    assert 0 < short < len(pairs) / 2
    # Every document is gone through, in order, and the rest of a chunk is used again.
    firsts = [pair.first[0] // 10_000 for pair in pairs]
    assert firsts == sorted(firsts) and set(firsts) == set(range(40))


def test_the_seed_decides() -> None:
    documents = corpus(10)
    once = list(bert.sentence_pairs(documents, 1))
    assert once == list(bert.sentence_pairs(documents, 1))
    assert once != list(bert.sentence_pairs(documents, 2))
    twice = list(bert.sentence_pairs(documents, 1, repeats=2))
    assert twice[: len(once)] == once and len(twice) > 1.5 * len(once)


def test_nothing_is_lost() -> None:
    """Without cuts, the spans of true pairs and the first spans of random ones cover every sentence once."""
    documents = corpus(20, seed=3)
    seen = []
    for pair in bert.sentence_pairs(documents, 4, max_length=2000, short_probability=0.0):
        seen += pair.first + ([] if pair.label else pair.second)
    assert seen == [token for document in documents for sentence in document for token in sentence]


def test_model_inputs() -> None:
    pair = bert.SentencePair([7, 8], [9], 1)
    assert pair.input_ids() == [101, 7, 8, 102, 9, 102]
    assert pair.input_ids(2, 3) == [2, 7, 8, 3, 9, 3]
    assert pair.token_type_ids() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([[[1, 2]]], {}, "at least two documents must hold text, got 1"),
        ([[[1]], [[]], []], {}, "at least two documents must hold text, got 1"),
        ([[[1]], [[2]]], {"max_length": 4}, "max_length must be at least 5, got 4"),
        ([[[1]], [[2]]], {"short_probability": 2}, "short_probability must be in"),
    ],
)
def test_bad_arguments(documents, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bert.sentence_pairs(documents, 0, **options)
