"""The language model that ELMo's layers come from: probabilities of the next and of the previous word."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ctxfast import ops
from ctxfast.elmo.bilm import ElmoBiLm
from ctxfast.elmo.characters import batch_to_ids

BOS, EOS, UNKNOWN = 0, 1, 2  # places of <S>, </S> and <UNK> in a vocabulary
_IGNORED = -100


@dataclass(frozen=True)
class LanguageModelOutput:
    """Losses in nats a word: mean of both directions, and each; words counts the predictions of one direction."""

    loss: Tensor
    forward_loss: Tensor
    backward_loss: Tensor
    words: int

    @property
    def perplexity(self) -> float:
        """exp(loss)"""
        return math.exp(self.loss.item())


class BiLanguageModel(nn.Module):
    """A full softmax over a vocabulary on top of both directions of an `ElmoBiLm` (Peters et al., 2018).

    bilm:       the model;  vocabulary: words, the first three <S>, </S> and <UNK>
    Both directions share the parameters softmax_weight [V, P] and softmax_bias [V], which the published files lack.

    States are reset in every call: a sentence's probability does not depend on what came before.
    """

    def __init__(self, bilm: ElmoBiLm, vocabulary: Sequence[str]) -> None:
        super().__init__()
        if list(vocabulary[:3]) != ["<S>", "</S>", "<UNK>"]:
            raise ValueError(
                "BiLanguageModel: vocabulary must begin with <S>, </S> and <UNK>, got "
                f"{', '.join(map(repr, vocabulary[:3])) or 'nothing'}"
            )
        self.bilm = bilm
        self.bilm.stateful = "reset"
        size = bilm.get_output_dim() // 2
        self.softmax_weight = nn.Parameter(torch.empty(len(vocabulary), size))
        nn.init.normal_(self.softmax_weight, std=size**-0.5)
        self.softmax_bias = nn.Parameter(torch.zeros(len(vocabulary)))
        self._numbers = {word: number for number, word in enumerate(vocabulary)}

    def word_ids(self, sentences: Sequence[Sequence[str]]) -> Tensor:
        """Numbers in the vocabulary [B, T], -1 behind the end of a sentence."""
        longest = max((len(sentence) for sentence in sentences), default=0)
        ids = torch.full((len(sentences), longest), -1)
        for row, sentence in enumerate(sentences):
            numbers = [self._numbers.get(word, UNKNOWN) for word in sentence]
            ids[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        return ids

    def score(self, sentences: Sequence[Sequence[str]]) -> LanguageModelOutput:
        """`forward` of tokenised sentences."""
        device = self.softmax_weight.device
        ids = self.word_ids(sentences).to(device)
        return self(batch_to_ids(sentences).to(device), ids)

    def forward(self, inputs: Tensor, word_ids: Tensor) -> LanguageModelOutput:
        """inputs: character ids [B, T, 50]; word_ids: [B, T], what is to be predicted, negative for padding.

        The forward direction predicts every word and the end, the backward one every word and the begin; neither is
        asked before it has read its own mark.
        """
        layers, mask = self.bilm.layers(inputs)
        if word_ids.shape != inputs.shape[:2]:
            raise ValueError(
                f"BiLanguageModel: word_ids must be {tuple(inputs.shape[:2])}, got {tuple(word_ids.shape)}"
            )
        following, preceding = targets(word_ids, mask)
        hidden = layers[-1].chunk(2, -1)
        losses = [
            ops.linear_cross_entropy(
                part.contiguous(), self.softmax_weight, self.softmax_bias, labels, _IGNORED
            )
            for part, labels in zip(hidden, (following, preceding), strict=True)
        ]
        words = int((following != _IGNORED).sum())
        return LanguageModelOutput((losses[0] + losses[1]) / 2, losses[0], losses[1], words)


def targets(word_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What follows and what precedes each position of begin, words, end: int64 [B, T + 2], -100 where nothing does."""
    batch, size = word_ids.shape
    lengths = mask.sum(1) - 2  # words of each sentence
    following = torch.full((batch, size + 2), _IGNORED, device=word_ids.device)
    preceding = following.clone()
    words = word_ids.long().masked_fill(word_ids < 0, _IGNORED)
    following[:, :size] = words
    preceding[:, 2:] = words
    rows = torch.arange(batch, device=word_ids.device)
    following[rows, lengths] = EOS
    preceding[:, 1] = BOS
    return following, preceding
