"""Linear layers on 8-bit integers, for inference on a CPU with VNNI: a quarter of the time, at a stated error."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ctxfast import reference
from ctxfast.ops import _native, _native_linear
from ctxfast.ops._dispatch import Implementation, Operator, never
from ctxfast.ops._library import define
from ctxfast.ops._validate import require_device, require_floating, require_tensor, shape_of
from ctxfast.reference.linear import ACTIVATIONS


@functools.cache
def int8_unavailable_reason() -> str | None:
    """Why int8 products are not fast, or not exact, on this machine; None where they are both.

    Without VNNI the library multiplies pairs into 16 bits, which saturate.
    """
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    if supported is None or not supported():
        return "this processor has no VNNI instructions"
    if not hasattr(torch, "_int_mm"):
        return f"torch {torch.__version__} has no _int_mm"
    return _native.unavailable_reason()


def _native_forward(input, weight, weight_scales, bias, activation):
    rows, scales = _native_linear.quantize_rows(input.reshape(-1, input.shape[-1]))
    sums = torch._int_mm(rows, weight.t())
    bias = None if bias is None else bias.float().contiguous()
    output = _native_linear.dequantize_rows(
        sums, scales, weight_scales.contiguous(), bias, activation, input.dtype
    )
    return output.view(*input.shape[:-1], weight.shape[0])


def _native_refuses(input, weight, weight_scales, bias, activation):
    if 0 in input.shape or 0 in weight.shape:
        return "empty input"
    if input.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {input.dtype} is not float32 or bfloat16"
    return _native._refusal(input, weight, weight_scales, bias) or int8_unavailable_reason()


def _reference(input, weight, weight_scales, bias, activation):
    return reference.linear_int8(input, weight, weight_scales, bias, activation=activation)


def _fake(input, weight, weight_scales, bias, activation):
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


linear_int8_operator = Operator(
    "linear_int8",
    Implementation("native", _native_forward, _native_refuses),
    Implementation("reference", _reference, never),
)
_linear_int8 = define(
    "(Tensor input, Tensor weight, Tensor weight_scales, Tensor? bias, str activation) -> Tensor",
    linear_int8_operator,
    _fake,
)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [N, K] and float32 scales [N] of a floating weight [N, K], one scale for each output channel."""
    require_floating("quantize_weight", "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"quantize_weight: weight must be [N, K], got {shape_of(weight)}")
    if weight.numel() == 0:
        return weight.to(torch.int8), weight.new_zeros(weight.shape[0], dtype=torch.float32)
    return reference.quantize_rows(weight.detach())


def linear_int8(
    input: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """activation(input @ (weight * weight_scales)^T + bias) with products of 8-bit integers; inference only.

    input:  [..., K], floating; each row is quantised by its own largest value
    weight: int8 [N, K] and weight_scales float32 [N], from `quantize_weight`;  bias: floating [N]
    activation: None, "gelu" (exact, with erf), "gelu_tanh" or "tanh", in the pass that scales the sums

    Returns [..., N] in the dtype of input. Sums are exact int32 for K up to 2^17. A row with a NaN gives NaN.
    Raises TypeError for a wrong dtype and ValueError for a wrong shape, device or name.
    """
    op = "linear_int8"
    require_floating(op, "input", input)
    require_tensor(op, "weight", weight)
    if weight.dtype != torch.int8:
        raise TypeError(f"{op}: weight must be int8, got {weight.dtype}")
    if activation is not None and activation not in ACTIVATIONS:
        names = ", ".join(repr(name) for name in ACTIVATIONS if name != "none")
        raise ValueError(f"{op}: activation must be None or one of {names}, got {activation!r}")
    if weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: input must be [..., {weight.shape[-1]}] for a weight of {shape_of(weight)}, got {shape_of(input)}"
        )
    for name, vector in (("weight_scales", weight_scales), ("bias", bias)):
        if vector is None:
            continue
        require_floating(op, name, vector)
        require_device(op, name, vector, input.device)
        if vector.shape != weight.shape[:1]:
            raise ValueError(f"{op}: {name} must be [{weight.shape[0]}], got {shape_of(vector)}")
    require_device(op, "weight", weight, input.device)
    with torch.no_grad():
        return _linear_int8(input, weight, weight_scales.float(), bias, activation or "none")
