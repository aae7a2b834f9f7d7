"""From the layers of a packed batch to the vectors that were asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def select_layers(
    hidden_states: Sequence[Tensor],
    layers: str | tuple[int, ...],
    mix_weights: Sequence[float] | None = None,
) -> Tensor:
    """The layers asked for, in float32.

    Args:
        hidden_states: embedding output, then the output of every layer, each [T, D].
        layers: see `EmbedOptions`.
        mix_weights: for "mix": one number per layer, before the softmax; equal when None.

    Returns:
        [T, D] for "top", "mix" and a single index, otherwise [T, L, D].
    """
    if layers == "top":
        return hidden_states[-1].float()
    if layers == "mix":
        scores = torch.tensor(mix_weights or [0.0] * len(hidden_states), dtype=torch.float64)
        mixed = torch.zeros_like(hidden_states[0], dtype=torch.float32)
        for share, hidden in zip(scores.softmax(0).tolist(), hidden_states, strict=True):
            mixed.add_(hidden, alpha=share)
        return mixed
    if layers == "all":
        return torch.stack([hidden.float() for hidden in hidden_states], dim=1)
    chosen = [hidden_states[index].float() for index in layers if not isinstance(index, str)]
    return chosen[0] if len(chosen) == 1 else torch.stack(chosen, dim=1)


class LinePool:
    """Pools the tokens of lines whose pieces arrive in any order.

    Args:
        lines: number of lines.
        row_shape: shape of a pooled vector, (D,) or (L, D).
        pooling: "mean", "max", "cls" or "pooler".
    """

    def __init__(self, lines: int, row_shape: tuple[int, ...], pooling: str) -> None:
        self.pooling = pooling
        start = -torch.inf if pooling == "max" else 0.0
        self._total = torch.full((lines, *row_shape), start, dtype=torch.float32)
        self._count = torch.zeros(lines, dtype=torch.int64)

    def add(self, rows: Tensor, lengths: Sequence[int], lines: Sequence[int]) -> None:
        """Take pieces of lines.

        Args:
            rows: the kept tokens of the pieces one after another [T, *row_shape]; with "cls" and
                "pooler" one row per piece.
            lengths: kept tokens of each piece, at least one.
            lines: the line each piece belongs to.
        """
        if self.pooling in ("cls", "pooler"):
            values, weights = rows, [1] * len(lines)
        else:
            kind = "sum" if self.pooling == "mean" else "max"
            sizes = torch.tensor(lengths, device=rows.device)
            values, weights = torch.segment_reduce(rows, kind, lengths=sizes), list(lengths)
        values, index = values.cpu(), torch.tensor(lines)
        if self.pooling == "max":
            where = index.view(-1, *(1,) * (values.dim() - 1)).expand_as(values)
            self._total.scatter_reduce_(0, where, values, "amax")
        else:
            self._total.index_add_(0, index, values)
        self._count.index_add_(0, index, torch.tensor(weights))

    def result(self, normalize: bool = False) -> Tensor:
        """[lines, *row_shape] in float32; zero for lines that got no piece."""
        shape = (-1, *(1,) * (self._total.dim() - 1))
        pooled = self._total
        if self.pooling != "max":
            pooled = pooled / self._count.clamp(min=1).view(shape)
        pooled = pooled.masked_fill((self._count == 0).view(shape), 0.0)
        return torch.nn.functional.normalize(pooled, dim=-1) if normalize else pooled
