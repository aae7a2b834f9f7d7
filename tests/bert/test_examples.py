"""The examples, run as their readers run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ctxfast import bert
from ctxfast.examples import predict_mask, spam_detection

pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")


@pytest.fixture(autouse=True)
def one_thread(seeded: None) -> None:
    """The model is too small for two."""
    torch.set_num_threads(1)


WORDS = {"spam": ["win", "cash", "prize", "free"], "ham": ["meet", "home", "dinner", "later"]}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.!?'"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small random encoder and a vocabulary of words and letters."""
    folder = tmp_path_factory.mktemp("tiny")
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS),
               *(word for words in WORDS.values() for word in words)]  # fmt: skip
    (folder / "vocab.txt").write_text("\n".join(entries))
    torch.manual_seed(0)
    config = bert.BertConfig(
        vocab_size=len(entries), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=128, initializer_range=0.1,
    )  # fmt: skip
    bert.BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 different texts, of which the words tell the label; some twice."""
    path = tmp_path_factory.mktemp("data") / "messages.tsv"
    lines = []
    for i in range(240):
        label = "spam" if i % 3 == 0 else "ham"
        words = WORDS[label]
        lines.append(f"{label}\t{words[i % 4]} {words[i // 4 % 4]} {i}")
    path.write_text("\n".join([*lines, *lines[:30]]) + "\n")
    return path


@pytest.mark.unpoisoned
def test_spam_detection_learns(messages: Path, tiny: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--model", str(tiny), "--epochs", "6", "--learning-rate", "3e-3"]
    spam_detection.main([str(messages), *options])
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].startswith("192 texts to train, 24 to watch, 24 to test; {")
    assert [line.split()[:3] for line in lines[1:7]] == [
        ["epoch", str(n), "spam:"] for n in range(1, 7)
    ]
    result = next(line for line in lines if line.startswith("test, BERT fine-tuned"))
    assert float(result.split()[-1]) > 0.9
    assert any(line.startswith("test, n-gram LinearSVC") for line in lines)
    assert [line.split()[0] in ("ham", "spam") for line in lines[-4:]] == [True] * 4
    spam_detection.main([str(messages), "--model", str(tiny), "--from-scratch", "--epochs", "1"])
    assert "test, BERT from scratch" in capsys.readouterr().out


def test_spam_detection_renews_the_pooling_layer(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes((tiny / "vocab.txt").read_bytes())
    model = bert.BertModel(bert.BertConfig.from_pretrained(tiny))
    assert model.pooler is not None
    torch.nn.init.constant_(model.pooler.dense.weight, 0.5)
    torch.nn.init.constant_(model.pooler.dense.bias, 0.5)
    model.save_pretrained(tmp_path)
    found = spam_detection.Detector(tmp_path, ["ham", "spam"], from_scratch=False).model.bert
    assert found.pooler is not None
    weight, bias = found.pooler.dense.weight, found.pooler.dense.bias
    assert weight.std().item() == pytest.approx(32**-0.5, rel=0.1) and not bias.any()
    assert torch.equal(
        found.embeddings.word_embeddings.weight, model.embeddings.word_embeddings.weight
    )


def test_scores() -> None:
    rows = [("spam", "a"), ("spam", "b"), ("ham", "c"), ("ham", "d"), ("spam", "e")]
    predicted = ["spam", "ham", "spam", "ham", "spam"]
    assert spam_detection.scores(predicted, rows, "spam") == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert spam_detection.scores(["ham"] * 5, rows, "spam") == (0.0, 0.0, 0.0)


def test_split_leaves_nothing_out(messages: Path) -> None:
    rows = spam_detection.read(messages)
    assert len(rows) == 240
    parts = spam_detection.split(rows, 1)
    assert [len(part) for part in parts] == [192, 24, 24]
    assert sorted(row for part in parts for row in part) == sorted(rows)
    assert spam_detection.split(rows, 1) == parts != spam_detection.split(rows, 2)


def test_one_sentence_for_what_is_missing(
    tmp_path: Path, messages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> Path:
        raise FileNotFoundError("the weights must be installed")

    monkeypatch.setattr(spam_detection, "find_weights", absent)
    (tmp_path / "bad.tsv").write_text("no tab here\n")
    (tmp_path / "few.tsv").write_text("ham\ta\nspam\tb\n")
    for path, expected in (
        (messages, "the weights must be installed"),
        (tmp_path / "bad.tsv", "bad.tsv, line 1 must be a label, a tab and a text"),
        (tmp_path / "few.tsv", "must hold at least 20 different texts"),
        (tmp_path / "absent.tsv", "No such file"),
    ):
        with pytest.raises(SystemExit, match=expected) as stopped:
            spam_detection.main([str(path)])
        assert "\n" not in str(stopped.value)


def test_predict_mask(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = predict_mask.predict("win [MASK] and [MASK]", tiny, count=3)
    assert [len(words) for words in found] == [3, 3]
    assert all(0 < p < 1 for words in found for _, p in words)
    with pytest.raises(ValueError, match=r"the text must contain \[MASK\]"):
        predict_mask.predict("win", tiny)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="give the directory of a masked language model"):
        predict_mask.find_weights()


@pytest.mark.unpoisoned
def test_predict_mask_as_a_command(tiny: Path) -> None:
    line = [sys.executable, "-m", "ctxfast.examples.predict_mask", "free [MASK]", str(tiny)]
    run = subprocess.run(line, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0] == "free [MASK]"
    assert len(run.stdout.splitlines()) == 2
