"""Small random models, and ELMo written once more for the tests: one token and one step at a time, float64."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ctxfast import ops
from ctxfast.elmo import ElmoBiLm, ElmoOptions, batch_to_ids
from ctxfast.elmo.weights import initial_weights

SENTENCES = [
    ["The", "cat", "sat", "."],
    ["Why", "?"],
    ["A", "much", "longer", "sentence", "of", "naïve", "words", "follows", "."],
]


def options(**changes) -> ElmoOptions:
    base = dict(
        dim=24,
        projection_dim=8,
        n_layers=2,
        cell_clip=3.0,
        proj_clip=0.5,
        use_skip_connections=True,
        character_dim=4,
        filters=((1, 4), (2, 5), (3, 9)),
        n_highway=2,
        activation="relu",
    )
    return ElmoOptions(**{**base, **changes})


def model(seed: int = 0, **changes) -> ElmoBiLm:
    chosen = options(**changes)
    generator = torch.Generator().manual_seed(seed)
    tensors = initial_weights(chosen, generator)
    for tensor in tensors.values():  # biases and clips matter
        if tensor.dim() == 1:
            tensor += torch.empty_like(tensor).normal_(0.0, 0.3, generator=generator)
        elif tensor.shape[-1] in (8, 24):
            tensor *= 2.0
    return ElmoBiLm(options=chosen, tensors=tensors).eval()


def word_layers(
    directory: str | os.PathLike[str],
    sentences: Sequence[Sequence[str]],
    dtype: torch.dtype,
    *,
    batch_size: int = 1,
    stateful: bool | str = "reset",
) -> list[Tensor]:
    """Layers [L + 1, n, 2P] of each sentence without boundaries, in eager PyTorch: the truth in float64."""
    module = ElmoBiLm(directory).eval().to(dtype)
    module.stateful = stateful
    found: list[Tensor] = []
    with ops.use_backend("reference"):
        for start in range(0, len(sentences), batch_size):
            batch = sentences[start : start + batch_size]
            layers, _ = module.layers(batch_to_ids(batch))
            found += [layers[:, row, 1 : len(words) + 1] for row, words in enumerate(batch)]
    return found


def arrays_forward(
    arrays: dict, chosen: ElmoOptions, ids: Tensor, state: dict | None = None
) -> tuple[list[Tensor], dict]:
    """Layers [n + 2, 2P] of one sentence with ids [n + 2, M], boundaries included, from the published arrays.

    state: what an earlier call returned. It follows the formulas of the published model, not the code of the package.
    """
    a = {name: torch.as_tensor(x).double() for name, x in arrays.items()}
    state = {} if state is None else dict(state)
    table = torch.cat((torch.zeros(1, chosen.character_dim).double(), a["char_embed"]))
    tokens = torch.stack([_token(a, chosen, table[row]) for row in ids])
    below = [tokens, tokens]
    layers = [torch.cat(below, -1)]
    for layer in range(chosen.n_layers):
        outputs = []
        for direction in (0, 1):
            x = below[direction]
            steps = range(len(x)) if direction == 0 else reversed(range(len(x)))
            path = f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell"
            h, c = state.get(
                (direction, layer),
                (torch.zeros(chosen.output_dim).double(), torch.zeros(chosen.dim).double()),
            )
            out = torch.zeros(len(x), chosen.output_dim).double()
            for step in steps:
                h, c = _step(a, path, chosen, x[step], h, c)
                out[step] = h
            state[direction, layer] = (h, c)
            if layer and chosen.use_skip_connections:
                out = out + x
            outputs.append(out)
        below = outputs
        layers.append(torch.cat(outputs, -1))
    return layers, state


def _token(a: dict, chosen: ElmoOptions, characters: Tensor) -> Tensor:
    activation = torch.relu if chosen.activation == "relu" else torch.tanh
    pooled = []
    for index, (width, _) in enumerate(chosen.filters):
        kernel, bias = a[f"CNN/W_cnn_{index}"][0], a[f"CNN/b_cnn_{index}"]  # [width, C, n]
        scores = [
            torch.einsum("wc,wcn->n", characters[p : p + width], kernel) + bias
            for p in range(len(characters) - width + 1)
        ]
        pooled.append(activation(torch.stack(scores).amax(0)))
    x = torch.cat(pooled)
    for layer in range(chosen.n_highway):
        part = f"CNN_high_{layer}"
        gate = torch.sigmoid(x @ a[f"{part}/W_carry"] + a[f"{part}/b_carry"])
        x = (
            gate * torch.relu(x @ a[f"{part}/W_transform"] + a[f"{part}/b_transform"])
            + (1 - gate) * x
        )
    return x @ a["CNN_proj/W_proj"] + a["CNN_proj/b_proj"] if "CNN_proj/W_proj" in a else x


def _step(a: dict, path: str, chosen: ElmoOptions, x: Tensor, h: Tensor, c: Tensor):
    i, j, f, o = (torch.cat((x, h)) @ a[f"{path}/W_0"] + a[f"{path}/B"]).chunk(4)
    c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(j)
    if chosen.cell_clip:
        c = c.clamp(-chosen.cell_clip, chosen.cell_clip)
    h = torch.sigmoid(o) * torch.tanh(c)
    if chosen.has_projection:
        h = h @ a[f"{path}/W_P_0"]
        if chosen.proj_clip:
            h = h.clamp(-chosen.proj_clip, chosen.proj_clip)
    return h, c
