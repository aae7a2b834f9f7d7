"""BertTokenizer against transformers' fast tokenizer: real text, hostile text, every argument."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ctxfast.bert.tokenizer import BertTokenizer
from tests.bert.tokenizer_cases import (
    CORPORA,
    TRICKY,
    assert_same_batch,
    assert_same_call,
    both,
    minilm_directory,
    questions_and_contexts,
    sms_texts,
    vocabulary_texts,
    write_directory,
)

Pair = tuple[BertTokenizer, Any]


@pytest.fixture(scope="module")
def uncased(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("uncased")
    config = {"do_lower_case": True, "model_max_length": 512}
    return both(write_directory(folder, data / "vocab" / "bert-base-uncased.vocab.txt", config))


@pytest.fixture(scope="module")
def alone(data: Path) -> BertTokenizer:
    return BertTokenizer(data / "vocab" / "bert-base-uncased.vocab.txt", model_max_length=512)


@pytest.mark.parametrize("name", CORPORA)
def test_real_text_of_each_vocabulary(name: str, data: Path, tmp_path: Path) -> None:
    vocab = data / "vocab" / f"bert-base-{name}.vocab.txt"
    ours, theirs = both(write_directory(tmp_path, vocab, {"do_lower_case": name == "uncased"}))
    assert ours.get_vocab() == theirs.get_vocab()
    texts = [*TRICKY, *vocabulary_texts(vocab), *sms_texts(data)[:1500]]
    assert_same_call(ours, theirs, texts, return_offsets_mapping=True)
    assert_same_call(ours, theirs, texts, padding=True, truncation=True, max_length=24)


@pytest.mark.parametrize("do_lower_case", [True, False])
@pytest.mark.parametrize("strip_accents", [None, True, False])
@pytest.mark.parametrize("tokenize_chinese_chars", [True, False])
def test_normalizer_options(
    data: Path,
    tmp_path: Path,
    do_lower_case: bool,
    strip_accents: bool | None,
    tokenize_chinese_chars: bool,
) -> None:
    config = {
        "do_lower_case": do_lower_case,
        "strip_accents": strip_accents,
        "tokenize_chinese_chars": tokenize_chinese_chars,
    }
    vocab = data / "vocab" / "bert-base-multilingual-cased.vocab.txt"
    ours, theirs = both(write_directory(tmp_path, vocab, config))
    assert_same_call(ours, theirs, TRICKY)
    direct = BertTokenizer(vocab, **config)
    assert direct(TRICKY).input_ids == ours(TRICKY).input_ids
    assert {name: getattr(ours, name) for name in config} == config


def test_tokenizer_json_of_a_published_model(data: Path) -> None:
    ours, theirs = both(minilm_directory())
    texts = [*TRICKY, *sms_texts(data)]
    # The file stores padding and truncation to 128 tokens, which a call without arguments ignores.
    assert_same_call(ours, theirs, texts)
    assert_same_call(ours, theirs, texts, padding=True, truncation=True, return_tensors="pt")
    assert ours.model_max_length == theirs.model_max_length == 512


def test_question_answering_windows(data: Path, uncased: Pair) -> None:
    ours, theirs = uncased
    questions, contexts = questions_and_contexts(data)
    options = {
        "truncation": "only_second",
        "max_length": 96,
        "stride": 24,
        "return_overflowing_tokens": True,
        "return_offsets_mapping": True,
        "padding": "max_length",
    }
    assert_same_call(ours, theirs, questions, contexts, **options)
    assert_same_call(ours, theirs, questions[0], contexts[0], **options, return_tensors="pt")
    batch = ours(questions[:50], contexts[:50], **options)
    assert len(batch.input_ids) == len(batch.overflow_to_sample_mapping) > 50


def test_words_with_their_ids(data: Path, uncased: Pair) -> None:
    ours, theirs = uncased
    sentences = [text.split() for text in sms_texts(data)[:500]] + [[], ["", " ", "a b"]]
    assert_same_call(ours, theirs, sentences, is_split_into_words=True, padding=True)
    assert_same_call(ours, theirs, sentences[0], is_split_into_words=True)
    assert_same_call(ours, theirs, sentences[0], sentences[1], is_split_into_words=True)
    assert_same_call(
        ours, theirs, sentences[:9], sentences[9:18], is_split_into_words=True, max_length=12
    )
    batch = ours([["Hello", "tokenization"]], is_split_into_words=True)
    assert batch.word_ids(0) == [None, 0, 1, 1, None]


@pytest.mark.parametrize(
    "texts",
    [
        ("a b",),
        ("a b", "c"),
        ("a b", ""),
        ("", ""),
        (["a b", ""],),
        (["a b", ""], ["", "c d"]),
        ([("a b", "c"), ("", "d")],),
        ([["a b", "c"], ["e", "d"]],),
        (("a", "b"),),
    ],
    ids=repr,
)
@pytest.mark.parametrize("return_tensors", [None, "pt", "np"])
def test_shapes_of_text(uncased: Pair, texts: Any, return_tensors: str | None) -> None:
    options = {"return_tensors": return_tensors, "return_length": True, "padding": True}
    assert_same_call(*uncased, *texts, **options)
    assert_same_call(*uncased, *texts, **options, return_overflowing_tokens=True)


def test_very_long_text(uncased: Pair) -> None:
    text = "The quick brown fox [MASK] \u4e2d jumps over naïve dogs. " * 4000
    assert_same_call(*uncased, text)
    assert_same_call(*uncased, text, truncation=True)
    assert_same_call(*uncased, "x" * 1_000_000)


texts = st.one_of(
    st.sampled_from(TRICKY),
    st.text(max_size=40),
    st.text(alphabet="ab .,'[]#\u0301\u4e2dÉ", max_size=60),
)
words = st.lists(texts, max_size=6)
options = st.fixed_dictionaries(
    {},
    optional={
        "add_special_tokens": st.booleans(),
        "padding": st.sampled_from([False, True, "longest", "max_length", "do_not_pad"]),
        "truncation": st.sampled_from(
            [None, False, True, "longest_first", "only_first", "only_second", "do_not_truncate"]
        ),
        "max_length": st.integers(3, 40),
        "stride": st.sampled_from([0, 0, 1, 5]),
        "pad_to_multiple_of": st.sampled_from([None, 1, 8]),
        "padding_side": st.sampled_from([None, "left", "right"]),
        "return_tensors": st.sampled_from([None, "np", "pt"]),
        "return_token_type_ids": st.sampled_from([None, True, False]),
        "return_attention_mask": st.sampled_from([None, True, False]),
        "return_overflowing_tokens": st.booleans(),
        "return_special_tokens_mask": st.booleans(),
        "return_offsets_mapping": st.booleans(),
        "return_length": st.booleans(),
        "split_special_tokens": st.booleans(),
    },
)


@st.composite
def calls(draw: st.DrawFn) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Texts in each shape that a call takes, and any combination of arguments."""
    split = draw(st.booleans())
    single = words if split else texts
    number = draw(st.sampled_from([0, 1, 1, 2, 5]))
    count = 1 if number == 0 else number
    first = draw(st.lists(single, min_size=count, max_size=count))
    second = draw(st.none() | st.lists(single, min_size=count, max_size=count))
    arguments = (first,) if second is None else (first, second)
    if number == 0:
        arguments = tuple(argument[0] for argument in arguments)
    return arguments, {**draw(options), "is_split_into_words": split}


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(call=calls(), truncation_side=st.sampled_from(["right", "left"]))
def test_any_call(uncased: Pair, call: Any, truncation_side: str) -> None:
    arguments, keywords = call
    # torch.tensor, and with it transformers, drops every row after an empty first one; we refuse.
    padded = keywords.get("padding", False) not in (False, "do_not_pad")
    bare = not padded and not keywords.get("add_special_tokens", True)
    assume(not (bare and keywords.get("return_tensors") == "pt"))
    # A stride without room fails in transformers only if a text is cut; here it always does.
    stride = keywords.get("stride", 0)
    assume(stride == 0 or stride < keywords.get("max_length", 512) - 3)
    for tokenizer in uncased:
        tokenizer.truncation_side = truncation_side
    try:
        assert_same_call(*uncased, *arguments, **keywords)
    finally:
        for tokenizer in uncased:
            tokenizer.truncation_side = "right"


