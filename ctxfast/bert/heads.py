"""What BERT's heads are made of, under the names of transformers: the word predictor and the sentence predictor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxfast import ops
from ctxfast.bert.configuration import FUSED_ACTIVATIONS, PLAIN_ACTIVATIONS, BertConfig
from ctxfast.nn.packed_linear import PackedLinear, linear


class BertPredictionHeadTransform(nn.Module):
    """LayerNorm(activation(dense(x)))."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = PackedLinear(config.hidden_size, config.hidden_size)
        self.fused = FUSED_ACTIVATIONS.get(config.hidden_act)
        self.activation = PLAIN_ACTIVATIONS.get(config.hidden_act)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = linear(self.dense, hidden, self.fused)
        if self.activation is not None:
            hidden = self.activation(hidden)
        norm = self.LayerNorm
        return ops.add_layer_norm(hidden, None, norm.weight, norm.bias, norm.eps)


class BertLMPredictionHead(nn.Module):
    """Scores of all words: decoder(transform(x)). The decoder is tied to the word vectors."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = PackedLinear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, V]"""
        return linear(self.decoder, self.transform(hidden))

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy over the rows [R, H] with a label other than -100, whose scores alone are computed."""
        return self._sparse_loss(self.transform(hidden), labels)

    def forward_with_loss(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of all rows, and the loss, whose gradient takes its way through the labelled rows alone."""
        hidden = self.transform(hidden)
        scores = linear(self.decoder, hidden)
        if torch.is_grad_enabled():
            return scores, self._sparse_loss(hidden, labels)
        return scores, F.cross_entropy(scores, labels)

    def _sparse_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        decoder = self.decoder
        return ops.linear_cross_entropy(hidden, decoder.weight, decoder.bias, labels)


class BertOnlyMLMHead(nn.Module):
    """The word predictor."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, V]"""
        return self.predictions(hidden)


class BertOnlyNSPHead(nn.Module):
    """The sentence predictor."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, pooled: Tensor) -> Tensor:
        """[B, H] -> [B, 2]"""
        return self.seq_relationship(pooled)


class BertPreTrainingHeads(nn.Module):
    """Both predictors."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, hidden: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """[R, H] and [B, H] -> [R, V] and [B, 2]"""
        return self.predictions(hidden), self.seq_relationship(pooled)
