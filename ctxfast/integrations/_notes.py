"""What `ctxfast.explain` says of an accelerated encoder."""

from __future__ import annotations

from typing import Any

from ctxfast.integrations._inspection import inspection_of
from ctxfast.integrations._stock import global_hooks, own_forward
from ctxfast.integrations._swap import state_of


def encoder_notes(model: Any, name: str) -> list[str]:
    """One line for the encoder, and one for everything in it that runs its own code, with the reason."""
    state = state_of(model)
    found, options = inspection_of(model, state), state.options
    label = f"{name or 'model'} ({type(model).__name__})"
    if own_forward(model) is not None and not hasattr(model, "_hf_hook"):
        return [f"{label}: runs its own code: forward is an attribute of the instance"]
    if found.spine is not None:
        return [f"{label}: runs its own code: {found.spine}"]
    if global_hooks():
        return [f"{label}: runs its own code: hooks are set on every module"]
    fused = sum(not isinstance(layer, str) for _, layer in found.layers)
    settings = [] if options.dtype is None else [f"computes in {options.dtype}"]
    settings += [] if options.quantization is None else ["products of 8-bit integers"]
    settings += [] if options.unpad else ["padded rows are computed"]
    settings += [f"{len(state.graphs or ())} CUDA graphs"] if options.cuda_graphs else []
    lines = [f"{label}: {fused} of {len(found.layers)} layers fused{_joined(settings)}"]
    if state.last_reason is not None:
        lines.append(f"{label}: the last call ran transformers' code: {state.last_reason}")
    if isinstance(found.embeddings, str):
        lines.append(f"{label} embeddings: run their own code: {found.embeddings}")
    for index, (_, layer) in enumerate(found.layers):
        if isinstance(layer, str):
            lines.append(f"{label} layer {index}: runs its own code: {layer}")
    return lines


def _joined(settings: list[str]) -> str:
    return "".join(f"; {setting}" for setting in settings)
