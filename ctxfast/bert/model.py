"""BertModel: the encoder of Devlin et al. (2019), without padding from before the embeddings to the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ctxfast.bert.attention_plan import AttentionPlan
from ctxfast.bert.configuration import BertConfig
from ctxfast.bert.embeddings import BertEmbeddings
from ctxfast.bert.encoder import BertEncoder
from ctxfast.bert.inputs import PackedInputs, pack_inputs, packed_inputs, round_rows
from ctxfast.bert.outputs import BaseModelOutputWithPooling
from ctxfast.bert.pretrained import BertPreTrainedModel
from ctxfast.bert.selection import Selection
from ctxfast.nn.fusion import submodules
from ctxfast.nn.packed_linear import PackedLinear, linear, set_packing
from ctxfast.packed import PackedBatch


class BertPooler(nn.Module):
    """tanh(dense(x)) of each sequence's first token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = PackedLinear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """Packed [T, H] -> [B, H]; the first token is a zero vector in a sequence without tokens."""
        starts = batch.cu_seqlens[:-1]
        if hidden.shape[0] == 0:
            first = hidden.new_zeros(starts.shape[0], hidden.shape[1])
        else:
            first = hidden.index_select(0, starts.clamp(max=hidden.shape[0] - 1))
        if not batch.dense:
            first = first.masked_fill((starts == batch.cu_seqlens[1:]).unsqueeze(1), 0.0)
        return linear(self.dense, first, "tanh")


@dataclass(frozen=True)
class PackedStates:
    """What the encoder computes, on packed tokens.

    last:       [rows.total, H]; rows is batch, or the layout of the selected rows
    hidden:     [batch.total, H] each
    attentions: [B, heads, S, S] each
    """

    batch: PackedBatch
    rows: PackedBatch
    last: Tensor
    hidden: list[Tensor]
    attentions: list[Tensor]

    def padded(self) -> dict[str, tuple[Tensor, ...] | None]:
        """hidden_states and attentions as a model returns them."""
        return {
            "hidden_states": tuple(map(self.batch.pad, self.hidden)) or None,
            "attentions": tuple(self.attentions) or None,
        }


class BertModel(BertPreTrainedModel):
    """BERT without a head, with the constructor, parameters and outputs of transformers.BertModel.

    Outputs are those of each sentence alone, and zero in padding; where a mask begins with padding, pooler_output
    belongs to the first token that is none. `output_attentions` and 4-dimensional masks run on the padded grid.

    pack: whether inference may keep packed copies of the weights (about as large as the encoder's own; see
          `ctxfast.nn.packed_bytes`), which pay with few tokens and in bfloat16
    """

    def __init__(
        self, config: BertConfig, add_pooling_layer: bool = True, pack: bool = True
    ) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(self.config)
        self.encoder = BertEncoder(self.config)
        self.pooler = BertPooler(self.config) if add_pooling_layer else None
        self.last_padding: float | None = None
        if not pack:
            set_packing(self, False)
        self.init_weights()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Padded tensors in, padded tensors out; zeros in padding.

        input_ids:      integers [B, S], or inputs_embeds [B, S, H] in their place
        attention_mask: [B, S], non-zero at tokens, by default everywhere; padding may lie anywhere. A 4-dimensional
                        mask, broadcastable to [B, heads, S, S], is applied as it is: bool (true = attend) or added to
                        the scores
        token_type_ids: [B, S], by default 0;  position_ids: [B, S], by default 0 ... S - 1
        The other arguments override the configuration's fields of the same names.

        Raises ValueError for a wrong shape, a sequence beyond max_position_embeddings or, on a CPU, an id outside its
        table; TypeError for a wrong dtype.
        """
        inputs = pack_inputs(
            self.config, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        )
        states = self.encode(inputs, output_hidden_states, output_attentions)
        output = BaseModelOutputWithPooling(
            last_hidden_state=states.batch.pad(states.last),
            pooler_output=self.pool(states),
            **states.padded(),
        )
        return self.finish(output, return_dict)

    def forward_packed(
        self,
        input_ids: Tensor,
        batch: PackedBatch,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> BaseModelOutputWithPooling:
        """The same on tokens that were never padded.

        input_ids, token_type_ids, position_ids: [T], the tokens of `batch` one after another; positions count from 0 in
        each sequence by default

        Returns last_hidden_state and hidden_states of [T, H], and pooler_output [B, H].
        """
        inputs = packed_inputs(input_ids, batch, token_type_ids, position_ids)
        states = self.encode(inputs, output_hidden_states, output_attentions=False)
        return BaseModelOutputWithPooling(
            last_hidden_state=states.last,
            pooler_output=self.pool(states),
            hidden_states=tuple(states.hidden) or None,
        )

    def encode(
        self,
        inputs: PackedInputs,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        selection: Selection | None = None,
    ) -> PackedStates:
        """Embeddings and layers on packed tokens: what the heads build on.

        selection: the rows of the last layer that are wanted, by default all. The rest of that layer is left out unless
        hidden states or attentions are asked for, here or by the configuration.
        """
        config = self.config
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions is None:
            output_attentions = config.output_attentions
        self.__dict__["last_padding"] = inputs.padding  # without nn.Module's own look at the value
        batch = inputs.batch
        rows = batch if selection is None else selection.batch
        parts = submodules(self)
        encoder = parts["encoder"]
        if not (batch.total and encoder.takes_any_rows()):
            inputs = round_rows(inputs)
        last, hidden, attentions = encoder(
            parts["embeddings"](inputs),
            AttentionPlan.of(inputs, output_attentions),
            output_hidden_states,
            selection,
        )
        hidden = [state[: batch.total] for state in hidden]
        if last.shape[0] != rows.total:
            last = last[: rows.total]
        return PackedStates(batch, rows, last, hidden, attentions)

    def pool(self, states: PackedStates) -> Tensor | None:
        """[B, H] of the first tokens, which must be among the rows; None without a pooling layer."""
        return None if self.pooler is None else self.pooler(states.last, states.rows)
