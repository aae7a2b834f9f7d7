"""ELMo's scalar mix of layers (Peters et al., 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ctxfast import reference
from ctxfast.ops import _native_char_cnn, _triton
from ctxfast.ops._dispatch import Implementation, Operator, never
from ctxfast.ops._library import define, gradients_through_reference
from ctxfast.ops._validate import require_floating, shape_of
from ctxfast.reference.scalar_mix import layer_statistics


def _fake(layers, coefficients):
    return layers.new_empty(layers.shape[1:])


def _fake_backward(grad, layers, coefficients):
    return layers.new_empty(layers.shape), coefficients.new_empty(coefficients.shape)


weighted_sum_operator = Operator(
    "scalar_mix",
    Implementation("native", _native_char_cnn.weighted_sum, _native_char_cnn.weighted_sum_refuses),
    Implementation(
        "triton",
        lambda layers, coefficients: _triton.weighted_sum(layers, coefficients),
        lambda layers, coefficients: _triton.elementwise_refuses(layers),
    ),
    Implementation("reference", reference.weighted_sum, never),
)
weighted_sum_backward_operator = Operator(
    "scalar_mix_backward",
    Implementation("reference", reference.weighted_sum_backward, never),
)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    """Serves the forward and the backward operator."""
    ctx.save_for_backward(*inputs)


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return gradients_through_reference(reference.weighted_sum_backward, ctx.saved_tensors, grads)


_weighted_sum_backward = define(
    "(Tensor grad_output, Tensor layers, Tensor coefficients) -> (Tensor, Tensor)",
    weighted_sum_backward_operator,
    _fake_backward,
    setup_context=_setup,
    backward=_double_backward,
)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return _weighted_sum_backward(grad, *ctx.saved_tensors)


_weighted_sum = define(
    "(Tensor layers, Tensor coefficients) -> Tensor",
    weighted_sum_operator,
    _fake,
    setup_context=_setup,
    backward=_backward,
)


def scalar_mix(
    layers: Tensor | Sequence[Tensor],
    weights: Tensor,
    gamma: Tensor,
    mask: Tensor | None = None,
    *,
    eps: float = 1e-13,
) -> Tensor:
    """gamma * sum over layers j of softmax(weights)_j * layers_j.

    layers: [L, ..., D], floating, or a sequence of L tensors, which are copied together;  weights: [L];  gamma: one
            number, of any shape
    mask:   bool [...], True at tokens: each layer is first normalised to mean 0 and variance 1 over the tokens and
            features of the whole batch, with eps under the root. What stands at other positions has no influence

    Returns [..., D]. Raises TypeError for a wrong dtype and ValueError for a wrong shape or device.
    """
    op = "scalar_mix"
    if not isinstance(layers, Tensor):
        layers = torch.stack(list(layers))
    require_floating(op, "layers", layers)
    require_floating(op, "weights", weights)
    require_floating(op, "gamma", gamma)
    if layers.dim() < 2 or weights.shape != layers.shape[:1]:
        raise ValueError(
            f"{op}: weights must be [{layers.shape[0] if layers.dim() else 0}] for layers of "
            f"{shape_of(layers)}, got {shape_of(weights)}"
        )
    if gamma.numel() != 1:
        raise ValueError(f"{op}: gamma must be one number, got {shape_of(gamma)}")
    if weights.device != layers.device:
        raise ValueError(f"{op}: weights must be on {layers.device}, got {weights.device}")
    wide = torch.float64 if layers.dtype == torch.float64 else torch.float32
    scales = gamma.reshape(()).to(wide) * torch.softmax(weights.to(wide), 0)
    if mask is None:
        return _weighted_sum(layers, scales)
    if mask.dtype != torch.bool or mask.shape != layers.shape[1:-1]:
        raise ValueError(
            f"{op}: mask must be bool {tuple(layers.shape[1:-1])}, got {mask.dtype} of {shape_of(mask)}"
        )
    mean, rstd = layer_statistics(layers, mask, eps)
    scales = scales * rstd
    # The means in float32 beside the sum in 16-bit types: rounding the sum alone is what the result needs.
    mixed = _weighted_sum(layers.to(wide), scales)
    return (mixed - (scales * mean).sum()).to(layers.dtype)
