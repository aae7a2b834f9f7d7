"""BertConfig: the shape of a BERT encoder (Devlin et al., 2019) under Hugging Face's field names, and config.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ctxfast.bert.files import make_directory, resolve_directory, write_atomically

# What one fused epilogue computes, by the names that config.json uses for it.
FUSED_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "tanh": "tanh",
}
# What PyTorch computes behind a plain linear layer.
PLAIN_ACTIVATIONS = {
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "swish": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "mish": torch.nn.functional.mish,
    "relu6": torch.nn.functional.relu6,
    "linear": lambda x: x,
}
PROBLEM_TYPES = (
    "regression",
    "single_label_classification",
    "multi_label_classification",
)
# Written to config.json only where they differ from the default, as transformers does.
_OPTIONAL = {
    "architectures": None,
    "dtype": None,
    "initializer": "normal",
    "output_attentions": False,
    "output_hidden_states": False,
    "problem_type": None,
    "return_dict": True,
    "sparse_prediction": False,
}


class BertConfig:
    """Configuration of `BertModel`; the names, defaults and file format of transformers.BertConfig.

    Keys of a config.json that are not listed here are kept as attributes and written back. sparse_prediction
    leaves the [B, S, V] logits out of a training step that has labels. initializer is "normal", as in transformers, or
    "truncated_normal", as in the original BERT.

    Raises ValueError for values that describe no encoder this package computes: a decoder, cross attention, relative
    positions, pruned heads, or an unknown activation.
    """

    model_type = "bert"

    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        max_position_embeddings: int = 512,
        type_vocab_size: int = 2,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        pad_token_id: int | None = 0,
        use_cache: bool = True,
        classifier_dropout: float | None = None,
        is_decoder: bool = False,
        add_cross_attention: bool = False,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        label2id: Mapping[str, int] | None = None,
        problem_type: str | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
        sparse_prediction: bool = False,
        initializer: str = "normal",
        architectures: list[str] | None = None,
        dtype: torch.dtype | str | None = None,
        **extra: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.pad_token_id = pad_token_id
        self.use_cache = use_cache
        self.classifier_dropout = classifier_dropout
        self.is_decoder = is_decoder
        self.add_cross_attention = add_cross_attention
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self.problem_type = problem_type
        self.output_hidden_states = output_hidden_states
        self.output_attentions = output_attentions
        self.return_dict = return_dict
        self.sparse_prediction = sparse_prediction
        self.initializer = initializer
        self.architectures = architectures
        self.dtype = _to_dtype(dtype)
        self._set_labels(num_labels, id2label, label2id)
        for name, value in extra.items():
            setattr(self, name, value)
        self._validate()

    @property
    def num_labels(self) -> int:
        """Number of labels; setting another number renames them LABEL_0, LABEL_1, ..."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, number: int) -> None:
        if number != len(self.id2label):
            self._set_labels(number, None, None)

    def _set_labels(
        self,
        number: int | None,
        id2label: Mapping[int, str] | None,
        label2id: Mapping[str, int] | None,
    ) -> None:
        if id2label is None:
            id2label = {i: f"LABEL_{i}" for i in range(2 if number is None else number)}
        self.id2label = {int(index): label for index, label in id2label.items()}
        if number is not None and number != len(self.id2label):
            raise ValueError(
                f"BertConfig: num_labels must be the size of id2label, {len(self.id2label)}, got {number}"
            )
        if label2id is None:
            label2id = {label: index for index, label in self.id2label.items()}
        self.label2id = dict(label2id)

    def _validate(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
        ):
            self._require(name, _is_integer(getattr(self, name), 1), "a positive integer")
        self._require(
            "num_hidden_layers",
            _is_integer(self.num_hidden_layers, 0),
            "an integer of at least 0",
        )
        self._require(
            "hidden_size",
            self.hidden_size % self.num_attention_heads == 0,
            f"a multiple of num_attention_heads {self.num_attention_heads}",
        )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            optional = value is None and name == "classifier_dropout"
            self._require(name, optional or _is_number(value, 0.0, 1.0), "a number from 0 to 1")
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            self._require(name, _is_number(value, 0.0), "a number of at least 0")
        self._require(
            "pad_token_id",
            self.pad_token_id is None
            or (_is_integer(self.pad_token_id, 0) and self.pad_token_id < self.vocab_size),
            f"null or an id below vocab_size {self.vocab_size}",
        )
        known = [*FUSED_ACTIVATIONS, *PLAIN_ACTIVATIONS]
        self._require("hidden_act", self.hidden_act in known, f"one of {', '.join(known)}")
        self._require("is_decoder", not self.is_decoder, "false, for an encoder")
        self._require("add_cross_attention", not self.add_cross_attention, "false, for an encoder")
        self._require(
            "problem_type",
            self.problem_type is None or self.problem_type in PROBLEM_TYPES,
            f"null or one of {', '.join(PROBLEM_TYPES)}",
        )
        initializers = ("normal", "truncated_normal")
        self._require(
            "initializer", self.initializer in initializers, f"one of {', '.join(initializers)}"
        )
        position_type = getattr(self, "position_embedding_type", "absolute")
        self._require("position_embedding_type", position_type == "absolute", "'absolute'")
        self._require("pruned_heads", not getattr(self, "pruned_heads", None), "empty")

    def _require(self, name: str, condition: bool, expected: str) -> None:
        if not condition:
            raise ValueError(
                f"BertConfig: {name} must be {expected}, got {getattr(self, name, None)!r}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> BertConfig:
        """From the content of a config.json or of Google's bert_config.json.

        overrides replace fields; a name that is no field raises TypeError.
        """
        merged = dict(values)
        model_type = merged.pop("model_type", None) or cls.model_type
        if model_type != cls.model_type:
            raise ValueError(
                f"BertConfig: model_type must be '{cls.model_type}', got {model_type!r}"
            )
        if "torch_dtype" in merged:  # the name of dtype before transformers 4.56
            merged.setdefault("dtype", merged.pop("torch_dtype"))
        unknown = sorted(set(overrides) - FIELDS)
        if unknown:
            raise TypeError(f"BertConfig: unknown argument {', '.join(map(repr, unknown))}")
        if not {"num_labels", "id2label"}.isdisjoint(overrides):
            for name in ("num_labels", "id2label", "label2id"):
                merged.pop(name, None)
        return cls(**{**merged, **overrides})

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], **overrides: Any) -> BertConfig:
        """From a directory, a JSON file, or the name of a model on the Hugging Face hub."""
        path = Path(directory)
        if not path.is_file():
            folder = resolve_directory(directory, caller="BertConfig")
            path = folder / "config.json"
            if not path.is_file() and (folder / "bert_config.json").is_file():
                path = folder / "bert_config.json"
        if not path.is_file():
            raise FileNotFoundError(f"BertConfig: {path.parent} must hold config.json, got none")
        return cls.from_dict(_read_json(path), **overrides)

    def to_dict(self) -> dict[str, Any]:
        """Every field and every kept key, in JSON's types except for the integer keys of id2label."""
        values = {"model_type": self.model_type, **self.__dict__}
        values["dtype"] = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return values

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes config.json, which transformers reads too."""
        values = self.to_dict()
        for name, default in _OPTIONAL.items():
            if values[name] == default:
                del values[name]
        if self.id2label == {0: "LABEL_0", 1: "LABEL_1"}:
            del values["id2label"], values["label2id"]
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        folder = make_directory(directory, caller="BertConfig.save_pretrained")
        write_atomically(
            folder / "config.json", lambda path: path.write_text(text, encoding="utf-8")
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BertConfig) and self.__dict__ == other.__dict__

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items())
        return f"{type(self).__name__}({fields})"


def _parameters() -> frozenset[str]:
    code = BertConfig.__init__.__code__
    return frozenset(code.co_varnames[1 : code.co_argcount])


FIELDS = _parameters()


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any, least: float, most: float = float("inf")) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _to_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"BertConfig: dtype must be the name of a torch dtype, got {dtype!r}")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"BertConfig: {path} must be JSON, got {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"BertConfig: {path} must hold a JSON object, got {type(values).__name__}")
    return values
