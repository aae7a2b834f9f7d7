"""The gradient of the bias for every shape that broadcasts to the scores."""

from __future__ import annotations

import itertools

import pytest
import torch

from ctxfast.ops import _triton_attention_backward
from tests.kernels.cases import Case, padding

SHAPES = [
    tuple(size if full else 1 for size, full in zip((2, 2, 40, 90), chosen, strict=True))
    for chosen in itertools.product((True, False), repeat=4)
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_broadcast_shape(shape: tuple[int, ...]) -> None:
    Case(2, 16, [40] * 2, [90] * 2, options=dict(bias=torch.randn(shape))).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_with_masks_and_dropout(dtype: torch.dtype) -> None:
    options = dict(
        bias=torch.randn(1, 2, 40, 150).to(dtype),
        key_padding_mask=padding([150, 20], 150),
        is_causal=True,
        dropout_p=0.2,
    )
    Case(2, 16, [40] * 2, [150] * 2, dtype, options=options).check()


def test_long_sums_go_in_two_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of chunks, the gradient is right and the same every time."""
    case = Case(3, 16, [130] * 2, [70] * 2, options=dict(bias=torch.randn(1, 1, 1, 70)))
    stages = []
    launch = _triton_attention_backward.launch

    def record(kernel, programs, on, arguments):
        stages.append(kernel)
        launch(kernel, programs, on, arguments)

    monkeypatch.setattr(_triton_attention_backward, "launch", record)
    case.check()
    assert _triton_attention_backward.attention_bwd_bias_sum in stages
    output, lse = case.forward()
    first, second = (case.backward(output, lse)[-1] for _ in range(2))
    assert torch.equal(first, second)


def test_strided_bias() -> None:
    """A bias that is a transposed or expanded view has the gradient of its values."""
    bias = torch.randn(90, 40).t().expand(2, 2, 40, 90)
    Case(2, 16, [40] * 2, [90] * 2, options=dict(bias=bias)).check()
