"""Words to character ids: the bytes of their UTF-8 form between two marks, 50 a word.

id          meaning
0           no word: a row of 50 zeros
1 ... 256   a byte, plus one
257, 258    begin and end of a sentence
259, 260    begin and end of a word
261         padding inside a word
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_BEGIN_SENTENCE, _END_SENTENCE, _BEGIN_WORD, _END_WORD, _PADDING = range(256, 261)


def _marker(character: int, length: int) -> list[int]:
    row = [_PADDING] * length
    row[:3] = [_BEGIN_WORD, character, _END_WORD]
    return row[:length]


class ELMoCharacterMapper:
    """AllenNLP's mapping of a word to its character ids.

    tokens_to_add: further words that stand for themselves, with an id (before the shift by one) each
    """

    max_word_length = 50
    beginning_of_sentence_character = _BEGIN_SENTENCE
    end_of_sentence_character = _END_SENTENCE
    beginning_of_word_character = _BEGIN_WORD
    end_of_word_character = _END_WORD
    padding_character = _PADDING
    beginning_of_sentence_characters = _marker(_BEGIN_SENTENCE, 50)
    end_of_sentence_characters = _marker(_END_SENTENCE, 50)
    bos_token = "<S>"
    eos_token = "</S>"

    def __init__(self, tokens_to_add: dict[str, int] | None = None) -> None:
        self.tokens_to_add = tokens_to_add or {}

    def convert_word_to_char_ids(self, word: str) -> list[int]:
        """50 ids in [1, 261]. Bytes beyond the 48th are cut, unpaired surrogates left out."""
        if word in self.tokens_to_add:
            row = _marker(self.tokens_to_add[word], self.max_word_length)
        elif word == self.bos_token:
            row = self.beginning_of_sentence_characters
        elif word == self.eos_token:
            row = self.end_of_sentence_characters
        else:
            encoded = word.encode("utf-8", "ignore")[: self.max_word_length - 2]
            row = [self.padding_character] * self.max_word_length
            row[: len(encoded) + 2] = [_BEGIN_WORD, *encoded, _END_WORD]
        return [character + 1 for character in row]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ELMoCharacterMapper) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]


_MAPPER = ELMoCharacterMapper()
BOS_IDS = _MAPPER.convert_word_to_char_ids("<S>")
EOS_IDS = _MAPPER.convert_word_to_char_ids("</S>")


def boundary_ids(length: int) -> tuple[list[int], list[int]]:
    """Ids of the begin and the end of a sentence in words of `length` characters."""
    return tuple([c + 1 for c in _marker(mark, length)] for mark in (256, 257))  # type: ignore[return-value]


def batch_to_ids(batch: Sequence[Sequence[str]]) -> Tensor:
    """Character ids int64 [B, longest, 50] of tokenised sentences, zero after the end of each.

    Raises TypeError where a sentence is a string in place of a list of words.
    """
    for sentence in batch:
        if isinstance(sentence, str):
            raise TypeError(
                f"batch_to_ids: batch must hold lists of words, got the string {sentence[:40]!r}"
            )
    longest = max((len(sentence) for sentence in batch), default=0)
    ids = np.zeros((len(batch), longest, _MAPPER.max_word_length), np.int64)
    known: dict[str, list[int]] = {}
    for row, sentence in enumerate(batch):
        for place, token in enumerate(sentence):
            word = token if isinstance(token, str) else token.text  # AllenNLP's Token
            if word not in known:
                known[word] = _MAPPER.convert_word_to_char_ids(word)
            ids[row, place] = known[word]
    return torch.from_numpy(ids)
