"""ELMo's first layer with AllenNLP's names: character ids to token vectors, each distinct token encoded once."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ctxfast.elmo.boundaries import add_sentence_boundary_token_ids
from ctxfast.elmo.characters import boundary_ids
from ctxfast.elmo.options import ElmoOptions
from ctxfast.nn.character_encoder import CharacterEncoder
from ctxfast.nn.packed_linear import PackedModule


class VectorCache:
    """Vectors of tokens by the bytes of their character ids, for the weights that they were made with.

    A few tokens (begin, end, padding) are pinned; beside them the `capacity` tokens used last. Safe under threads.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self._lock = threading.Lock()
        self._weights: Any = None
        self._pinned: dict[bytes, Tensor] = {}
        self._recent: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pinned) + len(self._recent)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles begin empty."""
        return VectorCache, (self.capacity,)

    def clear(self) -> None:
        with self._lock:
            self._pinned, self._recent, self._weights = {}, OrderedDict(), None

    def find(self, keys: list[bytes], weights: Any) -> list[Tensor | None]:
        """The vectors that are known; with other weights than before, none."""
        with self._lock:
            if self._weights != weights:
                self._pinned, self._recent, self._weights = {}, OrderedDict(), weights
            found = []
            for key in keys:
                vector = self._pinned.get(key)
                if vector is None and self.capacity:
                    vector = self._recent.get(key)
                    if vector is not None:
                        self._recent.move_to_end(key)
                found.append(vector)
            return found

    def add(
        self, vectors: Iterator[tuple[bytes, Tensor]], weights: Any, pinned: set[bytes]
    ) -> None:
        with self._lock:
            if self._weights != weights:
                return
            for key, vector in vectors:
                if key in pinned:
                    self._pinned[key] = vector.clone()
                elif self.capacity:
                    self._recent[key] = vector.clone()
            while len(self._recent) > self.capacity:
                self._recent.popitem(last=False)


class ElmoCharacterEncoder(PackedModule, CharacterEncoder):
    """AllenNLP's _ElmoCharacterEncoder: begin and end of sentence are put around the tokens.

    options_file, weight_file: options.json and the hdf5 (or safetensors, or .th) file, or a directory and None
    requires_grad: whether the loaded weights are trainable

    max_cached_tokens, an attribute: how many vectors of tokens are kept between calls while the weights are frozen.
    """

    def __init__(
        self,
        options_file: str | os.PathLike[str] | None = None,
        weight_file: str | os.PathLike[str] | None = None,
        requires_grad: bool = False,
        *,
        options: ElmoOptions | None = None,
    ) -> None:
        tensors = None
        if options is None:
            from ctxfast.elmo.files import load_model

            options, everything = load_model(
                options_file, weight_file, caller="_ElmoCharacterEncoder"
            )
            prefix = "_token_embedder."
            tensors = {
                name.removeprefix(prefix): tensor
                for name, tensor in everything.items()
                if name.startswith(prefix)
            }
        if not options.has_characters:
            raise ValueError("ElmoCharacterEncoder: options must have a char_cnn, got word ids")
        projected = options.n_filters != options.projection_dim
        if tensors is not None:
            projected = "_projection.weight" in tensors
        with torch.device("meta") if tensors is not None else torch.device("cpu"):
            super().__init__(
                262,
                options.character_dim,
                options.filters,
                options.n_highway,
                options.projection_dim if projected else None,
                options.activation,
            )
        self.requires_grad = requires_grad
        self._max_characters_per_token = options.max_characters_per_token
        self._boundaries = boundary_ids(options.max_characters_per_token)
        self._cache = VectorCache()
        if tensors is not None:
            self.load_state_dict(tensors, assign=True)
            self.requires_grad_(requires_grad)

    @property
    def max_cached_tokens(self) -> int:
        return self._cache.capacity

    @max_cached_tokens.setter
    def max_cached_tokens(self, count: int) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"max_cached_tokens must be an integer of at least 0, got {count!r}")
        self._cache.capacity = count

    def get_output_dim(self) -> int:
        return self.output_dim

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Character ids [B, T, M] -> token_embedding [B, T + 2, P] and mask [B, T + 2].

        Positions behind the end hold the vector of an empty token.
        """
        ids, mask = self.with_boundaries(inputs)
        return {"token_embedding": self.encode(ids), "mask": mask}

    def with_boundaries(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [B, T + 2, M] and mask [B, T + 2]. Raises ValueError or TypeError for other shapes or types."""
        length = self._max_characters_per_token
        if inputs.dim() != 3 or inputs.shape[-1] != length:
            raise ValueError(
                f"inputs must be character ids [B, T, {length}], got shape {tuple(inputs.shape)}"
            )
        if inputs.is_floating_point() or inputs.dtype == torch.bool:
            raise TypeError(f"inputs must be integers, got {inputs.dtype}")
        inputs = inputs.long()
        begin, end = (torch.tensor(ids, device=inputs.device) for ids in self._boundaries)
        return add_sentence_boundary_token_ids(inputs, (inputs > 0).any(-1), begin, end)

    def encode(self, ids: Tensor) -> Tensor:
        """Ids [..., M] -> [..., P]; equal tokens are encoded once."""
        rows = ids.reshape(-1, ids.shape[-1])
        if rows.shape[0] == 0:
            return self._char_embedding_weights.new_zeros(*ids.shape[:-1], self.output_dim)
        records = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if rows.device.type != "cpu":
            tokens, place = torch.unique(rows, dim=0, return_inverse=True)
            vectors = super().forward(tokens)
        else:
            keys, first, place = _distinct(rows)
            tokens = rows[first]
            if records:
                vectors = super().forward(tokens)
            else:
                with torch.no_grad():
                    vectors = self._cached(tokens, keys)
        return vectors.index_select(0, place).view(*ids.shape[:-1], self.output_dim)

    def _cached(self, tokens: Tensor, keys: list[bytes]) -> Tensor:
        """[n, M] -> [n, P], encoding only what the cache does not know."""
        weights = tuple((id(p), 0 if p.is_inference() else p._version) for p in self.parameters())
        known = self._cache.find(keys, weights)
        missing = [index for index, vector in enumerate(known) if vector is None]
        if not missing:
            return torch.stack(known)  # type: ignore[arg-type]
        new = super().forward(tokens if len(missing) == len(keys) else tokens[missing])
        with torch.inference_mode(False):
            pairs = zip((keys[index] for index in missing), new, strict=True)
            self._cache.add(pairs, weights, self._pinned_keys())
        if len(missing) == len(keys):
            return new
        vectors = new.new_empty(len(keys), new.shape[1])
        vectors[missing] = new
        there = [index for index, vector in enumerate(known) if vector is not None]
        vectors[there] = torch.stack([known[index] for index in there])  # type: ignore[misc]
        return vectors

    def _pinned_keys(self) -> set[bytes]:
        rows = torch.tensor([*self._boundaries, [0] * self._max_characters_per_token])
        return set(_distinct(rows)[0])

    def drop_packed(self) -> None:
        """Forgets the vectors of all tokens, as `ctxfast.nn.refresh` and every change of the weights ask for."""
        super().drop_packed()
        self._cache.clear()


def _distinct(rows: Tensor) -> tuple[list[bytes], Tensor, Tensor]:
    """The distinct rows of ids [n, M] in order of appearance: their bytes, their first places, and [n] of each row."""
    low, high = rows.aminmax()
    if low < 0 or high > 0x7FFF:
        raise ValueError(
            f"inputs must be character ids of at least 0, got {int(low)} to {int(high)}"
        )
    raw = rows.to(torch.int16).contiguous().numpy().tobytes()
    size = 2 * rows.shape[1]
    seen: dict[bytes, int] = {}
    place = [
        seen.setdefault(raw[start : start + size], len(seen)) for start in range(0, len(raw), size)
    ]
    first = [0] * len(seen)
    for row in range(len(place) - 1, -1, -1):
        first[place[row]] = row
    return list(seen), torch.tensor(first), torch.tensor(place)
