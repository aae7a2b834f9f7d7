"""ELMo weights in and out: the published hdf5 form, AllenNLP's state_dicts, safetensors.

Inside the package a model's weights are a state_dict of `ElmoBiLm`, under AllenNLP's names. The hdf5 form stems from
TensorFlow: matrices are [in, out], gates stand in the order i, g, f, o, the forget bias lacks its 1, and a highway
layer has its gate the other way round.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ctxfast.bert.files import write_atomically
from ctxfast.bert.weights import read_pickle, read_safetensors
from ctxfast.elmo.options import ElmoOptions

if TYPE_CHECKING:
    from ctxfast.elmo.lstm import ElmoLstm

StateDict = dict[str, Tensor]

_ENCODER = "_token_embedder."
_OURS = re.compile(
    r"(?:^|.*\.)(_token_embedder\..+|_elmo_lstm\.(?:for|back)ward_layer_.+|_word_embedding\.weight)$"
)


class Hdf5Reader:
    """Arrays of an hdf5 file by name, each only read where it has the shape that is expected."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import h5py

        self.path = os.fspath(path)
        try:
            self._file = h5py.File(self.path, "r")
        except FileNotFoundError:
            raise FileNotFoundError(f"weight_file must be an existing file, got {path}") from None
        except OSError as error:
            if os.path.isfile(self.path) and os.access(self.path, os.R_OK):
                raise ValueError(
                    f"weight_file must be an hdf5 file, got {path} ({error})"
                ) from error
            raise

    def __enter__(self) -> Hdf5Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __contains__(self, name: str) -> bool:
        import h5py

        return isinstance(self._file.get(name), h5py.Dataset)

    def rows(self, name: str) -> int:
        """The first dimension of an array, 0 where there is none."""
        return int(self._file[name].shape[0]) if name in self and self._file[name].shape else 0

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """float32 of this shape. Raises ValueError where the file has another one, or none."""
        if name not in self:
            raise ValueError(f"weight_file must hold {name} {shape}, got none in {self.path}")
        dataset = self._file[name]
        if dataset.shape != shape or dataset.dtype.kind != "f":
            raise ValueError(
                f"weight_file must hold {name} as numbers of shape {shape} by the options, got "
                f"{dataset.dtype} of {dataset.shape} in {self.path}"
            )
        if dataset.is_virtual or dataset.external:
            raise ValueError(f"weight_file must hold {name} itself, got a reference in {self.path}")
        values = np.empty(shape, np.float32)
        try:
            if values.size:
                dataset.read_direct(values)
        except OSError as error:
            raise ValueError(f"weight_file must be whole, got {self.path} ({error})") from error
        return torch.from_numpy(values)


def _cell_path(direction: int, layer: int, options: ElmoOptions, single: bool) -> str:
    if single and options.n_layers == 1:
        return f"RNN_{direction}/RNN/LSTMCell"
    return f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell"


def _forget_to_third(x: Tensor) -> Tensor:
    """Blocks i, g, f, o of the first dimension as i, f, g, o, and the reverse: it swaps the middle two."""
    i, second, third, o = x.chunk(4, 0)
    return torch.cat((i, third, second, o))


def _read_cell(file: Hdf5Reader, path: str, inputs: int, options: ElmoOptions) -> StateDict:
    dim, output = options.dim, options.output_dim
    kernel = file.read(f"{path}/W_0", (inputs + output, 4 * dim)).t()
    bias = _forget_to_third(file.read(f"{path}/B", (4 * dim,)))
    bias[dim : 2 * dim] += 1.0
    tensors = {
        "input_linearity.weight": _forget_to_third(kernel[:, :inputs]),
        "state_linearity.weight": _forget_to_third(kernel[:, inputs:]),
        "state_linearity.bias": bias,
    }
    if options.has_projection:
        projection = file.read(f"{path}/W_P_0", (dim, output))
        tensors["state_projection.weight"] = projection.t().contiguous()
    return tensors


def _read_lstm(file: Hdf5Reader, options: ElmoOptions) -> StateDict:
    tensors: StateDict = {}
    for direction, name in enumerate(("forward", "backward")):
        for layer in range(options.n_layers):
            single = f"{_cell_path(direction, layer, options, True)}/W_0" in file
            path = _cell_path(direction, layer, options, single)
            inputs = options.projection_dim if layer == 0 else options.output_dim
            cell = _read_cell(file, path, inputs, options)
            prefix = f"_elmo_lstm.{name}_layer_{layer}."
            tensors |= {prefix + key: tensor for key, tensor in cell.items()}
    return tensors


