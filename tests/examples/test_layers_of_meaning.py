"""The example runs on an ELMo and on a BERT, and its scores mean what they say."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys

import numpy as np
import pytest
import torch

from ctxfast.examples import layers_of_meaning as example
from tests.elmo import models


def test_scores():
    x = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    assert example.sense_score(x, ["a", "a", "b", "b"]) == 1.0
    assert example.sense_score(x, ["a", "b", "a", "b"]) == 0.0
    assert example.sense_score(np.ones((4, 2)), ["a", "a", "b", "b"]) == pytest.approx(1 / 3)
    assert example.chance(["a", "a", "b", "b"]) == pytest.approx(1 / 3)
    layers, labels = np.stack([np.ones((8, 2)), np.tile(x, (2, 1))]), list("aabb") * 2
    score, weights = example.mix_score(layers.astype(np.float32), labels)
    assert score == 1.0 and weights[1] > 0.9 and float(weights.sum()) == pytest.approx(1.0)
    torch.manual_seed(0)
    tags = torch.randint(0, 3, (60,))
    vectors = torch.nn.functional.one_hot(tags, 3).float() + 0.1 * torch.randn(60, 3)
    assert example.probe(vectors[:40], tags[:40], vectors[40:], tags[40:]) == 1.0


def test_runs_on_an_elmo(tmp_path, capsys):
    models.model().save(tmp_path / "elmo")
    rows = [f"{i}\t{w}\t_\t{t}\t_" for i, (w, t) in enumerate([("a", "X"), ("b", "Y")], 1)]
    (tmp_path / "x.conllu").write_text("\n".join([*rows, "", *rows, ""]))
    conllu = str(tmp_path / "x.conllu")
    example.main([str(tmp_path / "elmo"), "--conllu", conllu, conllu])
    printed = capsys.readouterr().out
    assert "12 sentences with 'stick', 2 meanings" in printed
    for line in ("layer 0", "layer 2", "learned mix", "left-only LSTM", "nearest to 'sick'"):
        assert line in printed
    assert f"{'chance':18}{0.45:12.2f}" in printed and f"{'skip-gram':18}" in printed


def test_skip_gram_row_is_skipped_with_a_reason(tmp_path, capsys, monkeypatch):
    models.model().save(tmp_path / "elmo")
    monkeypatch.setitem(sys.modules, "gensim.models", None)
    example.main([str(tmp_path / "elmo")])
    assert "skip-gram              skipped: gensim is not installed" in capsys.readouterr().out


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    models.model().save(tmp_path / "elmo")
    example.main([str(tmp_path / "elmo"), "--picture", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_what_cannot_be_shown(tmp_path, capsys, monkeypatch):
    (tmp_path / "s.txt").write_text("one\ta bank\none\tthe bank\ntwo\tno such word\n")
    senses = ["--senses", str(tmp_path / "s.txt")]
    for arguments, message in (
        (["--word", "bank"], "--word bank needs sentences with it: give --senses FILE"),
        (["--word", "bank", *senses], "'bank' in two meanings or more, got 2 sentences of 1 in"),
        ([], "must hold tokenizer.json or vocab.txt"),
        (["--picture", "x.png"], "--picture needs matplotlib"),
    ):
        if "--picture" in arguments:
            monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SystemExit):
            example.main([str(tmp_path), *arguments])
        assert message in capsys.readouterr().err


def test_senses_file(tmp_path):
    sentence = {"tok": ["A", "bank", "."], "ann": [[1, "bank", "NOUN", "river"]]}
    other = {"tok": ["The", "Bank"], "ann": [[1, "bank", "NOUN", "money"], [0, "the", "X", "y"]]}
    lines = "\n".join(json.dumps(x) for x in (sentence, other, {"tok": ["x"], "ann": []}))
    (tmp_path / "s.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    found = example.read_senses(tmp_path / "s.jsonl.gz", "bank")
    assert found == [("river", ["A", "bank", "."]), ("money", ["The", "Bank"])]
    (tmp_path / "s.txt").write_text("one\ta bank\ntwo\tthe bank\n")
    assert example.read_senses(tmp_path / "s.txt", "bank")[1] == ("two", ["the", "bank"])
