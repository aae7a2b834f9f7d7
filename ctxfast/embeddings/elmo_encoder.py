"""An ELMo directory as a function from words to vectors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ctxfast.elmo import ElmoBiLm, batch_to_ids
from ctxfast.embeddings.encoder import check_layers, file_sha256, find_device
from ctxfast.embeddings.options import EmbedOptions, OptionError
from ctxfast.embeddings.pieces import Piece, batches
from ctxfast.embeddings.pooling import select_layers

_SPELLED_BYTES = (
    255  # of a word in the array of tokens; longer words are cut there, not in the model
)


class WordTokenizer:
    """Words of lines, separated by white space, numbered as they appear.

    max_length: most words of a piece, or None;  overlong: "truncate", "split" or "error"

    Attributes:
        overlong_lines: how many lines were longer so far.
        words: all words so far, by number.
        spellings: their UTF-8 form, numpy type S.
    """

    def __init__(self, max_length: int | None, overlong: str) -> None:
        self._max_length = max_length
        self._overlong = overlong
        self._numbers: dict[str, int] = {}
        self._lines = 0
        self.words: list[str] = []
        self.overlong_lines = 0

    def read_vocabulary(self, lines: Iterable[str]) -> None:
        """Numbers the words of a text, so that `spellings` has all of them."""
        for line in lines:
            self._number(line.split())

    @property
    def spellings(self) -> np.ndarray:
        return np.array([_spelled(word) for word in self.words] or [b""])

    def _number(self, words: Sequence[str]) -> list[int]:
        for word in words:
            if word not in self._numbers:
                self._numbers[word] = len(self.words)
                self.words.append(word)
        return [self._numbers[word] for word in words]

    def __call__(self, lines: Sequence[str]) -> list[Piece]:
        """Pieces in the order of `lines`; none for a line without words. Raises ValueError as `overlong` says."""
        pieces: list[Piece] = []
        for number, line in enumerate(lines):
            ids = self._number(line.split())
            size = self._max_length or max(len(ids), 1)
            if len(ids) > size:
                self.overlong_lines += 1
                if self._overlong == "error":
                    raise ValueError(
                        f"embed: a line must have at most {size} words, got {len(ids)} in line "
                        f"{self._lines + number + 1}"
                    )
                if self._overlong == "truncate":
                    ids = ids[:size]
            for start in range(0, len(ids), size):
                part = ids[start : start + size]
                pieces.append(Piece(number, part, 0, len(part)))
        self._lines += len(lines)
        return pieces


def _spelled(word: str) -> bytes:
    raw = word.encode()
    if len(raw) <= _SPELLED_BYTES:
        return raw
    return raw[:_SPELLED_BYTES].decode("utf-8", "ignore").encode()


class ElmoEncoder:
    """Runs lines through an ELMo; the interface of `BertEncoder`.

    Raises:
        OptionError: an option does not fit an ELMo.
    """

    def __init__(self, directory: str | os.PathLike[str], options: EmbedOptions) -> None:
        if options.pooling in ("cls", "pooler"):
            raise OptionError(
                f"embed: pooling must be tokens, mean or max for an ELMo, got {options.pooling}"
            )
        if options.compute_dtype == "int8":
            raise OptionError(
                "embed: compute_dtype must be float32 or bfloat16 for an ELMo, got int8"
            )
        self.options = options
        self.device = find_device(options)
        self.model = ElmoBiLm(directory).eval().to(getattr(torch, options.compute_dtype))
        self.model.to(self.device)
        self.model.stateful = options.stateful
        path = Path(directory)
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        weights = [p for p in files if p.suffix in (".hdf5", ".h5", ".safetensors", ".zip")]
        self.weights_sha256 = {p.name: file_sha256(p) for p in weights}
        count = self.model.num_layers
        check_layers(options, count)
        self._wanted = count if isinstance(options.layers, str) else 1 + max(
            index % count for index in options.layers
        )  # fmt: skip
        self.max_length = options.max_length
        self.tokenizer = WordTokenizer(options.max_length, options.overlong)
        size = self.model.get_output_dim()
        chosen = count if options.layers == "all" else len(options.layers)
        self.row_shape: tuple[int, ...] = (chosen, size) if options.many_layers else (size,)

    def batches(self, pieces: Sequence[Piece]) -> Iterator[list[int]]:
        """Indices into `pieces`: of like length together, or in order where states are carried."""
        if self.options.stateful != "carry":
            yield from batches(pieces, self.options.batch_tokens)
            return
        size = self.options.batch_size
        for start in range(0, len(pieces), size):
            yield list(range(start, min(start + size, len(pieces))))

    def __call__(self, pieces: Sequence[Piece]) -> Tensor:
        """The vectors of the words of the pieces one after another, float32 [T, *row_shape]."""
        words = self.tokenizer.words
        ids = batch_to_ids([[words[number] for number in piece.ids] for piece in pieces])
        lengths = torch.tensor([len(piece.ids) for piece in pieces])
        with torch.inference_mode():
            layers, _ = self.model.layers(ids.to(self.device), num_layers=self._wanted)
            inside = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
            tokens = layers[:, :, 1:-1][:, inside.to(self.device)]  # [L, T, D]
            hidden = tuple(tokens.unbind(0))
            missing = self.model.num_layers - len(hidden)
            hidden = (*hidden, *hidden[-1:] * missing)  # never selected
            chosen = self.options.layers
            if not isinstance(chosen, str):
                chosen = tuple(index % self.model.num_layers for index in chosen)
            return select_layers(hidden, chosen, self.options.mix_weights)