def _read_encoder(file: Hdf5Reader, options: ElmoOptions) -> StateDict:
    channels, size = options.character_dim, options.n_filters
    table = torch.zeros(262, channels)
    rows = file.rows("char_embed")
    if rows not in (261, 262):
        raise ValueError(
            f"weight_file must hold char_embed of 261 or 262 rows, got {rows} in {file.path}"
        )
    table[262 - rows :] = file.read("char_embed", (rows, channels))
    tensors = {"_char_embedding_weights": table}
    for index, (width, count) in enumerate(options.filters):
        kernel = file.read(f"CNN/W_cnn_{index}", (1, width, channels, count))
        tensors[f"char_conv_{index}.weight"] = kernel[0].permute(2, 1, 0).contiguous()
        tensors[f"char_conv_{index}.bias"] = file.read(f"CNN/b_cnn_{index}", (count,))
    for layer in range(options.n_highway):
        parts = []
        for kind, shape in (("W", (size, size)), ("b", (size,))):
            transform, carry = (
                file.read(f"CNN_high_{layer}/{kind}_{gate}", shape)
                for gate in ("transform", "carry")
            )
            # The file's "carry" gate lets the transformation through; ours carries the input.
            parts.append(
                torch.cat((transform.t(), -carry.t()) if kind == "W" else (transform, -carry))
            )
        tensors[f"_highways._layers.{layer}.weight"] = parts[0]
        tensors[f"_highways._layers.{layer}.bias"] = parts[1]
    if "CNN_proj/W_proj" in file or size != options.projection_dim:
        matrix = file.read("CNN_proj/W_proj", (size, options.projection_dim))
        tensors["_projection.weight"] = matrix.t().contiguous()
        tensors["_projection.bias"] = file.read("CNN_proj/b_proj", (options.projection_dim,))
    return {_ENCODER + name: tensor for name, tensor in tensors.items()}


def read_hdf5(path: str | os.PathLike[str], options: ElmoOptions) -> StateDict:
    """The state_dict of a published weight file. Raises ValueError where it does not fit the options."""
    with Hdf5Reader(path) as file:
        if options.has_characters:
            tensors = _read_encoder(file, options)
        else:
            assert options.n_tokens_vocab is not None
            words = file.read("embedding", (options.n_tokens_vocab, options.projection_dim))
            padding = torch.zeros(1, options.projection_dim)
            tensors = {"_word_embedding.weight": torch.cat((padding, words))}
        return tensors | _read_lstm(file, options)


def read_lstm_weights(path: str | os.PathLike[str], lstm: ElmoLstm) -> StateDict:
    """The LSTM part of a published weight file for a module of known sizes, by the module's own names."""
    options = ElmoOptions(
        dim=lstm.cell_size,
        projection_dim=lstm.input_size,
        n_layers=lstm.num_layers,
        cell_clip=None,
        proj_clip=None,
        use_skip_connections=lstm.use_skip_connections,
    )
    with Hdf5Reader(path) as file:
        tensors = _read_lstm(file, options)
    return {name.removeprefix("_elmo_lstm."): tensor for name, tensor in tensors.items()}


def read_weights(path: str | os.PathLike[str], options: ElmoOptions) -> StateDict:
    """The state_dict of `ElmoBiLm` in a weight file of any form, chosen by the file's name.

    .safetensors, and .th, .pt, .bin (read with weights_only), may hold a larger model: names up to the last
    "_token_embedder" or "_elmo_lstm" are cut. Everything else is hdf5.
    """
    file = Path(path)
    kind = file.suffix.lower()
    if kind not in (".safetensors", ".th", ".pt", ".pth", ".bin"):
        return read_hdf5(file, options)
    if not file.is_file():
        raise FileNotFoundError(f"weight_file must be an existing file, got {path}")
    read = read_safetensors if kind == ".safetensors" else read_pickle
    content = read(file, "Elmo")
    tensors: StateDict = {}
    for name, tensor in content.items():
        match = _OURS.match(name)
        if match is None:
            continue
        if match[1] in tensors:
            raise ValueError(f"weight_file must hold one ELMo, got {match[1]} twice in {path}")
        tensors[match[1]] = tensor
    if options.has_characters:
        tensors.pop("_word_embedding.weight", None)  # a table of cached words
    if not tensors:
        raise ValueError(
            f"weight_file must hold an ELMo, got {len(content)} other tensors in {path}"
        )
    return tensors


