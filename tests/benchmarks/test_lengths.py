"""Drawn lengths follow the shipped counts, and the counts those of the text they were made from."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from scipy import stats

from ctxfast.benchmarks import lengths


@pytest.mark.parametrize("name", ["sms_spam", "mrpc_train_pairs", "xquad_contexts"])
def test_draws_follow_the_distribution(name):
    """Chi-square over ten bins of equal weight, at a level that a right draw misses once in ten thousand."""
    counts = lengths.counts(name)
    drawn = np.array(lengths.draw(name, 4000, seed=1, maximum=10_000))
    values = np.array(list(counts))
    share = np.array(list(counts.values())) / sum(counts.values())
    bins = np.minimum((np.cumsum(share) * 10).astype(int), 9)
    lookup = dict(zip(values.tolist(), bins.tolist(), strict=True))
    observed = np.bincount([lookup[int(x)] for x in drawn], minlength=10)
    expected = np.bincount(bins, weights=share, minlength=10) * len(drawn)
    used = expected > 0
    assert stats.chisquare(observed[used], expected[used]).pvalue > 1e-4


def test_a_draw_depends_on_its_arguments_alone():
    first = lengths.draw("sms_spam", 32, seed=3)
    assert first == lengths.draw("sms_spam", 32, seed=3)
    assert first != lengths.draw("sms_spam", 32, seed=4)
    assert lengths.draw("sms_spam", 6, seed=0) == [34, 9, 27, 12, 12, 15]


def test_batches_are_the_draw_in_pieces():
    batches = lengths.draw_batches("mrpc_train_pairs", 3, 5, seed=2)
    assert list(itertools.chain(*batches)) == lengths.draw("mrpc_train_pairs", 15, seed=2)
    assert [len(batch) for batch in batches] == [5, 5, 5]


def test_long_ones_are_cut():
    drawn = lengths.draw("movie_reviews_long", 50, maximum=512)
    assert max(drawn) == 512 and min(drawn) > 0


def test_shipped_counts_are_those_of_the_text(data):
    source = json.loads((data / "token_lengths" / "lengths_bert_base_uncased.json").read_text())
    assert set(lengths.names()) == set(source)
    for name, table in source.items():
        assert lengths.counts(name) == {int(length): count for length, count in table.items()}


def test_fill():
    assert lengths.fill([4, 2, 2]) == pytest.approx(8 / 12)


@pytest.mark.parametrize("buckets", [1, 2, 3, 7, 20])
def test_buckets_are_a_sorted_partition_with_the_fewest_padded_tokens(buckets):
    batch = lengths.draw("sms_spam", 7, seed=buckets)
    groups = lengths.length_buckets(batch, buckets)
    assert sorted(itertools.chain(*groups)) == list(range(7))
    assert len(groups) <= buckets
    ordered = sorted(batch)

    def padded(cuts):
        edges = [0, *cuts, 7]
        return sum((b - a) * ordered[b - 1] for a, b in itertools.pairwise(edges))

    best = min(
        padded(cuts)
        for count in range(min(buckets, 7))
        for cuts in itertools.combinations(range(1, 7), count)
    )
    assert sum(len(group) * max(batch[i] for i in group) for group in groups) == best


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lengths.draw("novel", 3), "name must be one of sms_spam, .*, got 'novel'"),
        (lambda: lengths.draw("sms_spam", -1), "size must be at least 0, got -1"),
        (lambda: lengths.fill([]), "lengths must be a non-empty sequence"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