def test_sides_of_the_tokenizer(data: Path, tmp_path: Path) -> None:
    vocab = data / "vocab" / "bert-base-cased.vocab.txt"
    config = {"padding_side": "left", "truncation_side": "left", "model_max_length": 7}
    ours, theirs = both(write_directory(tmp_path, vocab, {**config, "do_lower_case": False}))
    assert_same_call(ours, theirs, ["a", "a b c d e f g h"], padding=True, truncation=True)
    assert ours("a b c d e f g h", truncation=True).tokens()[1:-1] == ["d", "e", "f", "g", "h"]
    ours.padding_side = theirs.padding_side = "right"
    assert_same_call(ours, theirs, ["a", "a b c d e f g h"], padding="max_length")


def test_encode_and_tokenize(uncased: Pair) -> None:
    ours, theirs = uncased
    assert ours.encode("Hello [MASK]", "wörld") == theirs.encode("Hello [MASK]", "wörld")
    assert ours.encode("Hello", add_special_tokens=False) == [7592]
    assert torch.equal(
        ours.encode("Hello you", return_tensors="pt"),
        theirs.encode("Hello you", return_tensors="pt"),
    )
    for text in TRICKY:
        assert ours.tokenize(text) == theirs.tokenize(text)
        assert ours.tokenize(text, text) == theirs.tokenize(text, text)
    assert ours.tokenize("a", add_special_tokens=True) == ["[CLS]", "a", "[SEP]"]


def test_too_long_text_warns_once(data: Path) -> None:
    vocab = data / "vocab" / "bert-base-uncased.vocab.txt"
    tokenizer = BertTokenizer(vocab, model_max_length=4)
    with pytest.warns(UserWarning, match="at most 4 tokens for the model, got 7"):
        assert len(tokenizer("a b c d e").input_ids) == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer("a b c d e f")
        BertTokenizer(vocab, model_max_length=4)("a b c d e f", truncation=True)
        BertTokenizer(vocab, model_max_length=4)("a b c d e f", verbose=False)
    with pytest.warns(UserWarning, match="max_length"):
        assert len(BertTokenizer(vocab)("a b c d", truncation=True).input_ids) == 6