def hdf5_arrays(tensors: Mapping[str, Tensor], options: ElmoOptions) -> dict[str, np.ndarray]:
    """The arrays of the published form, by their names there."""
    arrays: dict[str, Tensor] = {}

    def encoder(name: str) -> Tensor:
        return tensors[_ENCODER + name]

    if options.has_characters:
        arrays["char_embed"] = encoder("_char_embedding_weights")[1:]
        for index in range(len(options.filters)):
            kernel = encoder(f"char_conv_{index}.weight")
            arrays[f"CNN/W_cnn_{index}"] = kernel.permute(2, 1, 0).unsqueeze(0)
            arrays[f"CNN/b_cnn_{index}"] = encoder(f"char_conv_{index}.bias")
        for layer in range(options.n_highway):
            for kind, name in (("W", "weight"), ("b", "bias")):
                transform, carry = encoder(f"_highways._layers.{layer}.{name}").chunk(2, 0)
                arrays[f"CNN_high_{layer}/{kind}_transform"] = (
                    transform.t() if kind == "W" else transform
                )
                arrays[f"CNN_high_{layer}/{kind}_carry"] = -carry.t() if kind == "W" else -carry
        if _ENCODER + "_projection.weight" in tensors:
            arrays["CNN_proj/W_proj"] = encoder("_projection.weight").t()
            arrays["CNN_proj/b_proj"] = encoder("_projection.bias")
    else:
        arrays["embedding"] = tensors["_word_embedding.weight"][1:]
    for direction, name in enumerate(("forward", "backward")):
        for layer in range(options.n_layers):
            path = _cell_path(direction, layer, options, False)
            prefix = f"_elmo_lstm.{name}_layer_{layer}."
            parts = [
                _forget_to_third(tensors[f"{prefix}{part}_linearity.weight"])
                for part in ("input", "state")
            ]
            arrays[f"{path}/W_0"] = torch.cat(parts, 1).t()
            bias = tensors[f"{prefix}state_linearity.bias"].clone()
            bias[options.dim : 2 * options.dim] -= 1.0
            arrays[f"{path}/B"] = _forget_to_third(bias)
            if options.has_projection:
                arrays[f"{path}/W_P_0"] = tensors[f"{prefix}state_projection.weight"].t()
    return {name: x.detach().float().contiguous().cpu().numpy() for name, x in arrays.items()}


def write_hdf5(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], options: ElmoOptions
) -> None:
    """Writes the published form, at once or not at all. The forget bias is rounded once: it loses its 1."""
    arrays = hdf5_arrays(tensors, options)

    def write(temporary: Path) -> None:
        import h5py

        with h5py.File(temporary, "w") as file:
            for name, array in arrays.items():
                file.create_dataset(name, data=array)

    write_atomically(Path(path), write)


def initial_weights(options: ElmoOptions, generator: torch.Generator | None = None) -> StateDict:
    """Random weights, drawn as the training code of the published models draws them."""

    def normal(*shape: int, std: float) -> Tensor:
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    def uniform(*shape: int, bound: float) -> Tensor:
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    tensors: StateDict = {}
    size, projection = options.n_filters, options.projection_dim
    if options.has_characters:
        encoder: dict[str, Any] = {
            "_char_embedding_weights": uniform(262, options.character_dim, bound=1.0)
        }
        encoder["_char_embedding_weights"][0] = 0.0
        for index, (width, count) in enumerate(options.filters):
            shape = (count, options.character_dim, width)
            std = (width * options.character_dim) ** -0.5
            relu = options.activation == "relu"
            weight = uniform(*shape, bound=0.05) if relu else normal(*shape, std=std)
            encoder[f"char_conv_{index}.weight"] = weight
            encoder[f"char_conv_{index}.bias"] = torch.zeros(count)
        for layer in range(options.n_highway):
            encoder[f"_highways._layers.{layer}.weight"] = normal(2 * size, size, std=size**-0.5)
            bias = torch.cat((torch.zeros(size), torch.full((size,), 2.0)))
            encoder[f"_highways._layers.{layer}.bias"] = bias
        if size != projection:
            encoder["_projection.weight"] = normal(projection, size, std=size**-0.5)
            encoder["_projection.bias"] = torch.zeros(projection)
        tensors |= {_ENCODER + name: tensor for name, tensor in encoder.items()}
    else:
        assert options.n_tokens_vocab is not None
        words = normal(options.n_tokens_vocab + 1, projection, std=1.0)
        words[0] = 0.0
        tensors["_word_embedding.weight"] = words
    dim, output = options.dim, options.output_dim
    for name in ("forward", "backward"):
        for layer in range(options.n_layers):
            prefix = f"_elmo_lstm.{name}_layer_{layer}."
            inputs = projection if layer == 0 else output
            bound = (6.0 / (inputs + output + 4 * dim)) ** 0.5
            tensors[f"{prefix}input_linearity.weight"] = uniform(4 * dim, inputs, bound=bound)
            tensors[f"{prefix}state_linearity.weight"] = uniform(4 * dim, output, bound=bound)
            bias = torch.zeros(4 * dim)
            bias[dim : 2 * dim] = 1.0
            tensors[f"{prefix}state_linearity.bias"] = bias
            if options.has_projection:
                bound = (6.0 / (dim + output)) ** 0.5
                tensors[f"{prefix}state_projection.weight"] = uniform(output, dim, bound=bound)
    return tensors
