"""The example runs on an ELMo and on a BERT, and its scores mean what they say."""

from __future__ import annotations

import gzip
import json

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


def test_senses_file(tmp_path):
    sentence = {"tok": ["A", "bank", "."], "ann": [[1, "bank", "NOUN", "river"]]}
    other = {"tok": ["The", "Bank"], "ann": [[1, "bank", "NOUN", "money"], [0, "the", "X", "y"]]}
    lines = "\n".join(json.dumps(x) for x in (sentence, other, {"tok": ["x"], "ann": []}))
    (tmp_path / "s.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    found = example.read_senses(tmp_path / "s.jsonl.gz", "bank")
    assert found == [("river", ["A", "bank", "."]), ("money", ["The", "Bank"])]
    (tmp_path / "s.txt").write_text("one\ta bank\ntwo\tthe bank\n")
    assert example.read_senses(tmp_path / "s.txt", "bank")[1] == ("two", ["the", "bank"])
