"""Checkpoints with heads, into our models and out of them: tied words, old names, missing ones, other sizes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctxfast import bert

transformers = pytest.importorskip("transformers")

from tests.bert.head_cases import HEADS, assert_close, example, pair  # noqa: E402

DECODER = "cls.predictions.decoder"
WORDS = "bert.embeddings.word_embeddings.weight"


def load(name: str, folder: Path, **arguments: Any) -> Any:
    """from_pretrained where any warning is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return getattr(bert, name).from_pretrained(folder, **arguments)


def rewrite(folder: Path, change) -> Path:
    """Changes the tensors of a saved model."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_there_and_back(tmp_path: Path, name: str, tied: bool) -> None:
    """We write what transformers writes, each reads the other's file without a complaint, and the numbers stay."""
    ours, theirs = pair(name, tie_word_embeddings=tied)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    saved = [load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs")]
    assert set(saved[0]) == set(saved[1])
    predicts = ours.get_output_embeddings() is not None
    assert (DECODER + ".weight" in saved[0]) == (predicts and not tied)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["architectures"] == [name]
    again, info = getattr(transformers, name).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    back, info = load(name, tmp_path / "theirs", output_loading_info=True)
    assert not any(info.values())
    assert not back.training
    case = example(name, [5, 2], 5)
    with torch.no_grad():
        expected = ours(**case.arguments())
        for field, value in back(**case.arguments()).items():
            assert_close(value, expected[field], field)
        theirs_output, again_output = theirs(**case.inputs), again(**case.inputs)
        assert_close(again_output[0], theirs_output[0])
    if predicts:
        same = back.get_output_embeddings().weight is back.get_input_embeddings().weight
        assert same == tied
        assert (back.cls.predictions.decoder.bias is back.cls.predictions.bias) == tied


def test_ties_survive(tmp_path: Path) -> None:
    import copy
    import pickle

    model, _ = pair("BertForMaskedLM")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.double(), model):
        decoder = other.cls.predictions.decoder
        assert decoder.weight is other.bert.embeddings.word_embeddings.weight
        assert decoder.bias is other.cls.predictions.bias
    assert not any(DECODER in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path)
    assert not any(DECODER in name for name in load_file(tmp_path / "model.safetensors"))


def without(*names: str):
    return lambda tensors: {n: t for n, t in tensors.items() if n not in names}


def test_either_of_two_tied_tensors_is_enough(tmp_path: Path) -> None:
    model, _ = pair("BertForMaskedLM")
    model.save_pretrained(tmp_path)
    expected = model.state_dict()

    def swap(tensors):
        tensors[DECODER + ".weight"] = tensors.pop(WORDS)
        tensors[DECODER + ".bias"] = tensors.pop("cls.predictions.bias")
        return tensors

    for change in (
        lambda tensors: tensors | {DECODER + ".weight": tensors[WORDS].clone()},
        swap,
    ):
        loaded = load("BertForMaskedLM", rewrite(tmp_path, change))
        assert all(torch.equal(t, expected[n]) for n, t in loaded.state_dict().items())
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_tied_tensors_that_differ_stay_apart(tmp_path: Path) -> None:
    """As in transformers."""
    model, _ = pair("BertForMaskedLM")
    model.save_pretrained(tmp_path)
    other = torch.randn(60, 32)
    rewrite(tmp_path, lambda tensors: tensors | {DECODER + ".weight": other})
    with pytest.warns(UserWarning, match=f"{DECODER}.weight differs from {WORDS}"):
        loaded = bert.BertForMaskedLM.from_pretrained(tmp_path)
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.get_output_embeddings().weight, other)
    case = example("BertForMaskedLM", [5, 2], 5)
    with torch.no_grad():
        difference = loaded(**case.inputs).logits - theirs(**case.inputs).logits
    assert difference[case.valid].abs().max() < 1e-4
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(
        load_file(tmp_path / "again" / "model.safetensors")[DECODER + ".weight"], other
    )


