"""Linear layers on 8-bit integers, for inference on a CPU with VNNI: a quarter of the time, at a stated error."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ctxfast import reference
from ctxfast.ops import _native, _native_linear
from ctxfast.ops._dispatch import Implementation, Operator, never
from ctxfast.ops._library import define
from ctxfast.ops._native_pages import streamed
from ctxfast.ops._validate import require_device, require_floating, shape_of
from ctxfast.reference.linear import ACTIVATIONS

_DTYPES = (torch.float32, torch.bfloat16)
_MAX_DEPTH = (2**31 - 1) // (255 * 127)  # sums stay in 32 bits


class QuantizedWeight(NamedTuple):
    """A weight [N, K] of 8-bit integers.

    panels: int8 [N / 32, K / 4, 32, 4], both rounded up: the order in which the kernel reads it
    scales: float32 [N];  sums: float32 [N], of the rounded weight along K;  in_features: K
    """

    panels: Tensor
    scales: Tensor
    sums: Tensor
    in_features: int

    @property
    def nbytes(self) -> int:
        tensors = (self.panels, self.scales, self.sums)
        return sum(x.numel() * x.element_size() for x in tensors)


def int8_unavailable_reason() -> str | None:
    """Why products of 8-bit integers are not fast on this machine, or None."""
    reason = _native.unavailable_reason()
    if reason is None and _native.isa() not in ("avx512_vnni", "avx512_bf16", "amx"):
        reason = (
            f"the instruction set in use, {_native.isa()}, has no 8-bit products (AVX-512 VNNI)"
        )
    return reason


def _native_refuses(input, panels, scales, sums, bias, activation, dtype):
    if 0 in input.shape or scales.shape[0] == 0:
        return "empty input"
    if input.dtype not in _DTYPES or dtype not in _DTYPES:
        return f"{input.dtype} to {dtype}: only float32 and bfloat16"
    if input.shape[-1] > _MAX_DEPTH:
        return f"{input.shape[-1]} input features, at most {_MAX_DEPTH} fit 32-bit sums"
    return _native._refusal(input, panels, scales, sums, bias)


def _reference(input, panels, scales, sums, bias, activation, dtype):
    if 0 in input.shape or scales.shape[0] == 0:
        zeros = input.new_zeros((*input.shape[:-1], scales.shape[0]), dtype=dtype)
        return ACTIVATIONS[activation](zeros if bias is None else zeros + bias.to(dtype))
    return reference.linear_int8(
        input, panels, scales, sums, bias, activation=activation, dtype=dtype
    )


def _fake(input, panels, scales, sums, bias, activation, dtype):
    return input.new_empty((*input.shape[:-1], scales.shape[0]), dtype=dtype)


linear_int8_operator = Operator(
    "linear_int8",
    Implementation("native", _native_linear.linear_int8, _native_refuses),
    Implementation("reference", _reference, never),
)
_linear_int8 = define(
    "(Tensor input, Tensor panels, Tensor scales, Tensor sums, Tensor? bias, str activation, ScalarType dtype) "
    "-> Tensor",
    linear_int8_operator,
    _fake,
)


def quantize_weight(weight: Tensor) -> QuantizedWeight:
    """A floating weight [N, K] rounded to 8 bits, with one scale for each output channel; K > 0.

    Raises TypeError for a weight that is not floating and ValueError for another shape.
    """
    require_floating("quantize_weight", "weight", weight)
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"quantize_weight: weight must be [N, K], K > 0, got {shape_of(weight)}")
    q, scales = reference.quantize_weight(weight.detach())
    sums = q.sum(1, dtype=torch.int64).float() * scales
    panels = streamed(reference.pack_weight(q))
    return QuantizedWeight(panels, scales, sums, weight.shape[1])


def linear_int8(
    input: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """activation(input @ weight^T + bias) with products of 8-bit integers and exact sums; inference only.

    input:  [..., K], floating; each row is rounded to 255 steps between its least and its largest value
    weight: from `quantize_weight`, [N, K];  bias: floating [N]
    activation: None, "gelu" (exact, with erf), "gelu_tanh" or "tanh", in the pass that scales the sums
    dtype:  of the result, by default that of input

    Returns [..., N]; NaN in a row that is not finite. The method is that of Dettmers et al., "LLM.int8()" (2022), over
    the whole range of a row. Raises TypeError for a wrong type and ValueError for a wrong shape, device or name.
    """
    op = "linear_int8"
    require_floating(op, "input", input)
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"{op}: weight must come from quantize_weight, got {type(weight).__name__}")
    if activation is not None and activation not in ACTIVATIONS:
        names = ", ".join(repr(name) for name in ACTIVATIONS if name != "none")
        raise ValueError(f"{op}: activation must be None or one of {names}, got {activation!r}")
    dtype = input.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"{op}: dtype must be floating point, got {dtype}")
    panels, scales, sums, depth = weight
    if input.dim() == 0 or input.shape[-1] != depth:
        raise ValueError(
            f"{op}: input must be [..., {depth}] for a weight of {depth} input features, got {shape_of(input)}"
        )
    require_device(op, "weight", panels, input.device)
    if bias is not None:
        require_floating(op, "bias", bias)
        require_device(op, "bias", bias, input.device)
        if bias.shape != scales.shape:
            raise ValueError(f"{op}: bias must be [{scales.shape[0]}], got {shape_of(bias)}")
    with torch.no_grad():
        return _linear_int8(input, panels, scales, sums, bias, activation or "none", dtype)
