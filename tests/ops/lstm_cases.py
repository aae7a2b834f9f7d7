"""Arguments of ops.lstm for the tests, and a comparison with float64 that covers every gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctxfast import ops, reference
from tests.ops.implementations import only
from tests.oracle import CAPS, assert_matches

NAMES = ("input", "weight_ih", "weight_hh", "bias", "weight_hr", "h0", "c0", "residual")


def tensors(
    batch: int,
    steps: int,
    inputs: int,
    hidden: int,
    features: int,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Normal values, weights of a scale at which the gates leave their linear range; features 0: no projection."""
    projected, features = features > 0, features or hidden
    shapes = {
        "input": (batch, steps, inputs),
        "weight_ih": (4 * hidden, inputs),
        "weight_hh": (4 * hidden, features),
        "bias": (4 * hidden,),
        "weight_hr": (features, hidden),
        "h0": (batch, features),
        "c0": (batch, hidden),
        "residual": (batch, steps, features),
    }
    if not projected:
        del shapes["weight_hr"]
    made = {}
    for name, shape in shapes.items():
        fan = shape[-1] ** -0.5 if name.startswith("weight") else 1.0
        made[name] = (torch.randn(shape) * fan * scale).to(dtype)
    return made


def call(function: Any, given: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    rest = dict(given)
    state = rest.pop("h0"), rest.pop("c0")
    return function(**rest, initial_state=state, **options)


def results_and_gradients(
    function: Any, given: dict[str, Tensor], grads: list[Tensor], **options: Any
) -> dict[str, Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    results = call(function, leaves, **options)
    loss = sum((r * g.to(r.dtype)).sum() for r, g in zip(results, grads, strict=True))
    found = torch.autograd.grad(loss, list(leaves.values()))
    named = dict(zip(("output", "h", "c"), results, strict=True))
    named |= {f"d{name}": g for name, g in zip(leaves, found, strict=True)}
    return {name: x.detach() for name, x in named.items()}


def assert_like_float64(
    given: dict[str, Tensor], backend: str = "native", cap: float | None = None, **options: Any
) -> None:
    """Results and all gradients of ops.lstm on one backend, by the error that the eager reference makes."""
    shapes = [x.shape for x in call(reference.lstm, given, **options)]
    grads = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    with only(backend):
        found = results_and_gradients(ops.lstm, given, grads, **options)
    eager = results_and_gradients(reference.lstm, given, grads, **options)
    double = {name: x.double() for name, x in given.items()}
    exact = results_and_gradients(reference.lstm, double, grads, **options)
    for name, value in found.items():
        if value.dtype == torch.float64:  # the eager path is the exact one
            bound = CAPS[value.dtype] * exact[name].abs().max().item() if value.numel() else 0.0
            torch.testing.assert_close(value, exact[name], rtol=0.0, atol=bound)
            continue
        assert_matches(value, eager[name], exact[name], name=name, cap=cap)
