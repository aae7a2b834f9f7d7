"""BERT with the heads of its pretraining (Devlin et al., 2019, section 3.1): masked words and next sentences."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ctxfast.bert.configuration import BertConfig
from ctxfast.bert.heads import (
    BertLMPredictionHead,
    BertOnlyMLMHead,
    BertOnlyNSPHead,
    BertPreTrainingHeads,
)
from ctxfast.bert.inputs import PackedInputs, pack_inputs, pack_labels, sequence_labels
from ctxfast.bert.model import BertModel
from ctxfast.bert.outputs import (
    BertForPreTrainingOutput,
    MaskedLMOutput,
    NextSentencePredictorOutput,
)
from ctxfast.bert.pretrained import BertPreTrainedModel
from ctxfast.bert.selection import Selection
from ctxfast.nn.packed_linear import PackedLinear, set_packing
from ctxfast.packed import PackedBatch

IGNORED = -100


class _WordPredictor(BertPreTrainedModel):
    """What the two models with a word predictor share. Its decoder is tied to the word vectors."""

    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    bert: BertModel
    cls: Any

    def get_output_embeddings(self) -> PackedLinear:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, value: PackedLinear) -> None:
        self.cls.predictions.decoder = value
        self.cls.predictions.bias = value.bias

    def _labels(self, labels: Tensor | None, inputs: PackedInputs) -> Tensor | None:
        """[batch.total]; what a mask hides is gone with the padding."""
        return pack_labels(type(self).__name__, labels, inputs.batch)

    def _is_sparse(self, labels: Tensor | None) -> bool:
        """Whether this step gives a loss but no logits."""
        return self.training and labels is not None and self.config.sparse_prediction


def _predict(
    head: BertLMPredictionHead, hidden: Tensor, labels: Tensor | None, batch: PackedBatch
) -> tuple[Tensor, Tensor | None]:
    """Logits [B, S, V] of all tokens, and the loss where there are labels."""
    if labels is None:
        return batch.pad(head(hidden)), None
    scores, loss = head.forward_with_loss(hidden, labels)
    return batch.pad(scores), loss


class BertForMaskedLM(_WordPredictor):
    """BERT that predicts masked words, with the constructor, parameters and outputs of transformers.BertForMaskedLM.

    The loss and its gradient take only the labelled rows. logits are those of all tokens, unless
    config.sparse_prediction leaves them out of training steps with labels: then the last layer, too, is computed for
    labelled tokens alone.
    """

    def __init__(self, config: BertConfig, pack: bool = True) -> None:
        super().__init__(config)
        self.bert = BertModel(self.config, add_pooling_layer=False, pack=pack)
        self.cls = BertOnlyMLMHead(self.config)
        set_packing(self.cls, pack)
        self.init_weights()

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
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """labels: integers [B, S], the words that belong there; -100, and any label in padding, counts for nothing.

        The loss is NaN where no token has a label. The other arguments and errors: `BertModel.forward`.
        """
        inputs = pack_inputs(
            self.config, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        )
        packed_labels = self._labels(labels, inputs)
        selection = None
        if packed_labels is not None and self._is_sparse(packed_labels):
            selection = Selection.where(packed_labels.ne(IGNORED), inputs.batch)
        states = self.bert.encode(inputs, output_hidden_states, output_attentions, selection)
        head, logits = self.cls.predictions, None
        if selection is not None and packed_labels is not None:
            loss = head.loss(states.last, packed_labels[selection.tokens])
        else:
            logits, loss = _predict(head, states.last, packed_labels, states.batch)
        return self.finish(MaskedLMOutput(loss=loss, logits=logits, **states.padded()), return_dict)


class BertForPreTraining(_WordPredictor):
    """BERT with both heads of its pretraining, as transformers.BertForPreTraining.

    config.sparse_prediction leaves prediction_logits out of training steps with both kinds of labels: then the last
    layer is computed for labelled and first tokens alone.
    """

    def __init__(self, config: BertConfig, pack: bool = True) -> None:
        super().__init__(config)
        self.bert = BertModel(self.config, pack=pack)
        self.cls = BertPreTrainingHeads(self.config)
        set_packing(self.cls, pack)
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BertForPreTrainingOutput | tuple[Any, ...]:
        """labels: as in `BertForMaskedLM.forward`;  next_sentence_label: integers [B], 0 where the second sentence
        follows the first, 1 where it does not.

        The loss, the sum of both, is given where both are. The other arguments and errors: `BertModel.forward`.
        """
        inputs = pack_inputs(
            self.config, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        )
        batch = inputs.batch
        packed_labels = self._labels(labels, inputs) if next_sentence_label is not None else None
        selection = None
        if packed_labels is not None and self._is_sparse(packed_labels):
            selection = Selection.where(packed_labels.ne(IGNORED) | (batch.positions == 0), batch)
        states = self.bert.encode(inputs, output_hidden_states, output_attentions, selection)
        relationship = self.cls.seq_relationship(self.bert.pool(states))
        head, logits = self.cls.predictions, None
        if selection is not None and packed_labels is not None:
            loss = head.loss(states.last, packed_labels[selection.tokens])
        else:
            logits, loss = _predict(head, states.last, packed_labels, batch)
        if loss is not None and next_sentence_label is not None:
            following = sequence_labels(
                type(self).__name__, "next_sentence_label", next_sentence_label, len(relationship)
            )
            loss = loss + F.cross_entropy(relationship, following)
        output = BertForPreTrainingOutput(
            loss=loss,
            prediction_logits=logits,
            seq_relationship_logits=relationship,
            **states.padded(),
        )
        return self.finish(output, return_dict)


class BertForNextSentencePrediction(BertPreTrainedModel):
    """BERT that tells whether its second sentence follows the first, as transformers.BertForNextSentencePrediction."""

    def __init__(self, config: BertConfig, pack: bool = True) -> None:
        super().__init__(config)
        self.bert = BertModel(self.config, pack=pack)
        self.cls = BertOnlyNSPHead(self.config)
        self.init_weights()

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
    ) -> NextSentencePredictorOutput | tuple[Any, ...]:
        """labels: integers [B], 0 where the second sentence follows the first, 1 where it does not.

        The other arguments and errors: `BertModel.forward`. The last layer is computed for first tokens alone, unless
        hidden states or attentions are asked for.
        """
        inputs = pack_inputs(
            self.config, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        )
        first = Selection.first_tokens(inputs.batch)
        states = self.bert.encode(inputs, output_hidden_states, output_attentions, first)
        logits = self.cls(self.bert.pool(states))
        loss = None
        if labels is not None:
            labels = sequence_labels(type(self).__name__, "labels", labels, len(logits))
            loss = F.cross_entropy(logits, labels)
        output = NextSentencePredictorOutput(loss=loss, logits=logits, **states.padded())
        return self.finish(output, return_dict)
