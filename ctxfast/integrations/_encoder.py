"""The forward of an accelerated encoder: unpadded once, before its embeddings, padded once, behind its last layer."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ctxfast.bert.selection import Selection
from ctxfast.integrations._embeddings import call_embeddings
from ctxfast.integrations._first_tokens import (
    first_column,
    first_tokens_suffice,
    wants_first_token_first,
)
from ctxfast.integrations._graphs import graphs_of
from ctxfast.integrations._inspection import Inspection, inspection_of
from ctxfast.integrations._plan import Plan, contiguous, layout, row_count
from ctxfast.integrations._stack import stack_of
from ctxfast.integrations._stock import global_hooks, untraceable
from ctxfast.integrations._swap import State, call_arguments, state_of, stock_forward
from ctxfast.nn.encoder_layer import EncoderRun

# Arguments under which the stock forward runs: caches, cross attention, sequences packed by the caller.
_STOCK_ARGUMENTS = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "past_key_values",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "head_mask",
    "debug_io",
)
_ATTENTIONS = (
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
    "ctxfast",
)
# So many rows of the last layer less to compute are worth calling it by its parts where it could be one native call.
_ROWS_WORTH_PARTS = 64


def encoder_forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces the forward of the model; the stock one runs where `refuses` says so."""
    if torch.compiler.is_compiling():
        return _outside_the_graph(model, *args, **kwargs)
    return _forward(model, *args, **kwargs)


def _forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    state = state_of(model)
    if state.options.quantization is not None:
        _require_inference(model)
    call = call_arguments(model, args, kwargs)
    reason = "the arguments do not fit" if call is None else refuses(model, state, call)
    state.last_reason = reason
    if reason is not None:
        return stock_forward(model, *args, **kwargs)
    return _Run(model, state, call).output()  # type: ignore[arg-type]


def _require_inference(model: Any) -> None:
    mode = "training mode" if model.training else "a call that records gradients"
    if model.training or torch.is_grad_enabled():
        raise RuntimeError(
            "accelerate: quantization='int8' serves inference only, under model.eval() and torch.inference_mode() or "
            f"torch.no_grad(), got {mode}; ctxfast.accelerate(model) without it trains"
        )
    if (device := model.device.type) != "cpu":
        raise RuntimeError(f"accelerate: quantization='int8' computes on a CPU, got {device}")


# What runs here decides by values, which a graph does not hold: the compiled graph ends before and goes on behind it.
_outside_the_graph = torch._disable_dynamo(_forward)  # type: ignore[attr-defined]


def refuses(model: Any, state: State, call: dict[str, Any]) -> str | None:
    """Why the stock forward runs as a whole, or None."""
    reason = untraceable()  # while one traces, sizes are no numbers to inspect
    if reason is not None:
        return reason
    found = inspection_of(model, state)
    if found.spine is not None:
        return found.spine
    if global_hooks():
        return "hooks are set on every module"
    for name in _STOCK_ARGUMENTS:
        if call.get(name) is not None:
            return f"{name} is given"
    config = model.config
    if _setting(config, "is_decoder"):
        return "the model is a decoder"
    if _wanted(model, call, "is_causal"):
        return "the attention is causal"
    attention = _setting(config, "_attn_implementation")
    if attention not in _ATTENTIONS:
        return f"the attention implementation is {attention!r}"
    ids, embeds, mask = (
        call.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask")
    )
    given = ids if embeds is None else embeds
    if (ids is None) == (embeds is None) or not isinstance(given, Tensor):
        return "not exactly one of input_ids and inputs_embeds is given"
    if given.is_meta:
        return "the input is on the meta device"
    if given.dim() != (2 if embeds is None else 3):
        return f"the input has {given.dim()} dimensions"
    if mask is not None and not (
        isinstance(mask, Tensor)
        and (mask.dim() == 4 or mask.shape == given.shape[:2])
        and mask.device == given.device
    ):
        return "the attention mask is neither [batch, sequence] nor 4-dimensional"
    if _wanted(model, call, "output_attentions") and not found.fused:
        return "attention weights of layers that run their own code"
    return None


def _wanted(model: Any, call: dict[str, Any], name: str) -> Any:
    """An output flag: the argument, else the configuration's."""
    value = call.get(name)
    return _setting(model.config, name) if value is None else value


def _setting(config: Any, name: str) -> Any:
    """config.name, False where there is none; past the look for aliases, in Python, which none of these names has."""
    try:
        return object.__getattribute__(config, name)
    except AttributeError:
        return getattr(config, name, False)


