"""The bidirectional language model below ELMo (Peters et al., 2018): AllenNLP's _ElmoBiLm."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ctxfast.elmo.boundaries import add_sentence_boundary_token_ids
from ctxfast.elmo.characters import ELMoCharacterMapper, batch_to_ids
from ctxfast.elmo.files import load_model, save_model
from ctxfast.elmo.lstm import ElmoLstm
from ctxfast.elmo.options import ElmoOptions
from ctxfast.elmo.token_encoder import ElmoCharacterEncoder
from ctxfast.elmo.weights import initial_weights
from ctxfast.nn.packed_linear import PackedLinear

_CACHED_TOKENS = 32 * 32  # encoded at once


class ElmoBiLm(nn.Module):
    """Token encoder and both LSTM stacks: every layer's vectors, sentence boundaries included.

    options_file, weight_file: options.json and the weights (hdf5, safetensors, .th); or a directory or a zip file that
                   holds both, and None
    requires_grad: whether the weights are trained; by default they are frozen and no graph is recorded
    vocab_to_cache: words whose vectors are computed now; `word_inputs` then number them, 0 being no word

    A model of word ids (without char_cnn in its options) takes ids of its vocabulary plus one, [B, T], 0 being padding.
    """

    def __init__(
        self,
        options_file: str | os.PathLike[str] | None = None,
        weight_file: str | os.PathLike[str] | None = None,
        requires_grad: bool = False,
        vocab_to_cache: Sequence[str] | None = None,
        *,
        options: ElmoOptions | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if options is None:
            options, tensors = load_model(options_file, weight_file, caller="ElmoBiLm")
        elif tensors is None:
            tensors = initial_weights(options)
        self.options = options
        self._requires_grad = requires_grad
        with torch.device("meta"):
            self._token_embedder = (
                ElmoCharacterEncoder(options=options, requires_grad=requires_grad)
                if options.has_characters
                else None
            )
            if self._token_embedder is not None and "_token_embedder._projection.weight" in tensors:
                self._token_embedder.add_projection(options.projection_dim)
            self._elmo_lstm = ElmoLstm(
                options.projection_dim,
                options.output_dim,
                options.dim,
                options.n_layers,
                requires_grad,
                memory_cell_clip_value=options.cell_clip,
                state_projection_clip_value=options.proj_clip,
                use_skip_connections=options.use_skip_connections,
                project=options.has_projection,
            )
            self._word_embedding: nn.Embedding | None = None
            if not options.has_characters:
                self._word_embedding = nn.Embedding(
                    (options.n_tokens_vocab or 0) + 1, options.projection_dim
                )
        self._load(tensors)
        self._choose_copies()
        self.requires_grad_(requires_grad)
        self.num_layers = options.n_layers + 1
        self._bos_embedding: Tensor | None = None
        self._eos_embedding: Tensor | None = None
        if vocab_to_cache:
            if requires_grad:
                warnings.warn(
                    "ElmoBiLm: with requires_grad and vocab_to_cache the cached vectors are trained and the "
                    "character layers get no gradient from cached words",
                    stacklevel=2,
                )
            self.create_cached_cnn_embeddings(vocab_to_cache)

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        expected = {name: x.shape for name, x in self.state_dict().items()}
        missing = sorted(set(expected) - set(tensors))
        unexpected = sorted(set(tensors) - set(expected))
        if missing or unexpected:
            what = f"none for {missing[0]}" if missing else f"{unexpected[0]} beside them"
            raise ValueError(f"ElmoBiLm: weights must be those of the options, got {what}")
        for name, shape in expected.items():
            if tensors[name].shape != shape:
                raise ValueError(
                    f"ElmoBiLm: {name} must have shape {tuple(shape)} by the options, got {tuple(tensors[name].shape)}"
                )
        plain = {name: x.detach().contiguous() for name, x in tensors.items()}
        self.load_state_dict(plain, assign=True)

    def _choose_copies(self) -> None:
        """Packs the token encoder only where it has over half as many weights as the recurrence, which reads its own at
        every step, and they are of 16 bits: elsewhere a copy would save little of the time, in float32 a tenth of the
        encoder's, for as much memory as the encoder takes."""
        recurrent = sum(
            x.numel() for n, x in self._elmo_lstm.named_parameters() if "input_linearity" not in n
        )
        layers = [m for m in self.modules() if isinstance(m, PackedLinear)]
        large = 2 * sum(x.weight.numel() for x in layers) > recurrent
        for layer in layers:
            layer.pack_exact = large and layer.weight.dtype == torch.bfloat16

    @property
    def stateful(self) -> bool | str:
        """How states are carried from call to call, see `StatefulModule`."""
        return self._elmo_lstm.stateful

    @stateful.setter
    def stateful(self, value: bool | str) -> None:
        self._elmo_lstm.stateful = value

    def get_output_dim(self) -> int:
        """Features of a layer, both directions."""
        return 2 * self._elmo_lstm.hidden_size

    def save(self, directory: str | os.PathLike[str], *, form: str = "safetensors") -> None:
        """Writes a directory that this class loads; form "hdf5" is the published one."""
        tensors = self.state_dict()
        if self.options.has_characters:
            tensors.pop("_word_embedding.weight", None)
        save_model(directory, tensors, self.options, form=form, caller="ElmoBiLm.save")

    @torch.no_grad()
    def create_cached_cnn_embeddings(self, tokens: Sequence[str]) -> None:
        """Fills the table of word vectors: row i for tokens[i], row 0 (padding) zero."""
        if self._token_embedder is None:
            raise ValueError("ElmoBiLm: vocab_to_cache needs a model with characters, got word ids")
        mapper = ELMoCharacterMapper
        words = [mapper.bos_token, mapper.eos_token, *tokens]
        device = self._token_embedder._char_embedding_weights.device
        parts = [
            self._token_embedder.encode(
                batch_to_ids([words[start : start + _CACHED_TOKENS]])[0].to(device)
            )
            for start in range(0, len(words), _CACHED_TOKENS)
        ]
        vectors = torch.cat(parts)
        self._bos_embedding, self._eos_embedding = vectors[0].clone(), vectors[1].clone()
        table = vectors[2:].clone()
        table[0] = 0.0
        self._word_embedding = nn.Embedding.from_pretrained(
            table, freeze=not self._requires_grad, padding_idx=0
        )

    def forward(
        self, inputs: Tensor | None, word_inputs: Tensor | None = None
    ) -> dict[str, list[Tensor] | Tensor]:
        """inputs: character ids [B, T, 50]; word_inputs: [B, T], numbers in vocab_to_cache.

        Returns activations, num_layers tensors [B, T + 2, 2P] that are zero in padding, and mask [B, T + 2], bool.
        Where a word number is outside the table its characters are used. inputs may be None where none is.
        """
        layers, mask = self.layers(inputs, word_inputs)
        return {"activations": list(layers.unbind(0)), "mask": mask}

    def layers(
        self,
        inputs: Tensor | None,
        word_inputs: Tensor | None = None,
        num_layers: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All layers as one tensor [num_layers, B, T + 2, 2P], and the mask; with num_layers only the lowest ones."""
        wanted = self.num_layers if num_layers is None else num_layers
        if not 1 <= wanted <= self.num_layers:
            raise ValueError(
                f"ElmoBiLm: num_layers must be in [1, {self.num_layers}], got {num_layers}"
            )
        frozen = not any(p.requires_grad for p in self.parameters())
        with torch.no_grad() if frozen else nullcontext():
            vectors, mask = self.token_vectors(inputs, word_inputs)
            outputs = self._elmo_lstm(vectors, mask, num_layers=wanted - 1)
            lowest = vectors.masked_fill(~mask.unsqueeze(-1), 0.0)
            lowest = torch.cat((lowest, lowest), -1).unsqueeze(0)
            return torch.cat((lowest, outputs)), mask

    def token_vectors(
        self, inputs: Tensor | None, word_inputs: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Layer 0 in one direction: [B, T + 2, P], and the mask [B, T + 2]."""
        encoder = self._token_embedder
        if encoder is None:
            assert self._word_embedding is not None
            ids = word_inputs if word_inputs is not None else inputs
            ids = _word_ids(ids, self._word_embedding.num_embeddings)
            with_ends, mask = add_sentence_boundary_token_ids(ids, ids > 0, 1, 2)
            return self._word_embedding(with_ends), mask
        if self._word_embedding is not None and word_inputs is not None:
            return self._from_table(inputs, word_inputs, encoder)
        if inputs is None:
            raise ValueError("ElmoBiLm: inputs must be character ids [B, T, 50], got None")
        ids, mask = encoder.with_boundaries(inputs)
        return encoder.encode(ids), mask

    def _from_table(
        self, inputs: Tensor | None, word_inputs: Tensor, encoder: ElmoCharacterEncoder
    ) -> tuple[Tensor, Tensor]:
        table = self._word_embedding
        assert table is not None and self._bos_embedding is not None
        words = word_inputs.long()
        outside = (words < 0) | (words >= table.num_embeddings)
        vectors = table(words.masked_fill(outside, 0))
        present = words != 0
        if bool(outside.any()):
            if inputs is None:
                worst = int(words[outside][0])
                raise ValueError(
                    f"ElmoBiLm: word_inputs must be in [0, {table.num_embeddings}) without inputs, got {worst}"
                )
            by_characters = encoder.encode(inputs.long()[outside])
            vectors = vectors.masked_scatter(outside.unsqueeze(-1), by_characters.to(vectors.dtype))
        begin, end = (x.to(vectors) for x in (self._bos_embedding, self._eos_embedding))  # type: ignore[union-attr]
        return add_sentence_boundary_token_ids(vectors, present, begin, end)

    def _apply(self, fn: Any, recurse: bool = True) -> ElmoBiLm:
        super()._apply(fn, recurse)
        self._choose_copies()
        if self._bos_embedding is not None and self._eos_embedding is not None:
            self._bos_embedding = fn(self._bos_embedding)
            self._eos_embedding = fn(self._eos_embedding)
        return self


def _word_ids(ids: Tensor | None, rows: int) -> Tensor:
    if ids is None or ids.dim() != 2 or ids.is_floating_point():
        got = "None" if ids is None else f"{ids.dtype} of shape {tuple(ids.shape)}"
        raise ValueError(f"ElmoBiLm: inputs must be word ids [B, T] for this model, got {got}")
    if ids.device.type == "cpu" and ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= rows:
            raise ValueError(f"ElmoBiLm: word ids must be in [0, {rows}), got {low} to {high}")
    return ids.long()
