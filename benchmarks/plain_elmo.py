"""ELMo (Peters et al., 2018) in plain PyTorch, the way AllenNLP computes it: the truth in float64, and the eager peer.

Every token goes through the convolutions, padding included; the LSTMs are a Python loop over time on the rows that are
still running. It reads the published hdf5 form, and shares no code with ctxfast.elmo.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import CPU

FILTERS = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))


@dataclass(frozen=True)
class Shape:
    """Sizes of a published model; `parameters` counts what its file holds."""

    dim: int = 4096
    projection_dim: int = 512
    n_highway: int = 2
    filters: tuple[tuple[int, int], ...] = FILTERS
    n_layers: int = 2
    character_dim: int = 16

    @property
    def features(self) -> int:
        return sum(count for _, count in self.filters)

    def options(self) -> dict[str, Any]:
        lstm = {
            "cell_clip": 3,
            "proj_clip": 3,
            "use_skip_connections": True,
            "n_layers": self.n_layers,
            "projection_dim": self.projection_dim,
            "dim": self.dim,
        }
        characters = {
            "activation": "relu",
            "embedding": {"dim": self.character_dim},
            "filters": [list(pair) for pair in self.filters],
            "n_highway": self.n_highway,
            "n_characters": 262,
            "max_characters_per_token": 50,
        }
        return {"lstm": lstm, "char_cnn": characters}

    def arrays(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Random arrays of the published file; every part moves the output."""

        def normal(*size: int, std: float) -> Tensor:
            return torch.empty(size).normal_(0.0, std, generator=generator)

        channels, n, p, d = self.character_dim, self.features, self.projection_dim, self.dim
        arrays = {"char_embed": normal(261, channels, std=1.0)}
        for i, (width, count) in enumerate(self.filters):
            std = (width * channels) ** -0.5
            arrays[f"CNN/W_cnn_{i}"] = normal(1, width, channels, count, std=std)
            arrays[f"CNN/b_cnn_{i}"] = normal(count, std=0.2)
        for k in range(self.n_highway):
            for gate, offset in (("transform", 0.0), ("carry", -1.0)):
                arrays[f"CNN_high_{k}/W_{gate}"] = normal(n, n, std=0.5 * n**-0.5)
                arrays[f"CNN_high_{k}/b_{gate}"] = normal(n, std=0.2) + offset
        arrays["CNN_proj/W_proj"] = normal(n, p, std=0.5 * n**-0.5)
        arrays["CNN_proj/b_proj"] = normal(p, std=0.2)
        for direction in (0, 1):
            for layer in range(self.n_layers):
                path = cell_path(direction, layer)
                arrays[f"{path}/W_0"] = normal(2 * p, 4 * d, std=(2 * p) ** -0.5)
                arrays[f"{path}/B"] = normal(4 * d, std=0.2)
                arrays[f"{path}/W_P_0"] = normal(d, p, std=2.0 * d**-0.5)
        return arrays

    def recurrent_elements(self) -> int:
        """Weights that every time step reads: both directions, all layers."""
        per_cell = 4 * self.dim * self.projection_dim + self.dim * self.projection_dim
        return 2 * self.n_layers * per_cell

    def steps(self, lengths: list[int], distinct: int) -> list[tuple[float, float]]:
        """FLOP and weights read of what must follow each other: the encoder, the input products, each time step."""
        channels, n, p, d = self.character_dim, self.features, self.projection_dim, self.dim
        convolution = sum(w * count for w, count in self.filters) * channels
        highway = 2 * n * n * self.n_highway
        windows = 8  # of a word of five letters; the windows of its padding are equal
        encoder = 2.0 * distinct * (windows * convolution + highway + n * p)
        inputs = 2 * self.n_layers * 4 * d * p
        total = sum(lengths)
        steps = [
            (encoder, float(convolution + highway + n * p)),
            (2.0 * total * inputs, float(inputs)),
        ]
        recurrent = float(self.recurrent_elements())
        steps += [
            (2.0 * recurrent * sum(length > t for length in lengths), recurrent)
            for t in range(max(lengths))
        ]
        return steps


def cell_path(direction: int, layer: int) -> str:
    return f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell"


def write_weights(directory: Path, shape: Shape, *, seed: int = 0) -> None:
    """options.json and weights.hdf5 as published, with random weights."""
    import h5py

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "options.json").write_text(json.dumps(shape.options()), encoding="utf-8")
    with h5py.File(directory / "weights.hdf5", "w") as file:
        for name, array in shape.arrays(torch.Generator().manual_seed(seed)).items():
            file[name] = array.numpy()


