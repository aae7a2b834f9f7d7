"""Lines to pieces and pieces to batches."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxfast.embeddings.pieces import LineTokenizer, Piece, batches, windows

CLS, SEP = 1, 2


class LetterTokenizer:
    """One id per letter, nothing for a blank: enough of a BERT tokenizer to follow every id."""

    cls_token_id, sep_token_id = CLS, SEP

    def __len__(self):
        return 30

    def __call__(self, lines, **arguments):
        assert arguments["add_special_tokens"] is False
        assert arguments["padding"] is False and arguments["truncation"] is False
        return {"input_ids": [[ord(letter) - 87 for letter in line] for line in lines]}

    def convert_ids_to_tokens(self, ids):
        return [chr(i + 87) if i >= 10 else f"<{i}>" for i in ids]


def letters(piece):
    return "".join(chr(i + 87) for i in piece.ids if i not in (CLS, SEP))


def test_short_lines_are_whole_and_blank_ones_absent():
    tokenize = LineTokenizer(LetterTokenizer(), 5, "truncate")
    pieces = tokenize(["abc", "", "a"])
    assert pieces == [Piece(0, [CLS, 10, 11, 12, SEP], 0, 5), Piece(2, [CLS, 10, SEP], 0, 3)]
    assert tokenize.overlong_lines == 0
    assert tokenize.spellings[10] == b"a"


def test_truncate_keeps_the_first_words_and_counts():
    tokenize = LineTokenizer(LetterTokenizer(), 5, "truncate")
    pieces = tokenize(["abcd", "abc"]) + tokenize(["abcdefgh"])
    assert [letters(piece) for piece in pieces] == ["abc", "abc", "abc"]
    assert all(piece.kept == len(piece.ids) == 5 for piece in pieces)
    assert tokenize.overlong_lines == 2


@given(st.integers(3, 9), st.integers(0, 40))
def test_split_loses_nothing_and_joins_to_one_sequence(max_length, count):
    line = "".join(chr(97 + i % 20) for i in range(count))
    pieces = LineTokenizer(LetterTokenizer(), max_length, "split")([line])
    assert "".join(map(letters, pieces)) == line
    assert all(len(piece.ids) <= max_length for piece in pieces)
    assert all(piece.ids[0] == CLS and piece.ids[-1] == SEP for piece in pieces)
    kept = [i for piece in pieces for i in piece.ids[piece.first : piece.last]]
    assert kept == ([CLS, *(ord(letter) - 87 for letter in line), SEP] if line else [])
    assert all(piece.kept >= 1 for piece in pieces)


def test_error_names_the_line_across_calls():
    tokenize = LineTokenizer(LetterTokenizer(), 5, "error")
    tokenize(["abc", "abc"])
    with pytest.raises(ValueError, match="at most 5 tokens, got 6 in line 4"):
        tokenize(["a", "abcd"])


sizes = st.lists(st.integers(1, 20), max_size=40)


@given(sizes, st.integers(1, 50))
def test_batches_cover_every_piece_once_within_the_budget(lengths, budget):
    pieces = [SimpleNamespace(ids=[0] * length) for length in lengths]
    found = list(batches(pieces, budget))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    flat = [lengths[i] for batch in found for i in batch]
    assert flat == sorted(flat, reverse=True)
    for batch in found:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= budget


@given(sizes, st.integers(1, 50))
def test_windows_keep_the_order_within_the_limit(lengths, limit):
    pieces = [SimpleNamespace(ids=[i] * length) for i, length in enumerate(lengths)]
    found = list(windows(pieces, limit))
    assert [piece for window in found for piece in window] == pieces
    for window in found:
        assert len(window) == 1 or sum(len(piece.ids) for piece in window) <= limit