class _Run:
    """One forward."""

    def __init__(self, model: Any, state: State, call: dict[str, Any]) -> None:
        self.model, self.state, self.call = model, state, call
        self.found: Inspection = state.inspection
        self.attentions = bool(_wanted(model, call, "output_attentions"))
        self.selected = _wanted(model, call, "output_hidden_states")
        given = call.get("input_ids")
        given = call["inputs_embeds"] if given is None else given
        mask = call.get("attention_mask")
        four = mask is not None and mask.dim() == 4
        unpad = state.options.unpad
        batch = layout(None if four else mask, given.shape[:2], given.device, unpad)
        grid = batch.batch_size * batch.seq_len
        state.last_padding = 1.0 - batch.total / grid if grid else 0.0
        keys = None
        if mask is not None and not four and not unpad:
            keys = mask != 0
            keys = None if given.device.type == "cpu" and bool(keys.all()) else keys
        padded = four or keys is not None or self.attentions
        if self.found.family.relative_bias and not padded:
            padded = not contiguous(batch)
        self.plan = Plan(
            batch,
            self._row_count(batch.total),
            mask if four else None,
            keys,
            padded=padded,
            weights=self.attentions,
        )
        self.mask = mask
        self.selection: Selection | None = None

    def _row_count(self, total: int) -> int:
        """T: any number of rows will do for the packed weights that served an earlier call."""
        if total and self.state.stack is not None and not torch.is_grad_enabled():
            return total
        options = self.state.options
        return row_count(total, self.model, options.dtype, options.quantization)

    def output(self) -> Any:
        states, weights = self._states()
        plan, batch = self.plan, self.plan.batch
        if self.selection is not None:
            leading = last = first_column(self.selection, states[-1]).to(self.dtype)
        else:
            last = plan.pad(states[-1])
            last = last if last.dtype == self.dtype else last.to(self.dtype)
            leading = self._leading(last)
        hidden: list[Tensor | None] | None = None
        if self.selected:
            hidden = [*(plan.pad(state).to(self.dtype) for state in states[:-1]), last]
            if not isinstance(self.selected, bool):
                chosen = [self.selected] if isinstance(self.selected, int) else self.selected
                places = {i % len(hidden) for i in chosen if -len(hidden) <= i < len(hidden)}
                hidden = [x if i in places else None for i, x in enumerate(hidden)]
        pooled = self._pool(leading) if batch.total or batch.batch_size else None
        last = leading if wants_first_token_first() else last
        return self._wrap(last, pooled, hidden, weights)

    def _states(self) -> tuple[list[Tensor], list[Tensor]]:
        """The last state [T, H], after all others where they are asked for, and the attention weights.

        Where a selection is made of the last layer, the last state is [R, H].
        """
        found, plan, state = self.found, self.plan, self.state
        if isinstance(found.embeddings, str):
            module = self.model._modules["embeddings"]
            hidden = call_embeddings(module, found.family, self.call, plan)
        else:
            hidden = found.embeddings(found.family, self.call, plan)
        self.dtype = hidden.dtype
        if state.options.dtype not in (None, hidden.dtype):
            hidden = hidden.to(state.options.dtype)
        if found.projection is not None:
            hidden = state.weights.linear(found.projection, hidden)
        if found.family.relative_bias:
            plan = self.plan = self._with_bias(hidden)
        keep = bool(self.selected)
        graphs = None if keep else graphs_of(state, found, hidden, plan)
        if graphs is not None:
            return [graphs.run(hidden, plan, state.weights)], []
        states, attentions = [hidden], []
        fused = stack_of(state, found, hidden, plan)
        if self._needs_first_tokens(bool(fused)):
            self.selection = Selection.first_tokens(plan.batch)
            fused = fused[:-1]
        if fused:
            native = EncoderRun(plan.batch.cu_seqlens, plan.batch.max_seqlen)
            for part in [[layer] for layer in fused] if keep else [fused]:
                hidden = native.stack(part, hidden)
                states = [*states, hidden] if keep else [hidden]
        for number, (module, layer) in enumerate(found.layers[len(fused) :], len(fused) + 1):
            if isinstance(layer, str):
                hidden = self._own_code(module, hidden)
                weights = None
            else:
                selection = self.selection if number == len(found.layers) else None
                run: Any = functools.partial(
                    layer, plan=plan, weights=state.weights, selection=selection
                )
                if module.training and module.__dict__.get("gradient_checkpointing", False):
                    checkpoint: Any = module._gradient_checkpointing_func
                    run = functools.partial(checkpoint, run)
                hidden, weights = run(hidden)
            if keep:
                states.append(hidden)
            else:
                states[0] = hidden
            if weights is not None:
                attentions.append(weights.to(self.dtype))
        return states, attentions

    def _needs_first_tokens(self, fused: bool) -> bool:
        """Whether the first tokens' rows of the last layer are all that is needed of it.

        fused: whether it can be part of a native call
        """
        plan, layers = self.plan, self.found.layers
        if not layers or isinstance(layers[-1][1], str):
            return False
        least = _ROWS_WORTH_PARTS if fused else 1
        return (
            plan.batch.total - plan.batch.batch_size >= least
            and not (self.selected or plan.padded)
            and first_tokens_suffice(self.model)
        )

    def _with_bias(self, hidden: Tensor) -> Plan:
        """The plan with MPNet's bias, a function of distances alone, [1, heads, L, L]."""
        plan, encoder = self.plan, self.model._modules["encoder"]
        length = plan.batch.seq_len if plan.padded else plan.batch.max_seqlen
        places = torch.arange(length, device=hidden.device)
        buckets = encoder.relative_position_bucket(places[None, :] - places[:, None])
        bias = encoder.relative_attention_bias(buckets).permute(2, 0, 1).unsqueeze(0)
        return Plan(
            plan.batch,
            plan.rows,
            plan.attn_mask,
            plan.key_mask,
            bias.to(hidden.dtype),
            plan.padded,
            plan.weights,
        )

    def _own_code(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The layer itself, on the padded grid and the mask that transformers would make."""
        plan = self.plan
        grid = plan.pad(hidden).to(self.dtype)
        extra = {}
        if self.found.family.name not in ("mpnet", "distilbert"):
            extra = {"position_ids": self.call.get("position_ids")}
        arguments: list[Any] = [grid, self._own_mask(grid)]
        if self.found.family.relative_bias:
            arguments.append(self.model._modules["encoder"].compute_position_bias(grid))
        output = layer(*arguments, **extra)
        output = output[0] if isinstance(output, tuple) else output
        return plan.pack(output).to(hidden.dtype)

    @functools.cached_property
    def _mask_function(self) -> Any:
        from transformers.masking_utils import create_bidirectional_mask

        return create_bidirectional_mask

    def _own_mask(self, grid: Tensor) -> Any:
        function = self._mask_function
        names = inspect.signature(function).parameters
        name = "inputs_embeds" if "inputs_embeds" in names else "input_embeds"
        return function(config=self.model.config, attention_mask=self.mask, **{name: grid.detach()})

    def _leading(self, last: Tensor) -> Tensor:
        """last [B, S, H], with each sequence's first token in column 0."""
        batch = self.plan.batch
        if batch.dense or batch.total == 0:
            return last
        if self.mask is not None and last.device.type == "cpu" and bool(self.mask[:, 0].all()):
            return last
        starts = batch.cu_seqlens[:-1]
        first = batch.indices.index_select(0, starts.clamp(max=batch.total - 1))
        first = first - torch.arange(batch.batch_size, device=first.device) * batch.seq_len
        empty = starts == batch.cu_seqlens[1:]
        first = first.masked_fill(empty, 0)
        if first.device.type == "cpu" and not bool(first.any()):
            return last
        rows = last.gather(1, first[:, None, None].expand(-1, 1, last.shape[2]))
        return torch.cat([rows, last[:, 1:]], dim=1)

    def _pool(self, leading: Tensor) -> Tensor | None:
        pooler = self.model._modules.get("pooler")
        if pooler is None:
            return None
        if self.found.family.name == "albert":
            return self.model.pooler_activation(pooler(leading[:, 0]))
        return pooler(leading)

    def _wrap(
        self, last: Tensor, pooled: Tensor | None, hidden: Any, attentions: list[Tensor]
    ) -> Any:
        model, family = self.model, self.found.family
        wanted = _wanted(model, self.call, "return_dict")
        weights = tuple(attentions) if self.attentions else None
        states = None if hidden is None else tuple(hidden)
        if family.name == "mpnet" and not wanted:  # the one that keeps an absent pooler's place
            return last, pooled, *(x for x in (states, weights) if x is not None)
        cls = getattr(sys.modules["transformers.modeling_outputs"], family.output)
        fields = {"last_hidden_state": last, "hidden_states": states, "attentions": weights}
        if "Pooling" in family.output:
            fields["pooler_output"] = pooled
        # Since it captures outputs in a module of its own, transformers returns what it captured none of.
        capturing = "transformers.utils.output_capturing" in sys.modules
        if "CrossAttentions" in family.output and self.attentions and capturing:
            fields["cross_attentions"] = ()
        output = cls(**fields)
        return output if wanted else output.to_tuple()
