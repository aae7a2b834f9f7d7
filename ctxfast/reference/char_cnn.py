"""ELMo's character convolutions (Peters et al., 2018, after Kim et al., 2016).

    x = embedding[ids];   out_f = activation(max over positions p of (x[p : p + width_f] . weight_f + bias_f))

The maximum runs over all full windows, in-word padding included, and comes before the activation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("relu", "tanh")


def _activate(x: Tensor, activation: str) -> Tensor:
    return torch.relu(x) if activation == "relu" else torch.tanh(x)


def char_cnn(
    ids: Tensor,
    embedding: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str = "relu",
) -> Tensor:
    """ids [..., M], embedding [V, C], weights [n_i, C, width_i], biases [n_i] -> [..., sum n_i]."""
    rows = ids.reshape(-1, ids.shape[-1])
    x = F.embedding(rows, embedding).transpose(1, 2)  # [T, C, M]
    pooled = [
        F.conv1d(x, weight, bias).max(-1).values
        for weight, bias in zip(weights, biases, strict=True)
    ]
    features = sum(weight.shape[0] for weight in weights)
    return _activate(torch.cat(pooled, -1), activation).view(*ids.shape[:-1], features)


def char_cnn_backward(
    grad_output: Tensor,
    ids: Tensor,
    embedding: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str = "relu",
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of embedding, weights and biases: of each filter only the first window with the maximum counts."""
    rows = ids.reshape(-1, ids.shape[-1])
    grad = grad_output.reshape(rows.shape[0], -1)
    characters = F.embedding(rows, embedding)  # [T, M, C]
    dcharacters = torch.zeros_like(characters)
    dweights, dbiases = [], []
    start = 0
    for weight, bias in zip(weights, biases, strict=True):
        count, channels, width = weight.shape
        windows = characters.unfold(1, width, 1).flatten(2)  # [T, P, C * width]
        scores = windows @ weight.flatten(1).t() + bias  # [T, P, n]
        best, place = scores.max(1)
        g = grad[:, start : start + count]
        g = g.where(best > 0, 0.0) if activation == "relu" else g * (1 - torch.tanh(best).square())
        dscores = torch.zeros_like(scores).scatter(1, place.unsqueeze(1), g.unsqueeze(1))
        dweights.append(torch.einsum("tpn,tpk->nk", dscores, windows).view(weight.shape))
        dbiases.append(g.sum(0))
        dwindows = (dscores @ weight.flatten(1)).unflatten(2, (channels, width))
        for offset in range(width):
            steps = dwindows.shape[1]
            before, after = offset, characters.shape[1] - steps - offset
            dcharacters = dcharacters + F.pad(dwindows[..., offset], (0, 0, before, after))
        start += count
    dembedding = torch.zeros_like(embedding).index_add(
        0, rows.reshape(-1), dcharacters.reshape(-1, embedding.shape[1])
    )
    return dembedding, dweights, dbiases
