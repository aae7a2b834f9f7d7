"""AllenNLP 0.9's ElmoEmbedder: sentences in, NumPy arrays out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from ctxfast.bert.files import write_atomically
from ctxfast.elmo.bilm import ElmoBiLm
from ctxfast.elmo.boundaries import remove_sentence_boundaries
from ctxfast.elmo.characters import ELMoCharacterMapper, batch_to_ids
from ctxfast.nn.scalar_mix import ConfigurationError

DEFAULT_BATCH_SIZE = 64
FORMATS = ("all", "top", "average")
_WINDOW = 2048  # sentences that are sorted together


class ELMoTokenCharactersIndexer:
    """Words to character ids, under the name that AllenNLP's pipelines use."""

    def __init__(
        self, namespace: str = "elmo_characters", tokens_to_add: dict[str, int] | None = None
    ) -> None:
        self._namespace = namespace
        self._mapper = ELMoCharacterMapper(tokens_to_add)

    def tokens_to_indices(
        self, tokens: Sequence[Any], vocabulary: Any = None, index_name: str | None = None
    ) -> dict[str, list[list[int]]]:
        """Ids by `index_name` (AllenNLP 0.9), or by "elmo_tokens"."""
        words = [token if isinstance(token, str) else token.text for token in tokens]
        rows = [self._mapper.convert_word_to_char_ids(word) for word in words]
        return {index_name or "elmo_tokens": rows}


