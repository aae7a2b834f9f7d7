"""Pairs for next-sentence prediction, chosen as the original BERT chooses them (Devlin et al., 2019, appendix A.2)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Document = Sequence[Sequence[int]]


class SentencePair(NamedTuple):
    """Two spans of text, each of one or more sentences, as token ids.

    label: what `BertForNextSentencePrediction` calls it: 0 where second follows first, 1 where it is from elsewhere
    """

    first: list[int]
    second: list[int]
    label: int

    def input_ids(self, cls: int = 101, sep: int = 102) -> list[int]:
        """[CLS] first [SEP] second [SEP]"""
        return [cls, *self.first, sep, *self.second, sep]

    def token_type_ids(self) -> list[int]:
        """0 up to the first [SEP], then 1."""
        return [0] * (len(self.first) + 2) + [1] * (len(self.second) + 1)


def sentence_pairs(
    documents: Sequence[Document],
    seed: int,
    *,
    max_length: int = 128,
    short_probability: float = 0.1,
    repeats: int = 1,
) -> Iterator[SentencePair]:
    """All documents once, in their order, cut into pairs of spans.

    A chunk of whole sentences is filled to max_length less three specials, or with short_probability to a random
    shorter length. Its first sentences, a random number of them, are the first span. The second is their continuation,
    or in half of the cases text from another document: then the rest of the chunk is used again. What is too long is
    cut token by token from the longer span, at a random end.

    documents: each a sequence of sentences, each a sequence of token ids; empty ones are passed over
    seed:      decides everything; repeats: how often to go through the documents, drawn anew each time

    Raises ValueError for a max_length below 5 (three specials and a token each), for a probability outside [0, 1] and
    where fewer than two documents hold text.
    """
    if max_length < 5:
        raise ValueError(f"sentence_pairs: max_length must be at least 5, got {max_length}")
    if not 0.0 <= short_probability <= 1.0:
        raise ValueError(
            f"sentence_pairs: short_probability must be in [0, 1], got {short_probability}"
        )
    filled = [[s for s in document if len(s)] for document in documents]
    filled = [document for document in filled if document]
    if len(filled) < 2:
        raise ValueError(
            f"sentence_pairs: at least two documents must hold text, got {len(filled)}"
        )
    return _all_pairs(filled, random.Random(seed), max_length - 3, short_probability, repeats)


def _all_pairs(
    documents: list[list[Sequence[int]]],
    rng: random.Random,
    most: int,
    short_probability: float,
    repeats: int,
) -> Iterator[SentencePair]:
    for _ in range(repeats):
        for index in range(len(documents)):
            yield from _pairs_of(documents, index, rng, most, short_probability)


def _pairs_of(
    documents: list[list[Sequence[int]]],
    index: int,
    rng: random.Random,
    most: int,
    short_probability: float,
) -> Iterator[SentencePair]:
    document = documents[index]
    target = rng.randint(2, most) if rng.random() < short_probability else most
    begin = place = length = 0
    while place < len(document):
        length += len(document[place])
        place += 1
        if place < len(document) and length < target:
            continue
        chunk = document[begin:place]
        cut = rng.randint(1, len(chunk) - 1) if len(chunk) > 1 else 1
        first = [token for sentence in chunk[:cut] for token in sentence]
        elsewhere = len(chunk) == 1 or rng.random() < 0.5
        if elsewhere:
            second = _from_another(documents, index, rng, target - len(first))
            place -= len(chunk) - cut  # the sentences that were not used come again
        else:
            second = [token for sentence in chunk[cut:] for token in sentence]
        _truncate(first, second, most, rng)
        yield SentencePair(first, second, int(elsewhere))
        begin, length = place, 0


def _from_another(
    documents: list[list[Sequence[int]]], index: int, rng: random.Random, wanted: int
) -> list[int]:
    other = rng.randrange(len(documents) - 1)
    other += other >= index
    sentences = documents[other]
    found: list[int] = []
    for sentence in sentences[rng.randrange(len(sentences)) :]:
        found.extend(sentence)
        if len(found) >= wanted:
            break
    return found


def _truncate(first: list[int], second: list[int], most: int, rng: random.Random) -> None:
    while len(first) + len(second) > most:
        longer = first if len(first) > len(second) else second
        longer.pop(0 if rng.random() < 0.5 else -1)
