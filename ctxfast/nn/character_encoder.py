"""Words to vectors by their characters: convolutions, highway layers, a projection (Kim et al., 2016)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctxfast import ops
from ctxfast.nn.highway import Highway
from ctxfast.nn.packed_linear import PackedLinear, linear

_TOKENS = 2048  # at once, where no gradient keeps what all of them leave behind


class CharacterEncoder(nn.Module):
    """ELMo's token encoder, under the parameter names of AllenNLP.

    n_characters:  rows of the character table, row 0 for the padding of whole tokens
    character_dim: width of a row
    filters:       pairs (width, count)
    n_highway:     highway layers on the sum of the counts, N
    projection_dim: features of the result, or None: no projection, and N features
    activation:    "relu" or "tanh", after the maximum over positions
    """

    def __init__(
        self,
        n_characters: int,
        character_dim: int,
        filters: Sequence[tuple[int, int]],
        n_highway: int = 0,
        projection_dim: int | None = None,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self._char_embedding_weights = nn.Parameter(torch.empty(n_characters, character_dim))
        if not self._char_embedding_weights.is_meta:
            nn.init.uniform_(self._char_embedding_weights, -1.0, 1.0)
        self._filters = len(filters)
        for index, (width, count) in enumerate(filters):
            convolution = nn.Conv1d(character_dim, count, width)
            self.add_module(f"char_conv_{index}", convolution)
        size = sum(count for _, count in filters)
        self._highways = Highway(size, n_highway) if n_highway else None
        self._projection = None if projection_dim is None else PackedLinear(size, projection_dim)
        self.activation = activation
        self.output_dim = size if projection_dim is None else projection_dim

    def add_projection(self, projection_dim: int) -> None:
        """Ends the encoder with a projection where it had none."""
        if self._projection is None:
            self._projection = PackedLinear(self.output_dim, projection_dim)
            self.output_dim = projection_dim

    @property
    def _convolutions(self) -> list[nn.Conv1d]:
        return [getattr(self, f"char_conv_{index}") for index in range(self._filters)]

    def forward(self, ids: Tensor) -> Tensor:
        """Character ids [..., M] -> [..., output_dim]; each token on its own."""
        rows = ids.reshape(-1, ids.shape[-1])
        if rows.shape[0] <= _TOKENS or torch.is_grad_enabled():
            vectors = self._encode(rows)
        else:
            vectors = torch.cat([self._encode(part) for part in rows.split(_TOKENS)])
        return vectors.view(*ids.shape[:-1], self.output_dim)

    def _encode(self, ids: Tensor) -> Tensor:
        x = self._pooled(ids)
        if self._highways is not None:
            x = self._highways(x)
        return x if self._projection is None else linear(self._projection, x)

    def _pooled(self, ids: Tensor) -> Tensor:
        """[T, M] -> [T, N]"""
        table = self._char_embedding_weights
        convolutions = self._convolutions
        longest = max(convolution.kernel_size[0] for convolution in convolutions)
        if ids.shape[-1] < longest:
            raise ValueError(
                f"CharacterEncoder: ids must hold at least {longest} characters a token, the widest "
                f"filter, got {ids.shape[-1]}"
            )
        return ops.char_cnn(
            ids,
            table,
            [convolution.weight for convolution in convolutions],
            [convolution.bias for convolution in convolutions],  # type: ignore[misc]
            self.activation,
        )
