"""Weights in and out: Hugging Face checkpoint files of every age, read by name into a model.

A checkpoint is one model.safetensors, shards with an index, or a pickle, which is only ever read with
weights_only=True. Safetensors and modern pickles are mapped into memory, not copied.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctxfast.bert.files import write_atomically

# TensorFlow's names of a LayerNorm's parameters; elsewhere gamma and beta are names like any other.
_LAYER_NORM = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
# Buffers that old versions of transformers saved.
_BUFFERS = re.compile(r"(^|\.)embeddings\.(position_ids|token_type_ids)$")


@dataclass
class LoadingInfo:
    """What a checkpoint and a model did not agree on, by the model's names.

    mismatched_keys holds (name, shape in the checkpoint, shape in the model).
    """

    missing_keys: set[str] = field(default_factory=set)
    unexpected_keys: set[str] = field(default_factory=set)
    mismatched_keys: set[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=set)
    error_msgs: list[str] = field(default_factory=list)


def read_checkpoint(folder: Path, *, caller: str) -> dict[str, Tensor]:
    """Every tensor of the checkpoint in `folder`, safetensors before pickles, one file before shards.

    Raises FileNotFoundError where there is none or a shard is missing, ValueError where a file is damaged or holds more
    than tensors.
    """
    readers = {"model.safetensors": read_safetensors, "pytorch_model.bin": read_pickle}
    for name, read in readers.items():
        if (folder / name).is_file():
            return read(folder / name, caller)
        index = folder / f"{name}.index.json"
        if index.is_file():
            tensors: dict[str, Tensor] = {}
            for shard in _shards(index, caller):
                if not (folder / shard).is_file():
                    raise FileNotFoundError(
                        f"{caller}: {index} names {shard!r}, which is not beside it"
                    )
                tensors.update(read(folder / shard, caller))
            return tensors
    raise FileNotFoundError(
        f"{caller}: {folder} must hold model.safetensors or pytorch_model.bin, got neither"
    )


def _shards(index: Path, caller: str) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{caller}: {index} must be JSON with a weight_map, got {error!r}"
        ) from error
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError(f"{caller}: {index} must name files beside it, got {names}")
    return names


def read_safetensors(path: Path, caller: str) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: _aligned(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{caller}: {path} must be a whole safetensors file, got {error}"
        ) from error


def _aligned(tensor: Tensor) -> Tensor:
    """Old files start their data at any byte; an element that straddles its own size is copied to a proper place."""
    size = tensor.element_size()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(size)
    if integers is None or tensor.view(integers).numpy().flags.aligned:
        return tensor
    return tensor.clone()


def read_pickle(path: Path, caller: str) -> dict[str, Tensor]:
    try:
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{caller}: {path} must hold nothing but tensors to be read safely, with weights_only, "
            f"got {_first_reason(error)}"
        ) from error
    except PermissionError:
        raise
    except Exception as error:  # a damaged file trips the reader anywhere
        raise ValueError(
            f"{caller}: {path} must be a whole PyTorch file, got {_first_reason(error)}"
        ) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise ValueError(
            f"{caller}: {path} must hold a dictionary of tensors, got {type(content).__name__}"
        )
    return {name: tensor.detach() for name, tensor in content.items()}


def _first_reason(error: BaseException) -> str:
    """The sentence of a torch.load error that says what was wrong, without its advice."""
    text = " ".join(str(error).split())
    found = re.search(r"GLOBAL \S+|Unsupported (operand|type|class) \S+", text)
    reason = found.group(0) if found else text.split(". ")[0]
    return reason.rstrip(".") or type(error).__name__


def match_names(
    checkpoint: Mapping[str, Tensor], expected: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], set[str]]:
    """The checkpoint's tensors under the model's names, and the names that the model has no place for.

    `prefix` ("bert.") may be present on one side and absent on the other; "module." in front comes from DataParallel;
    gamma and beta are renamed behind "LayerNorm." only; saved position_ids are left out.
    """
    found: dict[str, Tensor] = {}
    unexpected: set[str] = set()
    for name, tensor in checkpoint.items():
        name = name.removeprefix("module.")
        for old, new in _LAYER_NORM.items():
            if name == old or name.endswith(f".{old}"):
                name = name.removesuffix(old) + new
        if _BUFFERS.search(name):
            continue
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in expected and candidate not in found:
                found[candidate] = tensor
                break
        else:
            unexpected.add(name)
    return found, unexpected


def check_shapes(
    found: dict[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    ignore_mismatched_sizes: bool,
    caller: str,
) -> set[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Takes tensors of another shape out of `found`; without ignore_mismatched_sizes the first raises ValueError."""
    mismatched = set()
    for name in list(found):
        got, wanted = tuple(found[name].shape), tuple(expected[name].shape)
        if not found[name].is_floating_point():
            raise ValueError(
                f"{caller}: {name} must be floating point in the checkpoint, got {found[name].dtype}"
            )
        if got == wanted:
            continue
        if not ignore_mismatched_sizes:
            raise ValueError(
                f"{caller}: {name} must have shape {wanted} by the configuration, "
                f"got {got} in the checkpoint"
            )
        mismatched.add((name, got, wanted))
        del found[name]
    return mismatched


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], *, caller: str) -> None:
    """Writes a safetensors file that transformers reads. Raises OSError, and leaves an older file alone, on failure."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        write_atomically(path, lambda temporary: save_file(contiguous, temporary, {"format": "pt"}))
    except SafetensorError as error:
        raise OSError(f"{caller}: {path} cannot be written: {error}") from error
