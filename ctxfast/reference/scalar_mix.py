"""ELMo's scalar mix (Peters et al., 2018): gamma * sum over layers j of softmax(weights)_j * layer_j."""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def weighted_sum(layers: Tensor, coefficients: Tensor) -> Tensor:
    """layers [L, ...] and coefficients [L] -> [...]; sums in float32 in 16-bit types."""
    wide = _wide(layers)
    shape = (-1, *(1,) * (layers.dim() - 1))
    return (wide * coefficients.to(wide.dtype).view(shape)).sum(0).to(layers.dtype)


def weighted_sum_backward(
    grad_output: Tensor, layers: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of layers and coefficients."""
    wide, grad = _wide(layers), _wide(grad_output)
    scales = coefficients.to(wide.dtype)
    dlayers = grad.unsqueeze(0) * scales.view(-1, *(1,) * grad.dim())
    dcoefficients = (wide * grad).flatten(1).sum(1)
    return dlayers.to(layers.dtype), dcoefficients.to(coefficients.dtype)


def layer_statistics(layers: Tensor, mask: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(var + eps) of each layer over the positions of mask and all features: [L] each.

    layers [L, ..., D], mask [...]. Without a position both are 0 and 1 / sqrt(eps), which meet no valid value.
    """
    wide = _wide(layers)
    valid = mask.unsqueeze(-1)
    count = (mask.sum() * layers.shape[-1]).clamp(min=1)
    zero = wide.new_zeros(())
    mean = torch.where(valid, wide, zero).flatten(1).sum(1) / count
    centred = torch.where(valid, wide - mean.view(-1, *(1,) * (wide.dim() - 1)), zero)
    return mean, (centred.square().flatten(1).sum(1) / count + eps).rsqrt()


def scalar_mix(
    layers: Tensor,
    weights: Tensor,
    gamma: Tensor,
    mask: Tensor | None = None,
    eps: float = 1e-13,
) -> Tensor:
    """layers [L, ..., D] -> [..., D]; arguments as `ctxfast.ops.scalar_mix`."""
    scales = gamma * torch.softmax(_wide(weights), 0)
    if mask is None:
        return weighted_sum(layers, scales)
    mean, rstd = layer_statistics(layers, mask, eps)
    shape = (-1, *(1,) * (layers.dim() - 1))
    normalised = (_wide(layers) - mean.view(shape)) * rstd.view(shape)
    return weighted_sum(normalised, scales).to(layers.dtype)
