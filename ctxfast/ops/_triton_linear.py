"""Products and launches of linear layers on a GPU; the reasons for this division are in `ctxfast.kernels.linear`.

The products are cuBLAS's, the bias in their epilogue. Imported only where Triton is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ctxfast.kernels.linear import linear_epilogue_bwd, linear_epilogue_fwd
from ctxfast.ops._triton_attention import launch
from ctxfast.ops._triton_layer_norm import norm_rows
from ctxfast.ops._triton_layer_norm_backward import add_parts

BLOCK = 2048
BLOCK_M, BLOCK_N = 8, 256
WARPS = 4
# Ranges of rows of the first stage of the bias gradient. Fixed: the order of the sum depends on the shape alone.
_PARTS = 128


def _rows(input: Tensor) -> Tensor:
    return input.reshape(input.shape[:-1].numel(), input.shape[-1])


def _epilogue(z: Tensor, activation: str, residual: Tensor | None, output: Tensor) -> None:
    launch(
        linear_epilogue_fwd,
        triton.cdiv(z.numel(), BLOCK),
        output,
        dict(
            z_ptr=z,
            residual_ptr=None if residual is None else residual.contiguous(),
            output_ptr=output,
            size=z.numel(),
            ACTIVATION=activation,
            RESIDUAL=residual is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        ),
    )


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    packed: Tensor | None,
) -> Tensor:
    output = F.linear(_rows(input), weight, bias)
    if activation != "none" or residual is not None:
        _epilogue(output, activation, residual, output)
    return output.view(*input.shape[:-1], weight.shape[0])


def linear_activation(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and pre-activation, [..., N]."""
    z = F.linear(_rows(input), weight, bias)
    output = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    _epilogue(z, activation, residual, output)
    shape = (*input.shape[:-1], weight.shape[0])
    return output.view(shape), z.view(shape)


def _ranges(rows: int) -> tuple[int, int]:
    """Rows of a range, whole blocks, and the number of ranges."""
    size = max(triton.cdiv(rows, _PARTS * BLOCK_M), 1) * BLOCK_M
    return size, triton.cdiv(rows, size)


def linear_activation_backward(
    grad: Tensor,
    pre_activation: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    of_input: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias, empty where not wanted."""
    columns = weight.shape[0]
    grads = norm_rows(grad)
    rows = grads.shape[0]
    dz = torch.empty((rows, columns), dtype=grad.dtype, device=grad.device)
    size, parts = _ranges(rows)
    partial = torch.empty(
        (parts if of_bias else 0, columns), dtype=torch.float32, device=grad.device
    )
    blocks = triton.cdiv(columns, BLOCK_N)
    launch(
        linear_epilogue_bwd,
        parts * blocks,
        dz,
        dict(
            grad_ptr=grads,
            z_ptr=pre_activation.contiguous(),
            dz_ptr=dz,
            partial_ptr=partial if of_bias else None,
            stride_grad=grads.stride(0),
            rows=rows,
            rows_per_part=size,
            columns=columns,
            blocks=blocks,
            ACTIVATION=activation,
            SUMS=of_bias,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            num_warps=WARPS,
        ),
    )
    empty = grad.new_empty(0)
    return (
        (dz @ weight).view(input.shape) if of_input else empty,
        dz.t() @ _rows(input) if of_weight else empty,
        add_parts(partial, bias) if bias is not None and of_bias else empty,
    )