class ElmoEmbedder:
    """Every layer of every token of sentences, with the language model's states carried from call to call.

    options_file, weight_file: as for `ElmoBiLm`;  cuda_device: number of a GPU, or -1 for the CPU
    stateful: see `StatefulModule`; with "reset" or "warm" a sentence's vectors do not depend on what came before
    """

    def __init__(
        self,
        options_file: str | os.PathLike[str] | None = None,
        weight_file: str | os.PathLike[str] | None = None,
        cuda_device: int = -1,
        *,
        stateful: bool | str = True,
    ) -> None:
        self.indexer = ELMoTokenCharactersIndexer()
        self.elmo_bilm = ElmoBiLm(options_file, weight_file)
        self.elmo_bilm.eval()
        self.elmo_bilm.stateful = stateful
        if cuda_device >= 0:
            self.elmo_bilm = self.elmo_bilm.cuda(device=cuda_device)
        self.cuda_device = cuda_device

    def batch_to_embeddings(self, batch: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Tokenised sentences -> vectors [B, L + 1, T, 2P] without boundaries, and mask [B, T]."""
        ids = batch_to_ids(batch)
        if self.cuda_device >= 0:
            ids = ids.cuda(device=self.cuda_device)
        layers, mask = self.elmo_bilm.layers(ids)
        count, rows, steps, features = layers.shape
        flat, inner = remove_sentence_boundaries(
            layers.transpose(0, 1).reshape(rows * count, steps, features),
            mask.repeat_interleave(count, 0),
        )
        vectors = flat.view(rows, count, flat.shape[1], features)
        return vectors, inner.view(rows, count, inner.shape[1])[:, 0]

    def embed_sentence(self, sentence: Sequence[str]) -> np.ndarray:
        """One tokenised sentence of n words -> float32 [L + 1, n, 2P]."""
        return self.embed_batch([sentence])[0]

    def embed_batch(self, batch: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Tokenised sentences -> float32 [L + 1, n, 2P] for each."""
        if not batch:
            return []
        with torch.no_grad():
            vectors = self.batch_to_embeddings(batch)[0].float().cpu().numpy()
        return [row[:, : len(sentence)] for row, sentence in zip(vectors, batch, strict=True)]

    def embed_sentences(
        self,
        sentences: Iterable[Sequence[str]],
        batch_size: int = DEFAULT_BATCH_SIZE,
        *,
        batch_tokens: int | None = None,
    ) -> Iterator[np.ndarray]:
        """The arrays of many sentences, in their order.

        batch_tokens: most tokens of a batch, padding and boundaries included; then sentences of like length run
            together where states are not carried (carried states belong to the order of the sentences)
        """
        if batch_tokens is None:
            for batch in _batched(sentences, batch_size):
                yield from self.embed_batch(batch)
            return
        carried = self.elmo_bilm.stateful is True
        for window in _batched(sentences, _WINDOW):
            order = range(len(window))
            if not carried:
                order = sorted(order, key=lambda i: len(window[i]))  # type: ignore[assignment]
            found: dict[int, np.ndarray] = {}
            for group in token_batches(order, [len(s) for s in window], batch_size, batch_tokens):
                arrays = self.embed_batch([window[i] for i in group])
                # A copy frees the padded array that all rows of a batch are views of.
                found.update((i, array.copy()) for i, array in zip(group, arrays, strict=True))
            yield from (found.pop(i) for i in range(len(window)))

    def embed_file(
        self,
        input_file: TextIO,
        output_file_path: str | os.PathLike[str],
        output_format: str = "all",
        batch_size: int = DEFAULT_BATCH_SIZE,
        forget_sentences: bool = False,
        use_sentence_keys: bool = False,
    ) -> None:
        """Writes one dataset for each line of whitespace-separated words, as `allennlp elmo` does.

        output_format: "all" [L + 1, n, 2P], "top" [n, 2P] or "average" [n, 2P] over the layers
        forget_sentences: leave out sentence_to_index, which finds the key of a sentence
        use_sentence_keys: the sentence is the key, in place of the number of its line

        Raises ConfigurationError for blank lines, equal keys or an unknown format; the file appears when it is whole.
        """
        if output_format not in FORMATS:
            raise ConfigurationError(
                f"ElmoEmbedder: output_format must be one of {', '.join(FORMATS)}, got {output_format!r}"
            )
        sentences = [line.strip() for line in input_file]
        write_allennlp_file(
            output_file_path,
            sentences,
            self.embed_sentences((line.split() for line in sentences), batch_size),
            output_format,
            forget_sentences=forget_sentences,
            use_sentence_keys=use_sentence_keys,
        )


def token_batches(
    order: Iterable[int], lengths: Sequence[int], batch_size: int, batch_tokens: int
) -> Iterator[list[int]]:
    """Consecutive items of `order` in groups of at most batch_size, and batch_tokens with padding and boundaries."""
    group: list[int] = []
    longest = 0
    for index in order:
        length = lengths[index] + 2
        wider = max(longest, length)
        if group and (len(group) == batch_size or wider * (len(group) + 1) > batch_tokens):
            yield group
            group, wider = [], length
        group.append(index)
        longest = wider
    if group:
        yield group


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def combine_layers(layers: np.ndarray, output_format: str) -> np.ndarray:
    """[L + 1, n, D] as the format asks."""
    if output_format == "top":
        return layers[-1]
    return layers.mean(0) if output_format == "average" else layers


def write_allennlp_file(
    path: str | os.PathLike[str],
    sentences: Sequence[str],
    arrays: Iterable[np.ndarray],
    output_format: str,
    *,
    forget_sentences: bool = False,
    use_sentence_keys: bool = False,
) -> None:
    """The hdf5 layout of `allennlp elmo`: a dataset for each sentence, and sentence_to_index, a JSON object."""
    blank = [index for index, line in enumerate(sentences) if not line]
    if blank:
        raise ConfigurationError(
            f"embed: the input must hold no blank lines, got {len(blank)} at (from 0) {blank[:20]}"
        )
    keys = list(sentences) if use_sentence_keys else [str(i) for i in range(len(sentences))]
    if use_sentence_keys:
        twice = (
            next((key for key in keys if keys.count(key) > 1), None)
            if len(set(keys)) < len(keys)
            else None
        )
        if twice is not None:
            raise ConfigurationError(f"embed: sentences must differ as keys, got {twice!r} twice")
        unsafe = next((key for key in keys if "/" in key), None)
        if unsafe is not None:
            raise ConfigurationError(
                f"embed: sentences must hold no '/' as keys, which hdf5 reads as a group, got {unsafe!r}"
            )

    def write(temporary: Path) -> None:
        import h5py

        with h5py.File(temporary, "w") as file:
            for key, layers in zip(keys, arrays, strict=True):
                file.create_dataset(
                    key, data=combine_layers(layers, output_format), dtype="float32"
                )
            if not forget_sentences and not use_sentence_keys:
                index = dict(zip(sentences, keys, strict=True))
                text = file.create_dataset(
                    "sentence_to_index", (1,), dtype=h5py.string_dtype("utf-8")
                )
                text[0] = json.dumps(index)

    write_atomically(Path(path), write)
