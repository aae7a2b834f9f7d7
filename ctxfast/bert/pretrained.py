"""What every BERT model has in common: initial values, and checkpoints in and out."""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ctxfast.bert.configuration import FIELDS, BertConfig
from ctxfast.bert.files import make_directory, resolve_directory
from ctxfast.bert.outputs import ModelOutput
from ctxfast.bert.weights import (
    LoadingInfo,
    check_shapes,
    match_names,
    read_checkpoint,
    write_checkpoint,
)
from ctxfast.nn.packed_linear import refresh, set_precision

Model = TypeVar("Model", bound="BertPreTrainedModel")


class BertPreTrainedModel(nn.Module):
    """Base class of the BERT models, with transformers' names for loading and saving."""

    base_model_prefix = "bert"
    _tied_weights_keys: Mapping[str, str] = {}  # parameter: the one whose storage it shares

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

    @property
    def base_model(self) -> Any:
        """The model without its head."""
        return getattr(self, self.base_model_prefix, self)

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of word vectors."""
        return self.base_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.base_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear | None:
        """The layer that gives a score to every word, None in a model that predicts none."""
        return None

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
        """From now on a training step computes every layer twice and keeps only its input (Chen et al., 2016).

        gradient_checkpointing_kwargs is transformers' argument; {"use_reentrant": False} is what happens anyway.
        """
        if gradient_checkpointing_kwargs not in (None, {}, {"use_reentrant": False}):
            raise ValueError(
                f"{type(self).__name__}: gradient_checkpointing_kwargs must be {{'use_reentrant': False}}, "
                f"got {gradient_checkpointing_kwargs!r}"
            )
        self.base_model.encoder.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Layers keep again what their gradients need."""
        self.base_model.encoder.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.base_model.encoder.gradient_checkpointing

    def init_weights(self) -> None:
        """Draws new parameters by config.initializer and initializer_range: LayerNorm 1 and 0, biases 0.

        "normal" is transformers' way, with the [PAD] row 0; "truncated_normal", cut at two standard deviations and
        with a [PAD] row like any other, is that of the original BERT.
        """
        self.tie_weights()
        done: set[int] = set()
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in done:
                    self._init_parameter(module, name)
                done.add(id(parameter))

    def tie_weights(self) -> None:
        """Makes tied parameters one, where config.tie_word_embeddings says so."""
        if self.config.tie_word_embeddings:
            self._tie(self._tied_weights_keys)

    def _tie(self, pairs: Mapping[str, str]) -> None:
        for target, source in pairs.items():
            path, _, name = target.rpartition(".")
            setattr(self.get_submodule(path), name, self.get_parameter(source))

    @torch.no_grad()
    def _init_parameter(self, module: nn.Module, name: str) -> None:
        parameter = getattr(module, name)
        if (
            parameter.is_meta
        ):  # a loader replaces it, and torch's meta functions take a second to import
            return
        std = self.config.initializer_range
        if name == "bias":
            parameter.zero_()
        elif isinstance(module, nn.LayerNorm):
            parameter.fill_(1.0)
        elif self.config.initializer == "truncated_normal":
            nn.init.trunc_normal_(parameter, 0.0, std, -2 * std, 2 * std)
        else:
            parameter.normal_(0.0, std)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                parameter[module.padding_idx].zero_()

    @classmethod
    def from_pretrained(
        cls: type[Model],
        directory: str | os.PathLike[str],
        *,
        config: BertConfig | None = None,
        dtype: torch.dtype | str | None = None,
        quantization: str | None = None,
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
        quantization: "int8" rounds weights and activations of the linear layers to 8 bits for inference on a CPU, at a
                   documented error; as `ctxfast.nn.set_precision(model, "int8")`. Parameters and files stay as they are
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
        if quantization not in (None, "int8"):
            raise ValueError(f"{caller}: quantization must be None or 'int8', got {quantization!r}")
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
        if quantization is not None:
            set_precision(model, quantization)
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
        tied = self._tied_pairs(found)
        target = _parameter_dtype(dtype, found, caller)
        missing = set(expected) - set(found) - set(tied)
        new = {name: torch.empty(expected[name].shape, dtype=target) for name in missing}
        loaded = {name: tensor.to(target) for name, tensor in found.items()}
        loaded |= new
        loaded |= {copy: loaded[original] for copy, original in tied.items()}
        self.load_state_dict(loaded, assign=True)
        self._tie(tied)
        for name in sorted(missing):
            path, _, parameter = name.rpartition(".")
            self._init_parameter(self.get_submodule(path), parameter)
        mismatched_names = {name for name, _, _ in mismatched}
        return LoadingInfo(missing - mismatched_names, unexpected, mismatched)

    def _tied_pairs(self, found: dict[str, Tensor]) -> dict[str, str]:
        """The parameters to tie, given what a checkpoint holds; leaves the originals alone in `found`.

        As in transformers a checkpoint may hold either of the two, or both: these stay apart if they differ.
        """
        pairs = {}
        for copied, original in self._tied_weights_keys.items():
            if not self.config.tie_word_embeddings:
                break
            if copied in found and original in found:
                if not torch.equal(found[copied], found[original]):
                    warnings.warn(
                        f"{type(self).__name__}: {copied} differs from {original} in the checkpoint, so they are not "
                        "tied; tie_word_embeddings=False says so without this warning",
                        stacklevel=4,
                    )
                    continue
                del found[copied]
            elif copied in found:
                found[original] = found.pop(copied)
            pairs[copied] = original
        return pairs

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

    def finish(self, output: ModelOutput, return_dict: bool | None) -> Any:
        """The output itself or its tuple, as the argument, or else the configuration, has it."""
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()

    def _unused(self, names: set[str]) -> set[str]:
        """Those of a checkpoint's extra names that a user should hear of: not a pooler that the model is to lack."""
        if getattr(self.base_model, "pooler", None) is not None:
            return names
        return {name for name in names if not name.removeprefix("bert.").startswith("pooler.")}

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes config.json and model.safetensors, each at once or not at all; transformers loads them."""
        caller = f"{type(self).__name__}.save_pretrained"
        folder = make_directory(directory, caller=caller)
        parameters = dict(self.named_parameters(remove_duplicate=False))
        tensors = self.state_dict()
        for copied, original in self._tied_weights_keys.items():
            if parameters[copied] is parameters[original]:
                del tensors[copied]
        write_checkpoint(folder / "model.safetensors", tensors, caller=caller)
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
