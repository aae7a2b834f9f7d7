"""BatchEncoding against transformers' class of that name."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctxfast.bert.batch_encoding import BatchEncoding, CharSpan, TokenSpan
from ctxfast.bert.tokenizer import BertTokenizer
from tests.bert.tokenizer_cases import (
    TRICKY,
    questions_and_contexts,
    same_value,
    transformers_tokenizer,
)


@pytest.fixture(scope="module")
def ours(data: Path) -> BertTokenizer:
    return BertTokenizer(data / "vocab" / "bert-base-uncased.vocab.txt")


@pytest.fixture(scope="module")
def theirs(data: Path) -> Any:
    vocab = str(data / "vocab" / "bert-base-uncased.vocab.txt")
    return transformers_tokenizer()(vocab, do_lower_case=True)


def test_spans(ours: BertTokenizer, theirs: Any, data: Path) -> None:
    questions, contexts = questions_and_contexts(data)
    first, second = [*questions[:5], *TRICKY], [*contexts[:5], *TRICKY]
    mine, other = ours(first, second), theirs(first, second)
    for i in range(len(first)):
        assert mine.tokens(i) == other.tokens(i)
        assert mine.word_ids(i) == other.word_ids(i)
        assert mine.sequence_ids(i) == other.sequence_ids(i)
        for token in range(len(mine.input_ids[i])):
            assert mine.token_to_chars(i, token) == other.token_to_chars(i, token)
            assert mine.token_to_word(i, token) == other.token_to_word(i, token)
            assert mine.token_to_sequence(i, token) == other.token_to_sequence(i, token)
        for sequence, text in enumerate((first[i], second[i])):
            for char in range(len(text)):
                position = (i, char, sequence)
                assert mine.char_to_token(*position) == other.char_to_token(*position)
                assert mine.char_to_word(*position) == other.char_to_word(*position)
            words = {
                word
                for word, of in zip(mine.word_ids(i), mine.sequence_ids(i), strict=True)
                if of == sequence
            }
            for word in words:
                position = (i, word, sequence)
                assert mine.word_to_tokens(*position) == other.word_to_tokens(*position)
                assert mine.word_to_chars(*position) == other.word_to_chars(*position)
    assert mine.offsets == theirs(first, second, return_offsets_mapping=True)["offset_mapping"]


def test_one_index_means_the_first_sequence(ours: BertTokenizer) -> None:
    batch = ours("Hello tokenization")
    assert batch.tokens() == ["[CLS]", "hello", "token", "##ization", "[SEP]"]
    assert batch.word_to_tokens(1) == TokenSpan(2, 4)
    assert batch.word_to_chars(1) == CharSpan(6, 18)
    assert batch.token_to_chars(-2) == CharSpan(11, 18)
    assert batch.token_to_chars(0) is None
    assert batch.token_to_word(-2) == 1
    assert batch.token_to_sequence(1) == 0
    assert batch.char_to_token(11) == 3
    assert batch.char_to_word(3) == 0
    assert batch.char_to_token(5) is None


def test_mapping(ours: BertTokenizer, theirs: Any) -> None:
    mine, other = ours(["a b", "c"]), theirs(["a b", "c"])
    assert len(mine) == len(other) == 3
    assert dict(**mine) == dict(**other) == {key: mine[key] for key in mine.keys()}  # noqa: SIM118
    assert mine.input_ids is mine["input_ids"]
    assert mine[1].tokens == other[1].tokens
    assert [e.tokens for e in mine[:2]] == [e.tokens for e in other[:2]]
    assert mine.is_fast and mine.n_sequences == 1
    assert mine.encodings is not None and len(mine.encodings) == 2
    assert mine.copy().tokens(0) == mine.tokens(0)
    assert mine.pop("token_type_ids") == [[0, 0, 0, 0], [0, 0, 0]]
    assert "token_type_ids" not in mine and not hasattr(mine, "token_type_ids")
    with pytest.raises(AttributeError, match="'labels'"):
        _ = mine.labels
    with pytest.raises(KeyError):
        _ = mine["labels"]


def test_without_encodings() -> None:
    batch = BatchEncoding({"input_ids": [[1], [2]]})
    assert batch[:1] == {"input_ids": [[1]]}
    assert not batch.is_fast and batch.encodings is None and batch.n_sequences is None
    with pytest.raises(KeyError, match="key must be a str or a slice, got 0"):
        _ = batch[0]
    for method in ("tokens", "word_ids", "sequence_ids"):
        with pytest.raises(ValueError, match=f"BatchEncoding.{method}: .* without encodings"):
            getattr(batch, method)(0)
    with pytest.raises(ValueError, match="BatchEncoding.offsets"):
        _ = batch.offsets


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies(ours: BertTokenizer, duplicate: Any) -> None:
    batch = ours(["Hello tokenization", "b"], padding=True, return_tensors="pt")
    twin = duplicate(batch)
    assert torch.equal(twin.input_ids, batch.input_ids)
    assert twin.word_ids(0) == batch.word_ids(0) and twin.n_sequences == 1


@pytest.mark.filterwarnings("ignore:Creating a tensor")
@pytest.mark.parametrize("tensor_type", ["pt", "np"])
@pytest.mark.parametrize("prepend_batch_axis", [False, True])
@pytest.mark.parametrize(
    "value",
    [
        [[1, 2], [3, 4]],
        [1, 2],
        [0.5, 1.5],
        [[0.5], [1.0]],
        [True, False],
        [],
        [[], []],
        [(0, 1), (2, 3)],
        np.array([[1, 2]], dtype=np.int32),
        [np.array([1.0, 2.0]), np.array([3.0, 4.0])],
        torch.tensor([1, 2]),
    ],
    ids=repr,
)
def test_conversion(value: Any, tensor_type: str, prepend_batch_axis: bool) -> None:
    transformers_tokenizer()
    from transformers import BatchEncoding as Theirs

    if isinstance(value, (np.ndarray, torch.Tensor)) and prepend_batch_axis:
        pytest.skip("transformers prepends to lists alone")
    options = {"tensor_type": tensor_type, "prepend_batch_axis": prepend_batch_axis}
    mine = BatchEncoding({"x": value}, **options)["x"]
    assert same_value(mine, Theirs({"x": value}, **options)["x"])


def test_ragged_rows(ours: BertTokenizer, theirs: Any) -> None:
    mine = ours(["a", "a b"], return_tensors="np")
    assert same_value(mine.input_ids, theirs(["a", "a b"], return_tensors="np")["input_ids"])
    batch = ours(["a", "a b"])
    with pytest.raises(ValueError, match="input_ids must have rows of one length.*padding=True"):
        batch.convert_to_tensors("pt")
    assert batch.convert_to_tensors(None) is batch


def test_to_device(ours: BertTokenizer) -> None:
    batch = ours(["a", "b"], return_tensors="pt", return_offsets_mapping=True)
    batch["note"] = "kept"
    assert batch.to("meta") is batch
    assert batch.input_ids.device.type == "meta" and batch.note == "kept"
    assert ours("a", return_tensors="pt").to(torch.device("cpu")).input_ids.device.type == "cpu"
    half = ours("a", return_tensors="pt")
    with pytest.warns(UserWarning, match="device must be a device, got torch.float16"):
        assert half.to(torch.float16).input_ids.dtype == torch.int64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours("a").to("cpu")