class PlainElmo:
    """The layers of a batch, states zero at first. dtype: of weights and arithmetic."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device = CPU) -> None:
        import h5py

        self.shape = _shape(json.loads((directory / "options.json").read_text(encoding="utf-8")))
        with h5py.File(directory / "weights.hdf5") as file:
            arrays: dict[str, Tensor] = {}

            def visit(name: str, item: Any) -> None:
                if isinstance(item, h5py.Dataset):
                    arrays[name] = torch.from_numpy(item[...]).to(device, dtype)

            file.visititems(visit)
        zero = torch.zeros(1, self.shape.character_dim, dtype=dtype, device=device)
        self.table = torch.cat((zero, arrays["char_embed"]))
        self.filters = [
            (arrays[f"CNN/W_cnn_{i}"][0].permute(2, 1, 0).contiguous(), arrays[f"CNN/b_cnn_{i}"])
            for i in range(len(self.shape.filters))
        ]
        self.highways = []
        for k in range(self.shape.n_highway):
            parts = [arrays[f"CNN_high_{k}/{kind}_{gate}"].t().contiguous()
                     for gate in ("transform", "carry") for kind in ("W", "b")]  # fmt: skip
            self.highways.append(parts)
        self.projection = arrays["CNN_proj/W_proj"].t().contiguous(), arrays["CNN_proj/b_proj"]
        self.cells = [
            [self._cell(arrays, direction, layer) for layer in range(self.shape.n_layers)]
            for direction in (0, 1)
        ]

    def _cell(self, arrays: dict[str, Tensor], direction: int, layer: int) -> tuple[Tensor, ...]:
        path = cell_path(direction, layer)
        kernel = arrays[f"{path}/W_0"].t()
        split = self.shape.projection_dim
        projection = arrays[f"{path}/W_P_0"].t().contiguous()
        return (
            kernel[:, :split].contiguous(),
            kernel[:, split:].contiguous(),
            arrays[f"{path}/B"],
            projection,
        )

    def tokens(self, ids: Tensor) -> Tensor:
        """[T, 50] -> [T, P]"""
        characters = F.embedding(ids, self.table).transpose(1, 2)
        pooled = [
            torch.relu(torch.max(F.conv1d(characters, weight, bias), dim=-1).values)
            for weight, bias in self.filters
        ]
        x = torch.cat(pooled, dim=-1)
        for weight, bias, carry_weight, carry_bias in self.highways:
            gate = torch.sigmoid(F.linear(x, carry_weight, carry_bias))
            x = gate * torch.relu(F.linear(x, weight, bias)) + (1 - gate) * x
        return F.linear(x, *self.projection)

    def __call__(self, ids: Tensor, lengths: list[int]) -> Tensor:
        """ids [B, T, 50] with boundaries, lengths in falling order -> layers [L + 1, B, T, 2P]."""
        batch, steps, characters = ids.shape
        tokens = self.tokens(ids.view(-1, characters)).view(batch, steps, -1)
        below = [tokens, tokens]
        layers = [torch.cat(below, -1)]
        for layer in range(self.shape.n_layers):
            outputs = [
                self._run(self.cells[direction][layer], below[direction], lengths, direction == 0)
                for direction in (0, 1)
            ]
            if layer:
                outputs = [output + x for output, x in zip(outputs, below, strict=True)]
            below = outputs
            layers.append(torch.cat(outputs, -1))
        return torch.stack(layers)

    def _run(
        self, cell: tuple[Tensor, ...], x: Tensor, lengths: list[int], forward: bool
    ) -> Tensor:
        w_input, w_state, bias, projection = cell
        batch, steps, _ = x.shape
        output = x.new_zeros(batch, steps, projection.shape[0])
        h = x.new_zeros(batch, projection.shape[0])
        c = x.new_zeros(batch, projection.shape[1])
        for step in range(steps) if forward else reversed(range(steps)):
            rows = sum(length > step for length in lengths)
            gates = F.linear(x[:rows, step], w_input) + F.linear(h[:rows], w_state, bias)
            i, j, f, o = gates.chunk(4, -1)
            memory = torch.sigmoid(f + 1) * c[:rows] + torch.sigmoid(i) * torch.tanh(j)
            memory = torch.clamp(memory, -3, 3)
            state = F.linear(torch.sigmoid(o) * torch.tanh(memory), projection)
            state = torch.clamp(state, -3, 3)
            c, h = c.clone(), h.clone()
            c[:rows], h[:rows], output[:rows, step] = memory, state, state
        return output


def _shape(options: dict[str, Any]) -> Shape:
    lstm, characters = options["lstm"], options["char_cnn"]
    return Shape(
        dim=lstm["dim"],
        projection_dim=lstm["projection_dim"],
        n_highway=characters["n_highway"],
        filters=tuple((width, count) for width, count in characters["filters"]),
        n_layers=lstm["n_layers"],
        character_dim=characters["embedding"]["dim"],
    )
