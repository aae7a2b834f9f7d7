"""BertConfig against transformers' own and against the files that exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ctxfast.bert import BertConfig

# The eleven keys of the configuration that Google published with BERT-base.
GOOGLE = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}
SMALL = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}


def write(folder: Path, values: object, name: str = "config.json") -> Path:
    text = values if isinstance(values, str) else json.dumps(values)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_defaults_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertConfig().to_dict()
    ours = BertConfig().to_dict()
    shared = set(ours) & set(theirs)
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
    assert set(ours) - set(theirs) == {"initializer", "sparse_prediction"}


def test_google_file(tmp_path: Path) -> None:
    config = BertConfig.from_pretrained(write(tmp_path, GOOGLE, "bert_config.json"))
    assert config == BertConfig()


def test_config_json_wins_over_google_file(tmp_path: Path) -> None:
    write(tmp_path, GOOGLE, "bert_config.json")
    write(tmp_path, SMALL)
    assert BertConfig.from_pretrained(tmp_path).hidden_size == 32
    assert BertConfig.from_pretrained(tmp_path / "bert_config.json").hidden_size == 768


def test_unknown_keys_are_kept(tmp_path: Path) -> None:
    values = {
        **SMALL,
        "position_embedding_type": "absolute",
        "gradient_checkpointing": False,
        "x": [1],
    }
    config = BertConfig.from_pretrained(write(tmp_path, values))
    assert config.x == [1]
    config.save_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["x"] == [1]
    assert written["gradient_checkpointing"] is False
    assert written["model_type"] == "bert"


def test_round_trip_through_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = BertConfig(
        **SMALL, num_labels=3, classifier_dropout=0.2, problem_type="regression", dtype="bfloat16"
    )
    config.save_pretrained(tmp_path / "ours")
    theirs = transformers.BertConfig.from_pretrained(tmp_path / "ours")
    assert theirs.num_labels == 3
    assert theirs.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert theirs.dtype == torch.bfloat16
    theirs.save_pretrained(tmp_path / "theirs")
    again = BertConfig.from_pretrained(tmp_path / "theirs")
    del again.transformers_version
    assert again == config


def test_labels() -> None:
    assert BertConfig().num_labels == 2
    config = BertConfig(id2label={"0": "ham", "1": "spam"})
    assert config.id2label == {0: "ham", 1: "spam"}
    assert config.label2id == {"ham": 0, "spam": 1}
    config.num_labels = 2
    assert config.id2label[1] == "spam"
    config.num_labels = 3
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


def test_overrides(tmp_path: Path) -> None:
    write(tmp_path, {**SMALL, "id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}})
    assert BertConfig.from_pretrained(tmp_path).label2id == {"a": 0, "b": 1}
    assert BertConfig.from_pretrained(tmp_path, num_labels=4).num_labels == 4
    assert BertConfig.from_pretrained(tmp_path, id2label={0: "x"}).label2id == {"x": 0}
    assert BertConfig.from_pretrained(tmp_path, hidden_dropout_prob=0.0).hidden_dropout_prob == 0.0
    with pytest.raises(TypeError, match="unknown argument 'hiden_size'"):
        BertConfig.from_pretrained(tmp_path, hiden_size=3)


def test_torch_dtype_is_the_old_name_of_dtype(tmp_path: Path) -> None:
    assert (
        BertConfig.from_pretrained(write(tmp_path, {"torch_dtype": "float16"})).dtype
        == torch.float16
    )
    assert BertConfig(dtype=torch.bfloat16).to_dict()["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size must be a multiple of"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
        ({"vocab_size": "30522"}, "vocab_size must be a positive integer, got '30522'"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be an integer of at least 0"),
        ({"hidden_act": "snake"}, "hidden_act must be one of gelu, .*, got 'snake'"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob must be a number from 0 to 1"),
        ({"hidden_dropout_prob": None}, "hidden_dropout_prob must be a number from 0 to 1"),
        ({"layer_norm_eps": -1e-12}, "layer_norm_eps must be a number of at least 0"),
        ({"pad_token_id": 30522}, "pad_token_id must be null or an id below vocab_size 30522"),
        ({"is_decoder": True}, "is_decoder must be false"),
        ({"add_cross_attention": True}, "add_cross_attention must be false"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute'"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads must be empty"),
        ({"problem_type": "guessing"}, "problem_type must be null or one of regression"),
        ({"num_labels": 3, "id2label": {"0": "a"}}, "num_labels must be the size of id2label"),
        ({"dtype": "decimal"}, "dtype must be the name of a torch dtype, got 'decimal'"),
        ({"model_type": "roberta"}, "model_type must be 'bert', got 'roberta'"),
    ],
)
def test_refused_values(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        BertConfig.from_dict(values)
    assert "\n" not in str(error.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such directory"):
        BertConfig.from_pretrained(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="must hold config.json, got none"):
        BertConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config.json must be JSON, got Expecting"):
        BertConfig.from_pretrained(write(tmp_path, '{"hidden_size": 32,'))
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        BertConfig.from_pretrained(write(tmp_path, [1, 2]))
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="config.json must be JSON"):
        BertConfig.from_pretrained(tmp_path)


def test_saving_replaces_the_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BertConfig(**SMALL).save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()

    def fail(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        BertConfig().save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_saving_onto_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(NotADirectoryError, match="must be a directory, got the file"):
        BertConfig().save_pretrained(tmp_path / "taken")
