"""BERT's layers (Devlin et al., 2019) on packed tokens [T, H].

    x = LayerNorm(dropout(dense(attention(x))) + x)
    x = LayerNorm(dropout(dense(activation(dense(x)))) + x)

Modules and parameters have the names of transformers, so that checkpoints load by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ctxfast import ops
from ctxfast.bert.attention_plan import AttentionPlan
from ctxfast.bert.configuration import FUSED_ACTIVATIONS, PLAIN_ACTIVATIONS, BertConfig
from ctxfast.bert.selection import Selection
from ctxfast.nn.encoder_layer import (
    EncoderLayer,
    EncoderRun,
    EncoderStack,
    FusedLayer,
    encoder_layer_serves,
    fuse_layer,
    stack_layers,
)
from ctxfast.nn.fusion import is_stock, submodules
from ctxfast.nn.packed_linear import (
    PackedLinear,
    PackedModule,
    PackOwner,
    computes_in,
    inner_dtype,
    is_fusable,
    linear,
    packed_copies,
    packed_copies_serve,
    stacked_linear,
    takes_any_rows,
)


def _rate(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0


class BertSelfAttention(PackedModule):
    """The three projections and the attention; it holds their one packed weight [3H, H]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = size // config.num_attention_heads
        self.query = PackedLinear(size, size)
        self.key = PackedLinear(size, size)
        self.value = PackedLinear(size, size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(
        self, hidden: Tensor, plan: AttentionPlan, selection: Selection | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[T, H] -> [T, H], or [R, H] of the selected rows, which attend all of them."""
        parts = submodules(self)
        dropout_p = _rate(parts["dropout"])
        if selection is not None and plan.takes_queries(selection, dropout_p):
            return self._attend_selected(hidden, plan, selection, dropout_p), None
        projections = (parts["query"], parts["key"], parts["value"])
        projected = stacked_linear(self, projections, hidden, inner_dtype(self, hidden))
        query, key, value = map(self._heads, projected)
        output, weights = plan.attend(query, key, value, dropout_p)
        output = output.reshape(hidden.shape)
        return output if selection is None else selection.take(output), weights

    def _attend_selected(
        self, hidden: Tensor, plan: AttentionPlan, selection: Selection, dropout_p: float
    ) -> Tensor:
        """The packed weights of the three projections are held one by one: the stacked one would do too much."""
        parts = submodules(self)
        chosen, dtype = selection.take(hidden), inner_dtype(self, hidden)
        query = self._heads(linear(parts["query"], chosen, None, dtype))
        key, value = (
            self._heads(linear(parts[name], hidden, None, dtype)) for name in ("key", "value")
        )
        output, _ = plan.attend(query, key, value, dropout_p, selection.batch)
        return output.reshape(chosen.shape)

    def _heads(self, projected: Tensor) -> Tensor:
        """[rows, H] -> [rows, heads, D]"""
        return projected.view(-1, self.num_attention_heads, self.attention_head_size)


class _ResidualOutput(nn.Module):
    """LayerNorm(dropout(dense(x)) + residual)."""

    def __init__(self, input_size: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = PackedLinear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input: Tensor, residual: Tensor, plan: AttentionPlan) -> Tensor:
        parts = submodules(self)
        norm, dropout_p = parts["LayerNorm"], _rate(parts["dropout"])
        narrower = input.dtype != residual.dtype
        hidden = linear(parts["dense"], input, None, residual.dtype if narrower else None)
        affine = norm._parameters
        weight, bias = affine["weight"], affine["bias"]
        if dropout_p == 0.0:
            return ops.add_layer_norm(hidden, residual, weight, bias, norm.eps)
        sequence_ids, positions = plan.coordinates
        return ops.add_layer_norm(
            hidden,
            residual,
            weight,
            bias,
            norm.eps,
            dropout_p=dropout_p,
            sequence_ids=sequence_ids,
            positions=positions,
        )


class BertSelfOutput(_ResidualOutput):
    """What follows the attention."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config.hidden_size, config)


class BertOutput(_ResidualOutput):
    """The second half of the feed-forward block."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config.intermediate_size, config)


class BertAttention(nn.Module):
    """Self-attention and its output."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertSelfOutput(config)

    def forward(
        self, hidden: Tensor, plan: AttentionPlan, selection: Selection | None = None
    ) -> tuple[Tensor, Tensor | None]:
        parts = submodules(self)
        if selection is None:
            output, weights = parts["self"](hidden, plan)
            return parts["output"](output, hidden, plan), weights
        output, weights = parts["self"](hidden, plan, selection)
        rows = AttentionPlan.of_rows(selection)
        return parts["output"](output, selection.take(hidden), rows), weights


class BertIntermediate(nn.Module):
    """activation(dense(x)), in one pass where the activation has an epilogue."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = PackedLinear(config.hidden_size, config.intermediate_size)
        self.fused = FUSED_ACTIVATIONS.get(config.hidden_act)
        self.activation = PLAIN_ACTIVATIONS.get(config.hidden_act)

    def forward(self, hidden: Tensor) -> Tensor:
        dense = submodules(self)["dense"]
        dtype = inner_dtype(dense, hidden) if isinstance(dense, PackedModule) else None
        output = linear(dense, hidden, self.fused, dtype)
        return output if self.activation is None else self.activation(output)


class BertLayer(nn.Module):
    """One layer: attention, then feed-forward."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(
        self, hidden: Tensor, plan: AttentionPlan, selection: Selection | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[T, H] -> [T, H], and the attention weights where the plan asks for them.

        selection: rows that alone are computed, on keys and values of all: [R, H]
        """
        parts = submodules(self)
        if selection is None:
            attended, weights = parts["attention"](hidden, plan)
        else:
            attended, weights = parts["attention"](hidden, plan, selection)
            plan = AttentionPlan.of_rows(selection)
        return parts["output"](parts["intermediate"](attended), attended, plan), weights

    def fused(self, hidden: Tensor) -> FusedLayer | None:
        """The layer as a native call on states like `hidden`, or None where its parts have to be called."""
        own = submodules(self)
        attention, feed_forward, second = own["attention"], own["intermediate"], own["output"]
        attend, first = (submodules(attention)[name] for name in ("self", "output"))
        parts = (self, attention, attend, first, feed_forward, second)
        if not all(map(is_stock, parts, _PARTS)) or feed_forward.activation is not None:
            return None
        inputs, first_parts, second_parts = attend._modules, first._modules, second._modules
        stacked = (inputs["query"], inputs["key"], inputs["value"])
        single = (first_parts["dense"], feed_forward._modules["dense"], second_parts["dense"])
        dropouts = (inputs["dropout"], first_parts["dropout"], second_parts["dropout"])
        if any(map(_rate, dropouts)) or not all(map(is_fusable, (*stacked, *single))):
            return None
        norms = [
            (norm._parameters.get("weight"), norm._parameters.get("bias"), norm.eps)
            for norm in (first_parts["LayerNorm"], second_parts["LayerNorm"])
        ]
        return fuse_layer(
            hidden.shape[1],
            packed_copies(attend, stacked, single, hidden),
            [module._parameters.get("bias") for module in single],
            (norms[0], norms[1]),
            feed_forward.fused or "none",
            attend.num_attention_heads,
            attend.attention_head_size**-0.5,
            hidden.dtype,
        )


_PARTS = (
    BertLayer,
    BertAttention,
    BertSelfAttention,
    BertSelfOutput,
    BertIntermediate,
    BertOutput,
)


class BertEncoder(PackOwner):
    """The stack of layers; it holds them ready to run as one native call.

    gradient_checkpointing: a training step keeps the input of each layer alone and computes the layer again for its
    gradients (Chen et al., 2016)
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = bool(getattr(config, "gradient_checkpointing", False))
        self._stack: EncoderStack | None = None

    def drop_packed(self) -> None:
        self._stack = None

    def __getstate__(self) -> dict[str, Any]:
        """Serves pickling and deepcopy: native calls can do neither."""
        return {**self.__dict__, "_stack": None}

    def takes_any_rows(self) -> bool:
        """Whether the packed weights of a call that begins now serve every number of rows alike.

        The stack of an earlier call answers for this one: what could make it wrong costs time alone.
        """
        if self._stack is not None and not torch.is_grad_enabled():
            return True
        if not len(self.layer):
            return True
        attention: Any = self.layer[0].attention.self  # type: ignore[union-attr]
        parameter = next(attention.parameters())
        return bool(
            attention.pack
            and not attention.training
            and takes_any_rows(parameter, attention.precision)
        )

    def forward(
        self,
        hidden: Tensor,
        plan: AttentionPlan,
        output_hidden_states: bool = False,
        selection: Selection | None = None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """[T, H] -> [T, H]; the states before and after every layer, where asked for; the attention weights.

        selection: the rows [R, H] to return of the last layer. Nothing else of it is computed, unless states or weights
        are asked for.
        """
        dtype, attentions = hidden.dtype, []
        states = [hidden] if output_hidden_states else []
        layers: Any = list(submodules(self.layer).values())
        if layers and computes_in(layers[0].attention.self, "bfloat16", hidden):
            hidden = hidden.bfloat16()  # what the layers pass on to each other and add up
        everything = output_hidden_states or plan.output_attentions
        last = None if selection is None or everything else len(layers) - 1
        fused = self._fused(hidden, plan, layers[:last])
        if fused:
            run = EncoderRun(plan.batch.cu_seqlens, plan.batch.max_seqlen)
            for part in [[layer] for layer in fused] if output_hidden_states else [fused]:
                hidden = run.stack(part, hidden)
                if output_hidden_states:
                    states.append(hidden.to(dtype))
        for number, layer in enumerate(layers[len(fused) :], len(fused)):
            arguments = (hidden, plan, selection) if number == last else (hidden, plan)
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                hidden, weights = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                hidden, weights = layer(*arguments)
            if output_hidden_states:
                states.append(hidden.to(dtype))
            if weights is not None:
                attentions.append(weights.to(dtype))
        if selection is not None and (last is None or last < 0):
            hidden = selection.take(hidden)
        return hidden if hidden.dtype == dtype else hidden.to(dtype), states, attentions

    def _fused(
        self, hidden: Tensor, plan: AttentionPlan, layers: list[nn.Module]
    ) -> list[EncoderLayer]:
        """The first layers, or all, as native calls; nothing where one of them has to be called by its parts."""
        if torch.is_grad_enabled():
            self._stack = None
        if plan.output_attentions or plan.attn_mask is not None or not layers:
            return []
        first: Any = layers[0].attention.self  # type: ignore[union-attr]
        serves = encoder_layer_serves(hidden, first.num_attention_heads)
        if not (serves and packed_copies_serve(hidden)):
            return []
        stack = self._stack
        if stack is None or stack.dtype != hidden.dtype or not stack.snapshot.matches(layers):
            fused = (m.fused(hidden) if type(m) is BertLayer else None for m in layers)
            self._stack = stack = stack_layers(layers, fused, hidden.dtype)
        return [] if stack is None else stack.layers
