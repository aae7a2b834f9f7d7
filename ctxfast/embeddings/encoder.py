"""A BERT directory as a function from token sequences to vectors, on packed tokens."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctxfast.bert import BertModel, BertTokenizer
from ctxfast.bert.files import resolve_directory
from ctxfast.embeddings.options import EmbedOptions, OptionError
from ctxfast.embeddings.pieces import LineTokenizer, Piece, batches
from ctxfast.embeddings.pooling import select_layers
from ctxfast.packed import PackedBatch


class BertEncoder:
    """Runs pieces of lines through BERT without padding.

    Args:
        directory: a BERT directory, or a hub id in the local cache.
        options: what is asked for.

    Attributes:
        tokenizer: makes pieces of lines.
        max_length: most tokens of a piece.
        row_shape: shape of one vector, (D,) or (L, D).
        weights_sha256: hex digest of each weights file, by its name.
    """

    def __init__(self, directory: str | os.PathLike[str], options: EmbedOptions) -> None:
        if options.stateful != "reset" or options.layout != "ctxfast":
            raise OptionError(
                "embed: stateful and layout must be left out for a BERT, got an ELMo's"
            )
        self.options = options
        self.device = find_device(options)
        folder = resolve_directory(directory, caller="embed", weights=True)
        self.model, config = _load(folder, options)
        self.model.to(self.device)
        self.weights_sha256 = {path.name: file_sha256(path) for path in _weights(folder)}
        layers = config.num_hidden_layers + 1  # with the embedding output
        check_layers(options, layers)
        tokenizer = BertTokenizer.from_pretrained(folder)
        limit = min(config.max_position_embeddings, tokenizer.model_max_length)
        if options.max_length is not None and options.max_length > limit:
            raise OptionError(
                f"embed: max_length must be at most the model's {limit}, got {options.max_length}"
            )
        self.max_length = options.max_length or limit
        self.tokenizer = LineTokenizer(tokenizer, self.max_length, options.overlong)
        count = layers if options.layers == "all" else len(options.layers)
        self.row_shape: tuple[int, ...] = (config.hidden_size,)
        if options.many_layers:
            self.row_shape = (count, config.hidden_size)

    def __call__(self, pieces: Sequence[Piece]) -> Tensor:
        """The rows of the pieces one after another, float32 [T, *row_shape] on the device.

        T counts the kept tokens; with pooling "cls" and "pooler" there is one row per piece.
        """
        options = self.options
        ids = torch.tensor([token for piece in pieces for token in piece.ids], device=self.device)
        batch = PackedBatch.from_lengths([len(piece.ids) for piece in pieces], device=self.device)
        with torch.inference_mode():
            wanted = options.layers != "top"
            output = self.model.forward_packed(ids, batch, output_hidden_states=wanted)
            if options.pooling == "pooler":
                return output.pooler_output.float()
            hidden = output.hidden_states if wanted else (output.last_hidden_state,)
            if options.pooling == "cls":
                hidden = tuple(states[batch.cu_seqlens[:-1]] for states in hidden)
            rows = select_layers(hidden, options.layers, options.mix_weights)
            if options.pooling == "cls" or all(p.kept == len(p.ids) for p in pieces):
                return rows
            kept = [p.first <= i < p.last for p in pieces for i in range(len(p.ids))]
            return rows[torch.tensor(kept, device=self.device)]

    def batches(self, pieces: Sequence[Piece]) -> Iterator[list[int]]:
        """Indices into `pieces` that run together."""
        return batches(pieces, self.options.batch_tokens)


def check_layers(options: EmbedOptions, count: int) -> None:
    """Raises OptionError where options name layers, or weights, that a model of `count` layers has not."""
    layers, weights = options.layers, options.mix_weights
    if not isinstance(layers, str) and not all(-count <= index < count for index in layers):
        raise OptionError(
            f"embed: layers must be between {-count} and {count - 1} for this model,"
            f" got {','.join(map(str, layers))}"
        )
    if weights is not None and len(weights) != count:
        raise OptionError(
            f"embed: mix_weights must be {count} numbers for this model, got {len(weights)}"
        )


def find_device(options: EmbedOptions) -> torch.device:
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"embed: device must be auto, cpu, cuda or cuda:<index>, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"embed: device must be present, got {name!r} of {torch.cuda.device_count()} GPUs"
        )
    if device.type == "cpu" and options.compute_dtype == "float16":
        raise OptionError(
            "embed: compute_dtype must be float32, bfloat16 or int8 on a CPU, got float16"
        )
    if device.type != "cpu" and options.compute_dtype == "int8":
        raise OptionError(f"embed: compute_dtype int8 must run on a CPU, got device {name!r}")
    return device


def _weights(folder: Path) -> list[Path]:
    for pattern in ("model.safetensors", "pytorch_model.bin", "model-*.safetensors", "*.bin"):
        found = sorted(folder.glob(pattern))
        if found:
            return found
    return []


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _load(directory: Path, options: EmbedOptions) -> tuple[Any, Any]:
    pooler = options.pooling == "pooler"
    quantized = options.compute_dtype == "int8"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*newly initialised")
        model, info = BertModel.from_pretrained(
            directory,
            add_pooling_layer=pooler,
            dtype=torch.float32 if quantized else getattr(torch, options.compute_dtype),
            quantization="int8" if quantized else None,
            output_loading_info=True,
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"embed: the weights in {directory} must be complete, got none for {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    return model.eval(), model.config
