"""Tokens, ids, special and added tokens, decoding and padding of BertTokenizer."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

from ctxfast.bert.tokenizer import BertTokenizer
from tests.bert.tokenizer_cases import (
    TRICKY,
    assert_same_call,
    both,
    same_value,
    sms_texts,
    transformers_tokenizer,
    write_directory,
)

Pair = tuple[BertTokenizer, Any]
NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def uncased_directory(data: Path, folder: Path) -> Path:
    vocab = data / "vocab" / "bert-base-uncased.vocab.txt"
    return write_directory(folder, vocab, {"do_lower_case": True, "model_max_length": 512})


@pytest.fixture(scope="module")
def shared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return both(uncased_directory(data, tmp_path_factory.mktemp("shared")))


@pytest.fixture
def fresh(data: Path, tmp_path: Path) -> Pair:
    return both(uncased_directory(data, tmp_path))


def assert_same_vocabulary(ours: BertTokenizer, theirs: Any) -> None:
    for name in NAMED:
        assert getattr(ours, f"{name}_token") == getattr(theirs, f"{name}_token")
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id")
    for name in (
        "all_special_tokens",
        "all_special_ids",
        "special_tokens_map",
        "extra_special_tokens",
        "added_tokens_decoder",
        "added_tokens_encoder",
        "vocab_size",
        "vocab",
        "pad_token_type_id",
        "max_len_single_sentence",
        "max_len_sentences_pair",
        "model_input_names",
        "is_fast",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert len(ours) == len(theirs)
    assert ours.get_added_vocab() == theirs.get_added_vocab()
    for pair in (False, True):
        assert ours.num_special_tokens_to_add(pair) == theirs.num_special_tokens_to_add(pair)


def test_vocabulary(shared: Pair) -> None:
    ours, theirs = shared
    assert_same_vocabulary(ours, theirs)
    assert ours.additional_special_tokens == []
    for tokens in ("hello", "[CLS]", "nonexistenttoken", ["a", "##b", "?!", "[MASK]"], []):
        assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
    for ids in (5, 101, 10**6, [101, 7592, 10**6, 102], torch.tensor([0, 102]), np.array([101])):
        for skip in (False, True):
            assert ours.convert_ids_to_tokens(ids, skip) == theirs.convert_ids_to_tokens(ids, skip)
    ids = [101, 7592, 0, 0]
    assert ours.get_special_tokens_mask(ids, already_has_special_tokens=True) == [1, 0, 1, 1]
    with pytest.raises(TypeError, match="tokens must be a str or a sequence of str, got 5"):
        ours.convert_tokens_to_ids(5)
    with pytest.raises(ValueError, match="already_has_special_tokens must be True"):
        ours.get_special_tokens_mask(ids)
    assert "vocab_size=30522" in repr(ours)


@pytest.mark.parametrize("skip_special_tokens", [False, True])
@pytest.mark.parametrize("clean_up_tokenization_spaces", [None, False, True])
def test_decode(
    shared: Pair, data: Path, skip_special_tokens: bool, clean_up_tokenization_spaces: bool | None
) -> None:
    ours, theirs = shared
    options = {
        "skip_special_tokens": skip_special_tokens,
        "clean_up_tokenization_spaces": clean_up_tokenization_spaces,
    }
    texts = [*TRICKY, *sms_texts(data)[:500], "it 's , i 'm . we 've ' re n't ! ?", "a [MASK] b"]
    batch = ours(texts, padding=True, return_tensors="pt")
    expected = theirs.batch_decode(batch.input_ids, **options)
    assert ours.batch_decode(batch.input_ids, **options) == expected
    assert ours.decode(batch.input_ids.numpy(), **options) == expected
    for ids in (ours(texts[5]).input_ids, batch.input_ids[5], batch.input_ids[5].numpy(), 7592, []):
        assert ours.decode(ids, **options) == theirs.decode(ids, **options)
    single = ours(texts[5])
    assert ours.decode(single, **options) == theirs.decode(single.input_ids, **options)
    assert ours.batch_decode(single.input_ids) == theirs.batch_decode(single.input_ids)
    tokens = single.tokens()
    assert ours.convert_tokens_to_string(tokens) == theirs.convert_tokens_to_string(tokens)
    if hasattr(theirs, "clean_up_tokenization"):  # transformers 5.0 has none
        cleaned = ours.clean_up_tokenization(texts[-2])
        assert cleaned == theirs.clean_up_tokenization(texts[-2]) != texts[-2]


@pytest.mark.parametrize("ids", [[-1], [[101, -100]], ["a"], [1.5]])
def test_decode_refuses_what_is_no_id(shared: Pair, ids: Any) -> None:
    with pytest.raises(ValueError, match="token_ids must be non-negative integers"):
        shared[0].decode(ids)


def test_added_tokens(fresh: Pair) -> None:
    text = "Foobar <new> xx<e1>yy [CLS] <cls>, zürich Zürich hello"
    steps: list[Any] = [
        lambda t: t.add_tokens(["foobar", "hello", "[MASK]", "foobar"]),
        lambda t: t.add_tokens("Zürich"),
        lambda t: t.add_tokens(AddedToken("<new>", lstrip=True, rstrip=True, normalized=False)),
        lambda t: t.add_tokens(["<special>"], special_tokens=True),
        lambda t: t.add_tokens([]),
        lambda t: t.add_special_tokens({"cls_token": "<cls>", "bos_token": "[CLS]"}),
        lambda t: t.add_special_tokens({"extra_special_tokens": ["<e1>", "<e2>"]}),
        lambda t: t.add_special_tokens({"extra_special_tokens": ["<e2>", "<e3>"]}, False),
        lambda t: t.add_special_tokens({"extra_special_tokens": ["<e4>"]}),
        lambda t: t.add_special_tokens({}),
    ]
    for step in steps:
        assert step(fresh[0]) == step(fresh[1])
        assert_same_vocabulary(*fresh)
        assert_same_call(*fresh, text)
        ids = fresh[0](text).input_ids
        for skip in (False, True):
            assert fresh[0].decode(ids, skip) == fresh[1].decode(ids, skip)
    with pytest.raises(ValueError, match="keys out of .* got 'foo_token'"):
        fresh[0].add_special_tokens({"foo_token": "x"})
    with pytest.raises(TypeError, match="new_tokens must be str or AddedToken"):
        fresh[0].add_tokens([5])


def test_special_tokens_can_be_set(fresh: Pair) -> None:
    for tokenizer in fresh:
        tokenizer.pad_token = "[MASK]"
    assert_same_vocabulary(*fresh)
    assert_same_call(*fresh, ["a", "a b c"], padding=True)
    fresh[0].pad_token = None
    assert fresh[0].pad_token_id is None
    with pytest.raises(ValueError, match="padding must be False without a pad_token"):
        fresh[0](["a", "a b"], padding=True)
    with pytest.raises(TypeError, match="pad_token must be a str, got int"):
        fresh[0].pad_token = 5


def test_backend_tokenizer_takes_effect(fresh: Pair) -> None:
    ours, theirs = fresh
    backends = [tokenizer.backend_tokenizer for tokenizer in fresh]
    assert ours("É").tokens()[1] == "e"
    for backend in backends:
        backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    assert_same_call(ours, theirs, ["É hello Hello"], padding=True)
    assert ours("HELLO").tokens() == ["[CLS]", "[UNK]", "[SEP]"]
    ours.backend_tokenizer.enable_truncation(3)
    assert len(ours("a b c d").input_ids) == 6


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies_are_equal_and_apart(fresh: Pair, duplicate: Any) -> None:
    ours = fresh[0]
    ours.add_tokens(["foobar"])
    ours("a", truncation=True)
    twin = duplicate(ours)
    twin.add_tokens(["barfoo"])
    assert ours("foobar barfoo").tokens() == ["[CLS]", "foobar", "bar", "##fo", "##o", "[SEP]"]
    assert twin("foobar barfoo").tokens() == ["[CLS]", "foobar", "barfoo", "[SEP]"]
    assert twin.all_special_ids == ours.all_special_ids


rows = st.lists(st.lists(st.integers(0, 999), max_size=9), min_size=1, max_size=4)
pad_options = st.fixed_dictionaries(
    {},
    optional={
        "padding": st.sampled_from([True, False, "longest", "max_length"]),
        "max_length": st.integers(1, 20),
        "pad_to_multiple_of": st.sampled_from([None, 4]),
        "padding_side": st.sampled_from([None, "left", "right"]),
        "return_attention_mask": st.sampled_from([None, True, False]),
    },
)


@pytest.mark.filterwarnings("ignore:.*max_length")
@settings(max_examples=150, deadline=None)
@given(rows=rows, options=pad_options, form=st.sampled_from(["dict", "list", "single"]))
def test_pad(shared: Pair, rows: list[list[int]], options: dict[str, Any], form: str) -> None:
    def encoded() -> Any:
        examples = [
            {
                "input_ids": row,
                "token_type_ids": [1] * len(row),
                "special_tokens_mask": [0] * len(row),
                "labels": 3,
            }
            for row in rows
        ]
        if form == "single":
            return examples[0]
        if form == "list":
            return examples
        return {key: [example[key] for example in examples] for key in examples[0]}

    if form == "single" and not rows[0]:
        return  # transformers hands an empty sequence back unpadded
    given_input = encoded()
    padded = shared[0].pad(given_input, **options)
    assert given_input == encoded()
    assert dict(padded) == dict(shared[1].pad(encoded(), **options))


def test_pad_keeps_the_kind_of_its_input(shared: Pair) -> None:
    ours, theirs = shared
    for kind in (torch.tensor, np.array):
        examples = [
            {"input_ids": kind([101, 7592, 102]), "labels": kind(1)},
            {"input_ids": kind([101, 102]), "labels": kind(0)},
        ]
        padded, expected = ours.pad(examples), theirs.pad([dict(e) for e in examples])
        assert list(padded) == list(expected)
        for key in expected:
            assert same_value(padded[key], expected[key]), key
    lists = [{"input_ids": [1, 2], "labels": 0.5}, {"input_ids": [3], "labels": 1.0}]
    padded = ours.pad(lists, return_tensors="pt")
    assert padded.labels.dtype == torch.float32
    with pytest.raises(ValueError, match="encoded_inputs must hold 'input_ids', got"):
        ours.pad({"ids": [1]})
    with pytest.raises(TypeError, match="must be a mapping or a list of mappings"):
        ours.pad([[1, 2]])
    with pytest.raises(ValueError, match="input_ids must have rows of one length"):
        ours.pad([{"input_ids": [1]}, {"input_ids": [1, 2]}], padding=False, return_tensors="pt")


def test_collators_of_transformers_take_it(shared: Pair, data: Path) -> None:
    transformers_tokenizer()
    from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding

    ours, theirs = shared
    features = [ours(text, truncation=True, max_length=20) for text in sms_texts(data)[:8]]
    collated = DataCollatorWithPadding(ours)([dict(f) for f in features])
    expected = DataCollatorWithPadding(theirs)([dict(f) for f in features])
    for key in expected:
        assert torch.equal(collated[key], expected[key])
    batches = []
    for tokenizer in shared:
        torch.manual_seed(0)
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
        batches.append(collator([dict(f) for f in features]))
    for key in batches[1]:
        assert torch.equal(batches[0][key], batches[1][key])
