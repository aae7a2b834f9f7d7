"""What every BERT model has in common: initial values, and checkpoints in and out."""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ctxfast.bert.configuration import FIELDS, BertConfig
from ctxfast.bert.files import make_directory, resolve_directory
from ctxfast.bert.weights import (
    LoadingInfo,
    check_shapes,
    match_names,
    read_checkpoint,
    write_checkpoint,
)
from ctxfast.nn.packed_linear import refresh

Model = TypeVar("Model", bound="BertPreTrainedModel")


class BertPreTrainedModel(nn.Module):
    """Base class of the BERT models, with transformers' names for loading and saving."""

    base_model_prefix = "bert"

    def __init__(self, config: Any) -> None:
        super().__init__()
        if not isinstance(config, BertConfig):
            if not hasattr(config, "to_dict"):
                raise TypeError(
                    f"{type(self).__name__}: config must be a BertConfig, got {type(config).__name__}"
                )
            config = BertConfig.from_dict(config.to_dict())  # transformers' own
        self.config: BertConfig = config

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def refresh(self) -> None:
        """Forgets the packed copies of the weights; the next inference makes them again."""
        refresh(self)

    def init_weights(self) -> None:
        """Draws new parameters: normal with config.initializer_range, LayerNorm 1 and 0, biases 0, the [PAD] row 0."""
        for module in self.modules():
            for name, _ in module.named_parameters(recurse=False):
                self._init_parameter(module, name)

    @torch.no_grad()
    def _init_parameter(self, module: nn.Module, name: str) -> None:
        parameter = getattr(module, name)
        if (
            parameter.is_meta
        ):  # a loader replaces it, and torch's meta functions take a second to import
            return
        if name == "bias":
            parameter.zero_()
        elif isinstance(module, nn.LayerNorm):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, self.config.initializer_range)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                parameter[module.padding_idx].zero_()

    @classmethod
    def from_pretrained(
        cls: type[Model],
        directory: str | os.PathLike[str],
        *,
        config: BertConfig | None = None,
        dtype: torch.dtype | str | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **arguments: Any,
    ) -> Any:
        """Loads a model from a directory, the local Hugging Face cache, or the hub, in evaluation mode.

        dtype:     type of the parameters: float32 by default, whatever the file holds; "auto" keeps the file's
        arguments: fields of `BertConfig` to override (num_labels, id2label, hidden_dropout_prob, ...) and keywords of
                   the class (add_pooling_layer, pack)

        Parameters of the file's own type map the file and share its pages until they are written to. What the
        checkpoint lacks is drawn anew; that and what it has too much is named in one warning each.

        Returns the model; with output_loading_info also {"missing_keys", "unexpected_keys", "mismatched_keys",
        "error_msgs"}. Raises TypeError for an unknown argument, FileNotFoundError for a missing directory or file,
        ValueError for a damaged file or, without ignore_mismatched_sizes, for a parameter of another shape.
        """
        caller = f"{cls.__name__}.from_pretrained"
        keywords = {name: arguments.pop(name) for name in _keywords(cls) if name in arguments}
        if "torch_dtype" in arguments:
            dtype = arguments.pop("torch_dtype")
        unknown = sorted(set(arguments) - FIELDS)
        if unknown:
            raise TypeError(f"{caller}: unknown argument {', '.join(map(repr, unknown))}")
        folder = resolve_directory(
            directory,
            caller=caller,
            weights=True,
            cache_dir=cache_dir,
            revision=revision,
            local_files_only=local_files_only,
            token=token,
        )
        if config is None:
            config = BertConfig.from_pretrained(folder, **arguments)
        elif arguments:
            config = BertConfig.from_dict(config.to_dict(), **arguments)
        with torch.device("meta"):
            model = cls(config, **keywords)
        info = model._load(
            read_checkpoint(folder, caller=caller), dtype, ignore_mismatched_sizes, caller
        )
        model._warn(info, caller, str(directory))
        model.eval()
        return (model, vars(info)) if output_loading_info else model

    def _load(
        self,
        checkpoint: dict[str, Tensor],
        dtype: torch.dtype | str | None,
        ignore_mismatched_sizes: bool,
        caller: str,
    ) -> LoadingInfo:
        """Gives this model, made on the meta device, its parameters."""
        expected = self.state_dict()
        found, unexpected = match_names(checkpoint, expected, f"{self.base_model_prefix}.")
        mismatched = check_shapes(
            found, expected, ignore_mismatched_sizes=ignore_mismatched_sizes, caller=caller
        )
        target = _parameter_dtype(dtype, found, caller)
        missing = set(expected) - set(found)
        new = {name: torch.empty(expected[name].shape, dtype=target) for name in missing}
        loaded = {name: tensor.to(target) for name, tensor in found.items()}
        self.load_state_dict({**loaded, **new}, assign=True)
        for name in sorted(missing):
            path, _, parameter = name.rpartition(".")
            self._init_parameter(self.get_submodule(path), parameter)
        mismatched_names = {name for name, _, _ in mismatched}
        return LoadingInfo(missing - mismatched_names, unexpected, mismatched)

    def _warn(self, info: LoadingInfo, caller: str, source: str) -> None:
        new = sorted(info.missing_keys | {name for name, _, _ in info.mismatched_keys})
        if new:
            warnings.warn(
                f"{caller}: newly initialised, because {source!r} has no such tensor of that shape: "
                f"{', '.join(new)}",
                stacklevel=3,
            )
        unused = sorted(self._unused(info.unexpected_keys))
        if unused:
            warnings.warn(
                f"{caller}: in {source!r} but not used by this model: {', '.join(unused)}",
                stacklevel=3,
            )

    def _unused(self, names: set[str]) -> set[str]:
        """Those of a checkpoint's extra names that a user should hear of."""
        return names

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes config.json and model.safetensors, each at once or not at all; transformers loads them."""
        caller = f"{type(self).__name__}.save_pretrained"
        folder = make_directory(directory, caller=caller)
        write_checkpoint(folder / "model.safetensors", self.state_dict(), caller=caller)
        config = copy.copy(self.config)
        config.architectures = [type(self).__name__]
        config.dtype = self.dtype
        config.save_pretrained(folder)


def _keywords(cls: type) -> list[str]:
    """Names of the constructor's arguments behind self and config."""
    return list(inspect.signature(cls).parameters)[1:]


def _parameter_dtype(
    dtype: torch.dtype | str | None, found: dict[str, Tensor], caller: str
) -> torch.dtype:
    if dtype is None:
        return torch.float32
    if dtype == "auto":
        return next((tensor.dtype for tensor in found.values()), torch.float32)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"{caller}: dtype must be a floating-point torch dtype or 'auto', got {dtype!r}"
        )
    return dtype
