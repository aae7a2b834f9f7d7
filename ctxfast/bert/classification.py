"""BERT with the heads of its fine-tuning (Devlin et al., 2019, section 4): sentences, tokens, spans and choices."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxfast.bert.configuration import BertConfig
from ctxfast.bert.embeddings import dropout
from ctxfast.bert.inputs import coordinates, pack_inputs, pack_labels, sequence_labels
from ctxfast.bert.model import BertModel, PackedStates
from ctxfast.bert.outputs import (
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from ctxfast.bert.pretrained import BertPreTrainedModel
from ctxfast.bert.selection import Selection


class _Classifier(BertPreTrainedModel):
    """Dropout and a linear layer, behind the pooled first token or behind every token."""

    def __init__(self, config: BertConfig, size: int | None, pooled: bool, pack: bool) -> None:
        super().__init__(config)
        config = self.config
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=pooled, pack=pack)
        rate = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if rate is None else rate)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels if size is None else size)
        self.init_weights()

    def _dropped(self, rows: Tensor, sequence_ids: Tensor, positions: Tensor) -> Tensor:
        p = self.dropout.p
        if not self.dropout.training or p == 0.0:
            return rows
        return dropout(rows, p, sequence_ids, positions)

    def _classify_first_tokens(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        output_hidden_states: bool | None,
        output_attentions: bool | None,
    ) -> tuple[PackedStates, Tensor]:
        """Scores [B, N] of the pooled first tokens, for which alone the last layer is computed."""
        inputs = pack_inputs(
            self.config, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        )
        first = Selection.first_tokens(inputs.batch)
        states = self.bert.encode(inputs, output_hidden_states, output_attentions, first)
        pooled = self.bert.pool(states)
        assert pooled is not None
        sequence_ids = torch.arange(len(pooled), device=pooled.device)
        dropped = self._dropped(pooled, sequence_ids, torch.zeros_like(sequence_ids))
        return states, self.classifier(dropped)


class BertForSequenceClassification(_Classifier):
    """A class, several, or numbers for each text or pair, as transformers.BertForSequenceClassification.

    config.problem_type chooses the loss: "single_label_classification" (cross-entropy, integer labels [B]),
    "multi_label_classification" (binary cross-entropy, floating labels [B, num_labels]) or "regression" (mean squared
    error, labels of the logits' shape). Without one, the first labels decide, as in transformers, and the configuration
    remembers it: regression for one label, single for integers, multi for floating point.
    """

    def __init__(self, config: BertConfig, pack: bool = True) -> None:
        super().__init__(config, size=None, pooled=True, pack=pack)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """labels: see the class. The other arguments and errors: `BertModel.forward`.

        The last layer is computed for first tokens alone, unless hidden states or attentions are asked for.
        """
        states, logits = self._classify_first_tokens(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_hidden_states,
            output_attentions,
        )
        loss = None if labels is None else self._loss(logits, labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits, **states.padded())
        return self.finish(output, return_dict)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        config, name = self.config, type(self).__name__
        if config.problem_type is None:
            if self.num_labels == 1:
                config.problem_type = "regression"
            elif labels.is_floating_point():
                config.problem_type = "multi_label_classification"
            else:
                config.problem_type = "single_label_classification"
        if config.problem_type == "single_label_classification":
            return F.cross_entropy(logits, sequence_labels(name, "labels", labels, len(logits)))
        if labels.numel() != logits.numel() or len(labels) != len(logits):
            raise ValueError(
                f"{name}: labels of a {config.problem_type} must be {tuple(logits.shape)}, "
                f"got shape {tuple(labels.shape)}"
            )
        labels = labels.view_as(logits).to(logits.dtype)
        if config.problem_type == "regression":
            return F.mse_loss(logits, labels)
        return F.binary_cross_entropy_with_logits(logits, labels)


class BertForMultipleChoice(_Classifier):
    """One of several texts, as transformers.BertForMultipleChoice."""

    def __init__(self, config: BertConfig, pack: bool = True) -> None:
        super().__init__(config, size=1, pooled=True, pack=pack)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> MultipleChoiceModelOutput | tuple[Any, ...]:
        """input_ids, attention_mask, token_type_ids, position_ids: [B, choices, S], inputs_embeds [B, choices, S, H].
        labels: integers [B], the number of the right choice. Otherwise as `BertModel.forward`.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        dims = 3 if input_ids is not None else 4
        if given is not None and given.dim() != dims:
            name = "input_ids" if input_ids is not None else "inputs_embeds"
            raise ValueError(
                f"{type(self).__name__}: {name} must be [batch, choices, sequence, ...], "
                f"got shape {tuple(given.shape)}"
            )
        choices = 1 if given is None else given.shape[1]
        states, scores = self._classify_first_tokens(
            _flat(input_ids),
            _flat(attention_mask),
            _flat(token_type_ids),
            _flat(position_ids),
            _flat(inputs_embeds),
            output_hidden_states,
            output_attentions,
        )
        logits = scores.view(-1, choices)
        loss = None
        if labels is not None:
            labels = sequence_labels(type(self).__name__, "labels", labels, len(logits))
            loss = F.cross_entropy(logits, labels)
        output = MultipleChoiceModelOutput(loss=loss, logits=logits, **states.padded())
        return self.finish(output, return_dict)


def _flat(x: Tensor | None) -> Tensor | None:
    """[B, choices, ...] -> [B * choices, ...]"""
    return x if x is None or x.dim() < 3 else x.flatten(0, 1)


class BertForTokenClassification(_Classifier):
    """A class for each token, as transformers.BertForTokenClassification; logits are zero in padding."""

    def __init__(self, config: BertConfig, pack: bool = True) -> None:
        super().__init__(config, size=None, pooled=False, pack=pack)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """labels: integers [B, S]; -100, and any label in padding, counts for nothing. NaN where no token has one.

        The other arguments and errors: `BertModel.forward`.
        """
        inputs = pack_inputs(
            self.config, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        )
        batch = inputs.batch
        packed_labels = pack_labels(type(self).__name__, labels, batch)
        states = self.bert.encode(inputs, output_hidden_states, output_attentions)
        scores = self.classifier(self._dropped(states.last, *coordinates(batch, batch.total)))
        loss = None if packed_labels is None else F.cross_entropy(scores, packed_labels)
        output = TokenClassifierOutput(loss=loss, logits=batch.pad(scores), **states.padded())
        return self.finish(output, return_dict)


class BertForQuestionAnswering(BertPreTrainedModel):
    """Start and end of an answer in the text, as transformers.BertForQuestionAnswering.

    Logits in padding are the lowest value of their type, so that no answer is found there and the loss is that of each
    text alone: it does not depend on the amount of padding.
    """

    def __init__(self, config: BertConfig, pack: bool = True) -> None:
        super().__init__(config)
        self.num_labels = self.config.num_labels
        if self.num_labels != 2:
            raise ValueError(
                f"{type(self).__name__}: num_labels must be 2 (start and end), got {self.num_labels}"
            )
        self.bert = BertModel(self.config, add_pooling_layer=False, pack=pack)
        self.qa_outputs = nn.Linear(self.config.hidden_size, 2)
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """start_positions, end_positions: integers [B], positions in the padded grid; the loss, their mean, is given
        where both are. A negative one means 0, one beyond the text, or in padding, counts for nothing.

        The other arguments and errors: `BertModel.forward`.
        """
        inputs = pack_inputs(
            self.config, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        )
        batch = inputs.batch
        states = self.bert.encode(inputs, output_hidden_states, output_attentions)
        grid = batch.pad(self.qa_outputs(states.last))  # [B, S, 2]
        valid = batch.pad(torch.ones_like(batch.indices, dtype=torch.bool))
        grid = grid.masked_fill(~valid.unsqueeze(-1), torch.finfo(grid.dtype).min)
        start, end = (logits.contiguous() for logits in grid.unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            losses = [
                self._loss(logits, name, positions, valid)
                for logits, name, positions in (
                    (start, "start_positions", start_positions),
                    (end, "end_positions", end_positions),
                )
            ]
            loss = (losses[0] + losses[1]) / 2
        output = QuestionAnsweringModelOutput(
            loss=loss, start_logits=start, end_logits=end, **states.padded()
        )
        return self.finish(output, return_dict)

    def _loss(self, logits: Tensor, name: str, positions: Tensor, valid: Tensor) -> Tensor:
        positions = sequence_labels(type(self).__name__, name, positions, len(logits))
        beyond = logits.shape[1]  # the label that is ignored
        positions = positions.clamp(0, beyond)
        known = F.pad(valid, (0, 1)).gather(1, positions.unsqueeze(1)).squeeze(1)
        return F.cross_entropy(logits, positions.masked_fill(~known, beyond), ignore_index=beyond)
