"""`bench --model DIR --input FILE`: a user's own directory, checked like every other case."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctxfast.benchmarks import records, user_model
from ctxfast.benchmarks.case import BadOption
from ctxfast.benchmarks.plain_bert import read_weights
from ctxfast.cli import main
from tests.embeddings.conftest import model_directory

__all__ = ["model_directory"]

LINES = ["the dog sleeps .", "", "a cat runs to the green house", "one two three , four", "train"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


def test_command(tmp_path, text, model_directory, capsys):
    out = tmp_path / "run.jsonl"
    arguments = [
        "--model",
        str(model_directory),
        "--input",
        str(text),
        "--size",
        "tiny",
        "--repeats",
        "2",
    ]
    peers = "transformers,onnxruntime,ctranslate2"
    assert main(["bench", *arguments, "--peers", peers, "--json", str(out)]) == 0
    run = records.read(out)
    assert [case.case for case in run.cases] == ["batches", "one-line"]
    assert run.cases[0].items == 4 and run.cases[0].size == "own"
    for case in run.cases:
        timed = {r.dtype for r in case.results if r.peer == "ctxfast" and r.seconds}
        assert timed >= {"float32", "bfloat16"}
        assert not [(r.key, r.reason) for r in case.results if r.status in ("refused", "failed")]
    capsys.readouterr()


def test_weights_of_a_model_with_a_head_and_of_old_names(tmp_path, model_directory):
    folder = tmp_path / "model"
    shutil.copytree(model_directory, folder)
    tensors = load_file(folder / "model.safetensors")
    old = {
        f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma"): t
        for name, t in tensors.items()
    }
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    found, expected = (read_weights(f, torch.float64) for f in (folder, model_directory))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_wrong_model_is_refused(tmp_path, text, model_directory, capsys, monkeypatch):
    from ctxfast.bert import BertModel

    real = BertModel.forward
    monkeypatch.setattr(
        BertModel, "forward", lambda self, input_ids, attention_mask: real(self, input_ids)
    )
    arguments = [
        "--model",
        str(model_directory),
        "--input",
        str(text),
        "--size",
        "tiny",
        "--repeats",
        "1",
        "--peers",
        "eager",
    ]
    assert main(["bench", *arguments]) == 1
    assert "refused, wrong result" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "roberta"}, "must be of type bert, got 'roberta'"),
        (
            {"position_embedding_type": "relative_key"},
            "must have absolute positions, got 'relative_key'",
        ),
        ({"hidden_act": "mish"}, "must use one of gelu, gelu_new, relu, got 'mish'"),
    ],
)
def test_models_that_not_every_peer_can_run(tmp_path, entries, message):
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(BadOption, match=message):
        user_model.read_shape(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"directory": "missing"}, "must be a directory with a config.json"),
        ({"file": "missing.txt"}, "must be a UTF-8 text file"),
        ({"file": "blank.txt"}, "must hold at least one line"),
        ({"lines": 0}, "lines must be at least 1, got 0"),
    ],
)
def test_bad_input(tmp_path, text, model_directory, change, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blank.txt").write_text("\n \n")
    given = {"directory": str(model_directory), "file": str(text), "lines": 4} | change
    with pytest.raises(BadOption, match=message):
        user_model.cases(user_model.UserModel.at(**given))


def test_model_without_input(capsys):
    assert main(["bench", "--model", "x"]) == 2
    assert "must be given together" in capsys.readouterr().err


def test_workload_beside_a_model(capsys):
    assert main(["bench", "linear", "--model", "x", "--input", "y"]) == 2
    assert "must not be given with --model" in capsys.readouterr().err