@pytest.mark.parametrize("name", HEADS)
def test_a_bare_encoder_gets_a_new_head(tmp_path: Path, name: str) -> None:
    source = bert.BertModel(pair(name)[0].config, add_pooling_layer=True)
    source.save_pretrained(tmp_path)
    cls = getattr(bert, name)
    with pytest.warns(UserWarning, match="newly initialised") as record:
        model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert len(record) == 1  # the pooler that a head does without is no news
    assert info["missing_keys"] == {
        n for n, _ in model.named_parameters() if not n.startswith("bert.")
    }
    for parameter, expected in source.state_dict().items():
        if parameter.startswith("pooler") and model.bert.pooler is None:
            continue
        assert torch.equal(model.bert.state_dict()[parameter], expected)
    for parameter, value in model.named_parameters():
        if parameter in info["missing_keys"] and parameter.endswith("bias"):
            assert not value.any()
        assert value.isfinite().all()


def test_another_number_of_labels(tmp_path: Path) -> None:
    model, _ = pair("BertForSequenceClassification", num_labels=2)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"classifier.* must have shape \(3"):
        load("BertForSequenceClassification", tmp_path, num_labels=3)
    with pytest.warns(
        UserWarning, match=r"newly initialised.*classifier\.bias, classifier\.weight"
    ):
        bigger, info = bert.BertForSequenceClassification.from_pretrained(
            tmp_path, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
        )
    assert {name for name, _, _ in info["mismatched_keys"]} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert bigger.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert bigger.num_labels == bigger.classifier.out_features == 3
    names = {0: "ham", 1: "spam"}
    labelled = load("BertForSequenceClassification", tmp_path, id2label=names)
    labelled.save_pretrained(tmp_path / "named")
    theirs = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "named")
    assert theirs.config.id2label == names and theirs.config.label2id == {"ham": 0, "spam": 1}


def test_what_training_sets_is_saved(tmp_path: Path) -> None:
    model, _ = pair("BertForSequenceClassification", num_labels=3)
    case = example("BertForSequenceClassification", [5], 5, num_labels=3)
    model(**case.arguments())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["problem_type"] == "single_label_classification"
    assert "sparse_prediction" not in config and "initializer" not in config


def test_the_files_of_the_original_release(tmp_path: Path) -> None:
    """bert_config.json, gamma and beta, a pickle that holds both heads, and whatever the optimiser left."""
    model, _ = pair("BertForPreTraining")
    fields = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
              "intermediate_size", "max_position_embeddings", "type_vocab_size", "hidden_act",
              "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range")  # fmt: skip
    values = {name: getattr(model.config, name) for name in fields}
    (tmp_path / "bert_config.json").write_text(json.dumps(values))
    (tmp_path / "vocab.txt").write_text("\n".join(f"w{i}" for i in range(60)))
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {}
    for name, tensor in model.state_dict().items():
        for new, former in old.items():
            name = name.replace(new, former)
        tensors[name] = tensor
    del tensors[DECODER + ".bias"]  # missing in checkpoints of that age
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    loaded = load("BertForPreTraining", tmp_path)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in loaded.state_dict().items())
    with pytest.warns(UserWarning, match="not used by this model: cls.seq_relationship"):
        words = bert.BertForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(words.cls.predictions.bias, model.cls.predictions.bias)


@pytest.mark.parametrize("initializer", ["normal", "truncated_normal"])
def test_initial_values(initializer: str) -> None:
    config = bert.BertConfig(
        vocab_size=3000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, initializer=initializer,
    )  # fmt: skip
    model = bert.BertForPreTraining(config)
    words = model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.weight is words
    cut = initializer == "truncated_normal"
    assert words[0].any() == cut
    assert abs(words[1:].std().item() - (0.0176 if cut else 0.02)) < 0.0002
    assert (words.abs().max() <= 0.04) == cut
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "LayerNorm" in name:
            assert parameter.eq(1).all(), name
        else:
            assert 0.01 < parameter.std() < 0.03, name
    with pytest.raises(ValueError, match="initializer must be one of normal, truncated_normal"):
        bert.BertConfig(initializer="uniform")
