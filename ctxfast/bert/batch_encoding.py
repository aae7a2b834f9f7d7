"""BatchEncoding: what a tokenizer call returns, with the way back from tokens to the text."""

from __future__ import annotations

import warnings
from collections import UserDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Encoding


class TokenSpan(NamedTuple):
    """Half-open range of tokens."""

    start: int
    end: int


class CharSpan(NamedTuple):
    """Half-open range of characters of the original text."""

    start: int
    end: int


class BatchEncoding(UserDict[str, Any]):
    """Mapping of names (`input_ids`, `attention_mask`, ...) to lists, NumPy arrays or tensors.

    Follows transformers.BatchEncoding: values are reached by key or attribute, an integer index
    gives the `tokenizers.Encoding` of one sequence, and the methods below translate between tokens,
    words and characters. Each takes either (index) into the first sequence, or (batch_index, index).

    Raises ValueError where a method needs the encodings and there are none, as after
    `BertTokenizer.pad`.
    """

    def __init__(
        self,
        data: Mapping[str, Any] | None = None,
        encoding: Encoding | Sequence[Encoding] | None = None,
        tensor_type: Any = None,
        prepend_batch_axis: bool = False,
        n_sequences: int | None = None,
    ) -> None:
        super().__init__(data)
        encodings = [encoding] if isinstance(encoding, Encoding) else encoding
        if n_sequences is None and encodings:
            n_sequences = encodings[0].n_sequences
        self._encodings = None if encodings is None else list(encodings)
        self._n_sequences = n_sequences
        self.convert_to_tensors(tensor_type, prepend_batch_axis)

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, str):
            return self.data[item]
        if self._encodings is not None:
            return self._encodings[item]
        if isinstance(item, slice):
            return {key: value[item] for key, value in self.data.items()}
        raise KeyError(f"BatchEncoding: key must be a str or a slice, got {item!r}")

    def __getattr__(self, name: str) -> Any:
        data = self.__dict__.get("data", {})  # absent while an object is being unpickled
        if name in data:
            return data[name]
        raise AttributeError(f"BatchEncoding has no attribute or key {name!r}")

    @property
    def encodings(self) -> list[Encoding] | None:
        """The `tokenizers.Encoding` of every sequence."""
        return self._encodings

    @property
    def n_sequences(self) -> int | None:
        """1 for single texts, 2 for pairs, None if unknown."""
        return self._n_sequences

    @property
    def is_fast(self) -> bool:
        """Whether the encodings, and with them the methods below, are there."""
        return self._encodings is not None

    @property
    def offsets(self) -> list[list[tuple[int, int]]]:
        """(start, end) characters of each token of each sequence; (0, 0) for special tokens."""
        self._encoding("offsets", 0)
        return [encoding.offsets for encoding in self._encodings or []]

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of one sequence."""
        return self._encoding("tokens", batch_index).tokens

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """Index of the word that each token belongs to, None for special tokens."""
        return self._encoding("word_ids", batch_index).word_ids

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """0 for tokens of the text, 1 for tokens of its pair, None for special tokens."""
        return self._encoding("sequence_ids", batch_index).sequence_ids

    def token_to_sequence(
        self, batch_or_token_index: int, token_index: int | None = None
    ) -> int | None:
        encoding, token = self._locate("token_to_sequence", batch_or_token_index, token_index)
        return encoding.token_to_sequence(token)

    def token_to_word(
        self, batch_or_token_index: int, token_index: int | None = None
    ) -> int | None:
        encoding, token = self._locate("token_to_word", batch_or_token_index, token_index)
        return encoding.token_to_word(token)

    def token_to_chars(
        self, batch_or_token_index: int, token_index: int | None = None
    ) -> CharSpan | None:
        encoding, token = self._locate("token_to_chars", batch_or_token_index, token_index)
        span = encoding.token_to_chars(token)
        return None if span is None else CharSpan(*span)

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        encoding, word = self._split("word_to_tokens", batch_or_word_index, word_index)
        span = encoding.word_to_tokens(word, sequence_index)
        return None if span is None else TokenSpan(*span)

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan | None:
        encoding, word = self._split("word_to_chars", batch_or_word_index, word_index)
        span = encoding.word_to_chars(word, sequence_index)
        return None if span is None else CharSpan(*span)

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        encoding, char = self._split("char_to_token", batch_or_char_index, char_index)
        return encoding.char_to_token(char, sequence_index)

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        encoding, char = self._split("char_to_word", batch_or_char_index, char_index)
        return encoding.char_to_word(char, sequence_index)

    def _encoding(self, method: str, batch_index: int) -> Encoding:
        if not self._encodings:
            raise ValueError(
                f"BatchEncoding.{method}: self must come from a tokenizer call on at least one text, "
                "got one without encodings"
            )
        return self._encodings[batch_index]

    def _split(self, method: str, first: int, second: int | None) -> tuple[Encoding, int]:
        batch_index, index = (0, first) if second is None else (first, second)
        return self._encoding(method, batch_index), index

    def _locate(self, method: str, first: int, second: int | None) -> tuple[Encoding, int]:
        """As `_split`, with a negative token index counted from the end."""
        encoding, index = self._split(method, first, second)
        return encoding, index + len(encoding) if index < 0 else index

    def convert_to_tensors(
        self, tensor_type: Any = None, prepend_batch_axis: bool = False
    ) -> BatchEncoding:
        """Turns every value into a tensor ("pt") or an array ("np"), in place; returns self."""
        if tensor_type is None:
            return self
        kind = getattr(tensor_type, "value", tensor_type)
        if kind not in ("pt", "np"):
            raise ValueError(f"BatchEncoding: return_tensors must be 'pt' or 'np', got {kind!r}")
        convert, done = (_to_tensor, torch.Tensor) if kind == "pt" else (_to_numpy, np.ndarray)
        for key, value in self.data.items():
            if prepend_batch_axis:
                value = [value]
            if isinstance(value, done):
                continue
            try:
                self.data[key] = convert(value)
            except (ValueError, TypeError, RuntimeError) as error:
                raise ValueError(
                    f"BatchEncoding: {key} must have rows of one length to become a tensor, got "
                    "rows that differ; padding=True makes them equal, truncation=True cuts long ones"
                ) from error
        return self

    def to(self, device: Any, *, non_blocking: bool = False) -> BatchEncoding:
        """Moves every tensor to `device`, in place; returns self."""
        if not isinstance(device, (str, int, torch.device)):
            # Callers that cast every module input to half precision must not cast the ids.
            warnings.warn(
                f"BatchEncoding.to: device must be a device, got {device!r}, which is ignored",
                stacklevel=2,
            )
            return self
        self.data = {
            key: value.to(device=device, non_blocking=non_blocking)
            if isinstance(value, torch.Tensor)
            else value
            for key, value in self.data.items()
        }
        return self


def _to_tensor(value: Any) -> torch.Tensor:
    first = value[0] if isinstance(value, (list, tuple)) and value else None
    if isinstance(first, torch.Tensor):
        return torch.stack(list(value))
    # NumPy reads nested lists several times faster than torch.tensor does.
    array = np.array(value)
    if array.size == 0:
        return torch.from_numpy(array.astype(np.int64))
    if isinstance(value, np.ndarray) or isinstance(first, np.ndarray):
        return torch.from_numpy(array)
    if array.dtype.kind == "f":
        return torch.tensor(value)  # in the default dtype
    return torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "iu" else array)


def _to_numpy(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        return value.numpy(force=True)
    rows = isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, tuple))
    if rows and len({len(row) for row in value}) > 1:
        ragged = np.empty(len(value), dtype=object)
        ragged[:] = [np.asarray(row) for row in value]
        return ragged
    array = np.asarray(value)
    return array.astype(np.int64) if array.size == 0 else array


def to_list(value: Any) -> Any:
    """Tensors and arrays, also within lists, as Python lists."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (list, tuple)) and value and not isinstance(value[0], int):
        return [to_list(item) for item in value]
    return value
