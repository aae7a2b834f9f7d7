"""All layers of an accelerated encoder as one native call, for inference."""

from __future__ import annotations

import torch
from torch import Tensor

from ctxfast.integrations._inspection import Inspection
from ctxfast.integrations._plan import Plan
from ctxfast.integrations._swap import State
from ctxfast.nn.encoder_layer import EncoderLayer, encoder_layer_serves, stack_layers
from ctxfast.nn.packed_linear import packed_copies_serve


def stack_of(state: State, found: Inspection, hidden: Tensor, plan: Plan) -> list[EncoderLayer]:
    """All layers as native calls, or nothing where one of them has to be called by its parts.

    found: the inspection of the model, known to hold: its certificate looks at everything but what parameters hold
    """
    if torch.is_grad_enabled():
        state.stack = None
    if plan.padded or plan.bias is not None or not found.fused or not found.layers:
        return []
    heads = found.layers[0][1].head_count  # type: ignore[union-attr]
    if not (encoder_layer_serves(hidden, heads) and packed_copies_serve(hidden)):
        return []
    stack = state.stack
    if stack is None or stack.dtype != hidden.dtype or not stack.snapshot.parameters_hold():
        fused = (layer.fused(hidden, state.weights) for _, layer in found.layers)  # type: ignore[union-attr]
        modules = [module for module, _ in found.layers]
        state.stack = stack = stack_layers(modules, fused, hidden.dtype)
    return [] if stack is None else stack.layers
