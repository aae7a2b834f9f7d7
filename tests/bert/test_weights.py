"""Checkpoints of every age and form, made here, into BertModel and out of it."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ctxfast.bert import BertConfig, BertModel
from ctxfast.bert.weights import match_names

CONFIG = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {
        name: torch.randn_like(t)
        for name, t in BertModel(BertConfig(**CONFIG)).state_dict().items()
    }


def directory(folder: Path, tensors: dict[str, torch.Tensor], *, form: str = "safetensors") -> Path:
    """A model directory with the tensors in one of the forms that exist."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if form == "safetensors":
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    elif form in ("pickle", "legacy"):
        zipped = form == "pickle"
        torch.save(
            OrderedDict(tensors),
            folder / "pytorch_model.bin",
            _use_new_zipfile_serialization=zipped,
        )
    else:
        name, write = {
            "shards": ("model.safetensors", save_file),
            "pickled shards": ("pytorch_model.bin", torch.save),
        }[form]
        stem, suffix = name.split(".")
        weight_map = {}
        for i, part in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
            shard = f"{stem}-{i + 1:05}-of-00002.{suffix}"
            write({key: tensors[key] for key in part}, folder / shard)
            weight_map |= dict.fromkeys(part, shard)
        (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def assert_loaded(model: BertModel, weights: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert set(state) == set(weights)
    for name, tensor in weights.items():
        assert torch.equal(state[name], tensor), name


def load(folder: Path, **arguments):
    """from_pretrained where any warning is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return BertModel.from_pretrained(folder, **arguments)


@pytest.mark.parametrize("form", ["safetensors", "pickle", "legacy", "shards", "pickled shards"])
def test_every_form(tmp_path: Path, weights, form: str) -> None:
    model = load(directory(tmp_path, weights, form=form))
    assert_loaded(model, weights)
    assert not model.training
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


def test_safetensors_come_before_a_pickle(tmp_path: Path, weights) -> None:
    directory(tmp_path, {name: tensor + 1 for name, tensor in weights.items()}, form="pickle")
    assert_loaded(load(directory(tmp_path, weights)), weights)


def renamed(weights, rename) -> dict[str, torch.Tensor]:
    return {rename(name): tensor for name, tensor in weights.items()}


def gamma_beta(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    )


@pytest.mark.parametrize(
    "rename",
    [
        gamma_beta,
        lambda name: f"bert.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module.bert.{gamma_beta(name)}",
    ],
    ids=["gamma", "bert", "module", "all"],
)
def test_names(tmp_path: Path, weights, rename) -> None:
    assert_loaded(load(directory(tmp_path, renamed(weights, rename))), weights)


def test_gamma_is_renamed_behind_layer_norm_only() -> None:
    names = ["LayerNorm.gamma", "x.LayerNorm.beta", "scale.gamma", "MyLayerNorm.gamma", "gamma"]
    _, unexpected = match_names({name: torch.zeros(1) for name in names}, {}, "bert.")
    assert unexpected == {
        "LayerNorm.weight", "x.LayerNorm.bias", "scale.gamma", "MyLayerNorm.gamma", "gamma"
    }  # fmt: skip


def test_prefix_is_added_for_a_model_with_a_head() -> None:
    expected = {"bert.embeddings.x": torch.zeros(1), "classifier.weight": torch.zeros(1)}
    found, unexpected = match_names(
        {name.removeprefix("bert."): t for name, t in expected.items()}, expected, "bert."
    )
    assert set(found) == set(expected)
    assert not unexpected


def test_saved_position_ids_are_no_surprise(tmp_path: Path, weights) -> None:
    extra = {
        "embeddings.position_ids": torch.arange(12)[None],
        "embeddings.token_type_ids": torch.zeros(1, 12),
    }
    _, info = load(directory(tmp_path, weights | extra), output_loading_info=True)
    assert not any(info.values())


def test_missing_pooler_is_drawn_and_named(tmp_path: Path, weights) -> None:
    encoder = {name: t for name, t in weights.items() if not name.startswith("pooler.")}
    folder = directory(tmp_path, encoder)
    with pytest.warns(
        UserWarning, match=r"newly initialised.*: pooler\.dense\.bias, pooler\.dense\.weight$"
    ):
        model, info = BertModel.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == {"pooler.dense.weight", "pooler.dense.bias"}
    assert not model.pooler.dense.bias.any()
    assert 0.01 < model.pooler.dense.weight.std() < 0.03
    assert_loaded(load(folder, add_pooling_layer=False), encoder)


def test_a_pooler_nobody_asked_for(tmp_path: Path, weights) -> None:
    folder = directory(tmp_path, renamed(weights, lambda name: f"bert.{name}"))
    model, info = load(folder, add_pooling_layer=False, output_loading_info=True)
    assert model.pooler is None
    assert info["unexpected_keys"] == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}


def test_heads_in_the_file_are_named(tmp_path: Path, weights) -> None:
    cls = {
        "cls.predictions.bias": torch.zeros(40),
        "cls.predictions.transform.LayerNorm.gamma": torch.ones(16),
    }
    folder = directory(tmp_path, renamed(weights, lambda name: f"bert.{name}") | cls)
    names = r"cls\.predictions\.bias, cls\.predictions\.transform\.LayerNorm\.weight$"
    with pytest.warns(UserWarning, match=rf"not used by this model: {names}"):
        model, info = BertModel.from_pretrained(folder, output_loading_info=True)
    assert len(info["unexpected_keys"]) == 2
    assert_loaded(model, weights)


def test_only_the_missing_parameter_of_a_layer_is_drawn(tmp_path: Path, weights) -> None:
    gone = ["encoder.layer.0.output.dense.bias", "encoder.layer.1.output.LayerNorm.weight",
            "embeddings.word_embeddings.weight"]  # fmt: skip
    kept = {name: t for name, t in weights.items() if name not in gone}
    with pytest.warns(UserWarning, match="newly initialised"):
        model = BertModel.from_pretrained(directory(tmp_path, kept))
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())
    assert not state[gone[0]].any()
    assert state[gone[1]].eq(1).all()
    assert not state[gone[2]][0].any()
    assert state[gone[2]][1:].abs().gt(0).all()


def test_mismatched_shapes(tmp_path: Path, weights) -> None:
    name = "embeddings.word_embeddings.weight"
    folder = directory(tmp_path, weights | {name: torch.zeros(41, 16)})
    with pytest.raises(ValueError, match=rf"{name} must have shape \(40, 16\) .*, got \(41, 16\)"):
        load(folder)
    with pytest.warns(UserWarning, match=f"newly initialised.*: {name}$"):
        model, info = BertModel.from_pretrained(
            folder, ignore_mismatched_sizes=True, output_loading_info=True
        )
    assert info["mismatched_keys"] == {(name, (41, 16), (40, 16))}
    assert not info["missing_keys"]
    assert model.embeddings.word_embeddings.weight[1:].any()


def test_integers_are_no_weights(tmp_path: Path, weights) -> None:
    folder = directory(tmp_path, weights | {"pooler.dense.bias": torch.zeros(16, dtype=torch.int8)})
    with pytest.raises(ValueError, match="pooler.dense.bias must be floating point"):
        load(folder)


def test_dtypes(tmp_path: Path, weights) -> None:
    half = {name: tensor.half() for name, tensor in weights.items()}
    folder = directory(tmp_path, half)
    assert_loaded(load(folder), {name: tensor.float() for name, tensor in half.items()})
    assert load(folder, dtype="auto").dtype == torch.float16
    assert load(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load(folder, torch_dtype="bfloat16").dtype == torch.bfloat16
    for bad in ("int8", torch.int64, "nonsense"):
        with pytest.raises(ValueError, match="dtype must be a floating-point torch dtype"):
            load(folder, dtype=bad)


def test_arguments(tmp_path: Path, weights) -> None:
    folder = directory(tmp_path, weights)
    model = load(folder, num_labels=3, hidden_dropout_prob=0.0, id2label={0: "a", 1: "b", 2: "c"})
    assert model.config.id2label[2] == "c"
    assert model.encoder.layer[0].output.dropout.p == 0.0
    assert (
        load(folder, config=BertConfig(**CONFIG, layer_norm_eps=1e-5)).embeddings.LayerNorm.eps
        == 1e-5
    )
    with pytest.raises(TypeError, match="unknown argument 'device_map', 'lables'"):
        load(folder, device_map="auto", lables=3)


def test_a_file_is_mapped_not_copied(tmp_path: Path, weights) -> None:
    model = load(directory(tmp_path, weights))
    assert "model.safetensors" in Path("/proc/self/maps").read_text()
    with torch.no_grad():
        model.pooler.dense.weight.zero_()
    assert torch.equal(load(tmp_path).pooler.dense.weight, weights["pooler.dense.weight"])


def test_data_that_starts_at_an_odd_byte(tmp_path: Path, weights) -> None:
    folder = directory(tmp_path, weights)
    content = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].rstrip() + b" "
    header += b" " * ((1 - len(header)) % 8)
    (folder / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + content[8 + size :]
    )
    model = load(folder)
    assert_loaded(model, weights)
    assert all(p.detach().numpy().flags.aligned for p in model.parameters())


def test_missing_things(tmp_path: Path, weights) -> None:
    with pytest.raises(FileNotFoundError, match="no such directory: .*absent"):
        load(tmp_path / "absent")
    with pytest.raises(
        FileNotFoundError, match="no such directory: ./absent|no such directory: absent"
    ):
        load("./absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="must be a directory, got the file"):
        load(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="must hold config.json, got none"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(FileNotFoundError, match="must hold model.safetensors or pytorch_model.bin"):
        load(tmp_path)
    directory(tmp_path, weights, form="shards")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match="names 'model-00002-of-00002.safetensors', which is not"
    ):
        load(tmp_path)
    with pytest.raises(TypeError, match="must be a directory or a hub name, got int"):
        load(3)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
@pytest.mark.parametrize("form", ["safetensors", "pickle", "legacy"])
def test_truncated_files(tmp_path: Path, weights, form: str, share: float) -> None:
    folder = directory(tmp_path, weights, form=form)
    path = next(path for path in folder.iterdir() if path.suffix in (".bin", ".safetensors"))
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(ValueError, match=f"{path.name} must ") as error:
        load(folder)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("form", ["pickle", "bare"])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, weights, form: str) -> None:
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    folder = directory(tmp_path, {}, form="pickle")
    if form == "pickle":
        torch.save({**weights, "x": Payload()}, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(ValueError, match="pytorch_model.bin must ") as error:
        load(folder)
    assert "\n" not in str(error.value)
    assert "mkdir" in str(error.value)
    assert not (tmp_path / "owned").exists()


def test_a_pickle_of_something_else(tmp_path: Path) -> None:
    folder = directory(tmp_path, {}, form="pickle")
    torch.save([torch.zeros(2)], folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must hold a dictionary of tensors, got list"):
        load(folder)


def test_bad_index(tmp_path: Path, weights) -> None:
    folder = directory(tmp_path, weights, form="shards")
    for content in ("{", "[]", "{}", '{"weight_map": {"a": "../elsewhere.safetensors"}}'):
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ValueError, match="model.safetensors.index.json must "):
            load(folder)


def test_hub_cache(tmp_path: Path, weights) -> None:
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text("abc")
    directory(snapshot, weights)
    assert_loaded(load("org/tiny", cache_dir=tmp_path, local_files_only=True), weights)
    with pytest.raises(
        FileNotFoundError, match="neither a directory nor a model in the local Hugging Face cache"
    ):
        load("org/absent", cache_dir=tmp_path, local_files_only=True)


def test_save_and_load_again(tmp_path: Path, weights) -> None:
    model = load(directory(tmp_path / "in", weights), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "out")  # over the files that it maps
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    again = load(tmp_path / "out", dtype="auto")
    assert_loaded(again, model.state_dict())
    assert again.config.architectures == ["BertModel"]
    again.save_pretrained(tmp_path / "out")
    assert_loaded(load(tmp_path / "out", dtype="auto"), model.state_dict())


def test_transformers_loads_what_we_save(tmp_path: Path, weights) -> None:
    transformers = pytest.importorskip("transformers")
    model = load(directory(tmp_path / "in", weights))
    model.save_pretrained(tmp_path / "out")
    theirs, info = transformers.BertModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    theirs.save_pretrained(tmp_path / "back")
    names = load_file(tmp_path / "back" / "model.safetensors")
    # transformers 5.0 writes the old names of a LayerNorm's parameters
    today = {name.replace("gamma", "weight").replace("beta", "bias") for name in names}
    assert today == set(weights)
    assert_loaded(load(tmp_path / "back"), weights)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, weights, monkeypatch) -> None:
    model = load(directory(tmp_path, weights))

    def fail(tensors, path, metadata) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("ctxfast.bert.weights.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_loaded(load(tmp_path), weights)
