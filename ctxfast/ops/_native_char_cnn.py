"""ELMo's character layers and its mix across the boundary to csrc; the rules of `_native.py` hold here too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ctxfast.ops._native import (
    _DTYPES,
    _INDEX_OUT_OF_RANGE,
    _aligned,
    _check,
    _module,
    _refusal,
)


def _plain(x: Tensor) -> Tensor:
    return _aligned(x.contiguous())


def char_cnn_refuses(
    ids: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor, widths: Sequence[int]
) -> str | None:
    reason = _refusal(ids, embedding, weight, bias)
    if reason is not None:
        return reason
    if embedding.dtype not in _DTYPES:
        return f"dtype {embedding.dtype}"
    if len(widths) > _module().max_filters:
        return f"{len(widths)} widths are above {_module().max_filters}"
    return None


def char_cnn_backward_refuses(
    ids: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor, widths: Sequence[int]
) -> str | None:
    reason = char_cnn_refuses(ids, embedding, weight, bias, widths)
    if reason is None and embedding.dtype == torch.bfloat16:
        reason = "dtype torch.bfloat16"
    return reason


def _char_cnn_arguments(
    ids: Tensor,
    embedding: Tensor,
    weight: Tensor,
    bias: Tensor,
    widths: Sequence[int],
    counts: Sequence[int],
    activation: str,
) -> tuple[object, ...]:
    """The leading arguments of both functions of csrc; the tensors must stay alive through the call."""
    sizes = (ids.shape[:-1].numel(), ids.shape[-1], *embedding.shape)
    return (
        _DTYPES[embedding.dtype],
        ids.dtype == torch.int64,
        ids.data_ptr(),
        embedding.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        sizes,
        tuple(widths),
        tuple(counts),
        activation == "relu",
        torch.get_num_threads(),
    )


def _check_ids(status: tuple[int, int, int] | None, embedding: Tensor) -> None:
    if status is not None and status[0] == _INDEX_OUT_OF_RANGE:
        raise ValueError(f"char_cnn: ids must be in [0, {embedding.shape[0]}), got {status[2]}")
    _check("char_cnn", status)


def char_cnn(
    ids: Tensor,
    embedding: Tensor,
    weight: Tensor,
    bias: Tensor,
    widths: Sequence[int],
    counts: Sequence[int],
    activation: str,
) -> Tensor:
    """ids [..., M] -> [..., N]; weight: one filter after another, each [width, C]."""
    ids, embedding, weight, bias = map(_plain, (ids, embedding, weight, bias))
    output = torch.empty((*ids.shape[:-1], bias.shape[0]), dtype=embedding.dtype)
    if output.numel() == 0:
        return output
    arguments = _char_cnn_arguments(ids, embedding, weight, bias, widths, counts, activation)
    _check_ids(_module().char_cnn(*arguments, output.data_ptr()), embedding)
    return output


def char_cnn_backward(
    grad_output: Tensor,
    ids: Tensor,
    embedding: Tensor,
    weight: Tensor,
    bias: Tensor,
    widths: Sequence[int],
    counts: Sequence[int],
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of embedding, weight and bias."""
    grad_output, ids, embedding, weight, bias = map(
        _plain, (grad_output, ids, embedding, weight, bias)
    )
    grads = tuple(torch.zeros(x.shape, dtype=x.dtype) for x in (embedding, weight, bias))
    if grad_output.numel() == 0:
        return grads  # type: ignore[return-value]
    arguments = _char_cnn_arguments(ids, embedding, weight, bias, widths, counts, activation)
    addresses = [x.data_ptr() for x in (grad_output, *grads)]
    _check_ids(_module().char_cnn_backward(*arguments, *addresses), embedding)
    return grads  # type: ignore[return-value]


def highway_gate_refuses(projected: Tensor, input: Tensor) -> str | None:
    reason = _refusal(projected, input)
    if reason is None and input.dtype not in _DTYPES:
        reason = f"dtype {input.dtype}"
    return reason


def highway_gate_backward_refuses(
    grad_output: Tensor, projected: Tensor, input: Tensor
) -> str | None:
    reason = _refusal(grad_output) or highway_gate_refuses(projected, input)
    if reason is None and input.dtype == torch.bfloat16:
        reason = "dtype torch.bfloat16"
    return reason


def highway_gate(projected: Tensor, input: Tensor) -> Tensor:
    """projected [..., 2N], input [..., N] -> [..., N]."""
    projected, input = _plain(projected), _plain(input)
    output = torch.empty(input.shape, dtype=input.dtype)
    if output.numel() == 0:
        return output
    columns = input.shape[-1]
    status = _module().highway_gate(
        _DTYPES[input.dtype],
        projected.data_ptr(),
        input.data_ptr(),
        output.data_ptr(),
        input.numel() // columns,
        columns,
        torch.get_num_threads(),
    )
    _check("highway_gate", status)
    return output


def highway_gate_backward(
    grad_output: Tensor, projected: Tensor, input: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of projected and input."""
    grad_output, projected, input = map(_plain, (grad_output, projected, input))
    dprojected, dinput = (torch.empty(x.shape, dtype=x.dtype) for x in (projected, input))
    if input.numel() == 0:
        return dprojected, dinput
    columns = input.shape[-1]
    status = _module().highway_gate_backward(
        _DTYPES[input.dtype],
        projected.data_ptr(),
        input.data_ptr(),
        grad_output.data_ptr(),
        dprojected.data_ptr(),
        dinput.data_ptr(),
        input.numel() // columns,
        columns,
        torch.get_num_threads(),
    )
    _check("highway_gate", status)
    return dprojected, dinput


def weighted_sum_refuses(layers: Tensor, coefficients: Tensor) -> str | None:
    reason = _refusal(layers, coefficients)
    if reason is None and layers.dtype not in _DTYPES:
        reason = f"dtype {layers.dtype}"
    return reason


def weighted_sum(layers: Tensor, coefficients: Tensor) -> Tensor:
    """layers [L, ...], coefficients [L] -> [...]."""
    layers = _plain(layers)
    wide = torch.float64 if layers.dtype == torch.float64 else torch.float32
    coefficients = _plain(coefficients.to(wide))
    output = torch.empty(layers.shape[1:], dtype=layers.dtype)
    if output.numel() == 0:
        return output
    status = _module().weighted_sum(
        _DTYPES[layers.dtype],
        layers.data_ptr(),
        coefficients.data_ptr(),
        output.data_ptr(),
        layers.shape[0],
        output.numel(),
        torch.get_num_threads(),
    )
    _check("scalar_mix", status)
    return output
