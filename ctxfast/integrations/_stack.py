"""All layers of an accelerated encoder as one native call, for inference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ctxfast.integrations._inspection import Inspection
from ctxfast.integrations._plan import Plan
from ctxfast.integrations._swap import State
from ctxfast.nn.certificate import Snapshot
from ctxfast.nn.encoder_layer import EncoderLayer, encoder_layer_serves
from ctxfast.nn.packed_copy import PackedCopy
from ctxfast.nn.packed_linear import packed_copies_serve


class Stack(NamedTuple):
    """Layers as native calls on states of one dtype, and what they were when these were made.

    found: the inspection that named them, whose certificate looks at everything but contents
    """

    found: Inspection
    dtype: torch.dtype
    layers: list[EncoderLayer]
    snapshot: Snapshot


def stack_of(state: State, found: Inspection, hidden: Tensor, plan: Plan) -> list[EncoderLayer]:
    """All layers as native calls, or nothing where one of them has to be called by its parts.

    found: the inspection of the model, of which it is known that it still holds
    """
    stack = state.stack
    if torch.is_grad_enabled() or (stack is not None and stack.found is not found):
        state.stack = stack = None
    if plan.padded or plan.bias is not None or not found.fused or not found.layers:
        return []
    heads = found.layers[0][1].head_count  # type: ignore[union-attr]
    if not (encoder_layer_serves(hidden, heads) and packed_copies_serve(hidden)):
        return []
    if stack is None or stack.dtype != hidden.dtype or not stack.snapshot.contents_hold():
        state.stack = stack = _make(state, found, hidden)
    return [] if stack is None else stack.layers


def _make(state: State, found: Inspection, hidden: Tensor) -> Stack | None:
    layers: list[EncoderLayer] = []
    copies: list[PackedCopy] = []
    for _, layer in found.layers:
        fused = layer.fused(hidden, state.weights)  # type: ignore[union-attr]
        if fused is None:
            return None
        layers.append(fused[0])
        copies += fused[1]
    if len({layer.kind for layer in layers}) > 1:
        return None
    fingerprints = [fingerprint for copy in copies for fingerprint in copy.fingerprints]
    snapshot = Snapshot([module for module, _ in found.layers], fingerprints)
    return Stack(found, hidden.dtype, layers, snapshot)
