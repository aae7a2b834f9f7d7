"""Lines to token sequences of bounded length, and token sequences to batches of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np


class Piece(NamedTuple):
    """One sequence for the model: a whole line, or a part of a line that was split.

    Of its `ids` ([CLS] ... [SEP]) the rows `first` to `last` belong to the output: where a line is
    split, the inner [SEP] and [CLS] do not, so the rows of a line are always [CLS] words [SEP].
    """

    line: int
    ids: list[int]
    first: int
    last: int

    @property
    def kept(self) -> int:
        return self.last - self.first


class LineTokenizer:
    """Word pieces of lines, and what becomes of lines that are too long.

    Args:
        tokenizer: a BERT tokenizer with Hugging Face's methods.
        max_length: tokens per sequence, [CLS] and [SEP] included.
        overlong: "truncate", "split" or "error".

    Attributes:
        overlong_lines: how many lines were longer than `max_length` so far.
        spellings: the vocabulary as UTF-8 strings by id, numpy type S.
    """

    def __init__(self, tokenizer: Any, max_length: int, overlong: str) -> None:
        self._tokenizer = tokenizer
        self._max_words = max_length - 2
        self._max_length = max_length
        self._overlong = overlong
        self._cls, self._sep = int(tokenizer.cls_token_id), int(tokenizer.sep_token_id)
        self._lines = 0
        self.overlong_lines = 0
        spelled = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.spellings = np.array([(token or "").encode() for token in spelled])

    def __call__(self, lines: Sequence[str]) -> list[Piece]:
        """Pieces in the order of `lines`; none for a line without word pieces.

        Raises:
            ValueError: a line is too long and `overlong` is "error".
        """
        words = self._tokenizer(
            list(lines),
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        pieces: list[Piece] = []
        for line, ids in enumerate(words):
            if len(ids) > self._max_words:
                pieces += self._shorten(line, ids)
            elif ids:
                whole = [self._cls, *ids, self._sep]
                pieces.append(Piece(line, whole, 0, len(whole)))
        self._lines += len(lines)
        return pieces

    def _shorten(self, line: int, ids: list[int]) -> Iterator[Piece]:
        self.overlong_lines += 1
        if self._overlong == "error":
            raise ValueError(
                f"embed: a line must have at most {self._max_length} tokens,"
                f" got {len(ids) + 2} in line {self._lines + line + 1}"
            )
        size = self._max_words
        if self._overlong == "truncate":
            yield Piece(line, [self._cls, *ids[:size], self._sep], 0, size + 2)
            return
        for start in range(0, len(ids), size):
            part = [self._cls, *ids[start : start + size], self._sep]
            at_end = start + size >= len(ids)
            yield Piece(line, part, 0 if start == 0 else 1, len(part) - (0 if at_end else 1))


def batches(pieces: Sequence[Piece], batch_tokens: int) -> Iterator[list[int]]:
    """Indices into `pieces`, longest first, in groups of at most `batch_tokens` tokens.

    A piece that is longer than `batch_tokens` makes a batch of its own.
    """
    order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i].ids))
    batch: list[int] = []
    held = 0
    for i in order:
        length = len(pieces[i].ids)
        if batch and held + length > batch_tokens:
            yield batch
            batch, held = [], 0
        batch.append(i)
        held += length
    if batch:
        yield batch


def windows(pieces: Sequence[Piece], tokens: int) -> Iterator[Sequence[Piece]]:
    """Consecutive pieces that hold at most `tokens` tokens together, or one piece."""
    start, held = 0, 0
    for i, piece in enumerate(pieces):
        if i > start and held + len(piece.ids) > tokens:
            yield pieces[start:i]
            start, held = i, 0
        held += len(piece.ids)
    if start < len(pieces):
        yield pieces[start:]