def test_calls_in_threads_see_only_their_own_lengths(data: Path, uncased: Pair) -> None:
    tokenizer = BertTokenizer(data / "vocab" / "bert-base-uncased.vocab.txt")
    messages = sms_texts(data)[:64]
    variants = [
        {"truncation": True, "max_length": 8},
        {"truncation": True, "max_length": 20, "padding": "max_length"},
        {"padding": True, "pad_to_multiple_of": 16},
        {"padding": True, "padding_side": "left"},
        {},
    ]
    expected = [uncased[1](messages, **options) for options in variants]
    failures: list[BaseException] = []
    start = threading.Barrier(len(variants) + 1)

    def repeat(index: int) -> None:
        try:
            start.wait()
            for _ in range(30):
                assert_same_batch(tokenizer(messages, **variants[index]), expected[index])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(len(variants))]
    for thread in threads:
        thread.start()
    start.wait()
    for i in range(20):
        tokenizer.add_tokens([f"newtoken{i}"])
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert len(tokenizer.get_added_vocab()) == 5 + 20
    assert tokenizer.backend_tokenizer.truncation is None
    assert tokenizer.backend_tokenizer.padding is None


def test_decoding_while_tokens_are_added(data: Path) -> None:
    tokenizer = BertTokenizer(data / "vocab" / "bert-base-uncased.vocab.txt")
    ids = tokenizer(sms_texts(data)[:2000]).input_ids
    expected = tokenizer.batch_decode(ids)
    results: list[list[str]] = []
    thread = threading.Thread(
        target=lambda: results.extend(tokenizer.batch_decode(ids) for _ in range(10))
    )
    thread.start()
    number = 0
    while thread.is_alive():
        number += tokenizer.add_tokens([f"newtoken{number}"])
    thread.join()
    assert results == [expected] * 10 and number == len(tokenizer.get_added_vocab()) - 5


@pytest.mark.parametrize(
    "texts, keywords, error, message",
    [
        ((None,), {}, TypeError, "text must be a str or a list of str, got None"),
        ((5,), {}, TypeError, "text must be a str or a list of str, got int"),
        ((["a", None],), {}, TypeError, r"text\[1\] must be valid text, got None"),
        ((["a", "\ud800"],), {}, TypeError, r"text\[1\] .* lone surrogate: '\\ud800'"),
        (("a", 5), {}, TypeError, "text_pair must be valid text, got int"),
        ((["a"], "b"), {}, TypeError, "text_pair must be a list"),
        ((["a", "b"], ["c"]), {}, ValueError, "text_pair must have the length of text, 2, got 1"),
        (([("a", "b", "c")],), {}, TypeError, r"text\[0\] must be a text or a \(text, pair\)"),
        (("a",), {"is_split_into_words": True}, TypeError, "text must be a list of words"),
        ((["a", 1],), {"is_split_into_words": True}, TypeError, "text must be valid text, got int"),
        (([["a"], "b"],), {"is_split_into_words": True}, TypeError, r"text\[1\] must be a list"),
        ((["a"],), {"padding": "longer"}, ValueError, "padding must be one of .* got 'longer'"),
        ((["a"],), {"truncation": "all"}, ValueError, "truncation must be one of .* got 'all'"),
        ((["a"],), {"padding": True, "padding_side": "up"}, ValueError, "padding_side must be"),
        ((["a"],), {"return_tensors": "tf"}, ValueError, "return_tensors must be .* got 'tf'"),
        ((["a"],), {"max_length": 1}, ValueError, "max_length must be at least 2, got 1"),
        (("a", "b"), {"max_length": 2}, ValueError, "max_length must be at least 3, got 2"),
        ((["a"],), {"max_length": 4.5}, TypeError, "max_length must be an int, got 4.5"),
        ((["a"],), {"max_length": 5, "stride": 3}, ValueError, "stride must be less .* 3, got 3"),
        ((["a"],), {"stride": -1}, ValueError, "stride must be at least 0, got -1"),
        (("a b c",), {"truncation": "only_second", "max_length": 4}, ValueError, "leave room"),
        (("a b c d e", "f g h"), {"max_length": 6, "stride": 1}, ValueError, "leave room"),
        ((["a", "a b"],), {"return_tensors": "pt"}, ValueError, "input_ids must have rows of one"),
        ((["a"],), {"max_len": 3}, TypeError, "max_len"),
    ],
)
def test_bad_calls(
    alone: BertTokenizer,
    texts: Any,
    keywords: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        alone(*texts, **keywords)


def test_empty_batch(alone: BertTokenizer) -> None:
    batch = alone([])
    assert dict(batch) == {"input_ids": [], "token_type_ids": [], "attention_mask": []}
    for kind in ("pt", "np"):
        assert alone([], padding=True, return_tensors=kind).input_ids.shape == (0, 0)
