"""The padded attention kernels, forward and backward, interpreted, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from ctxfast.ops import _triton
from tests.kernels.cases import FLOATS, Case, padding


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_dtype(path: str, dtype: torch.dtype) -> None:
    Case(2, 32, [70], [100], dtype).check()


@pytest.mark.parametrize("head_dim", [8, 17, 64, 80])
def test_head_sizes(path: str, head_dim: int) -> None:
    Case(1, head_dim, [33], [65], fused_layout=head_dim != 17).check()


@pytest.mark.parametrize(
    "options",
    [
        dict(is_causal=True),
        dict(window_size=(10, 5)),
        dict(window_size=(-1, 7)),
        dict(window_size=(20, -1), is_causal=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(70, 100), (100, 70)], ids=str)
def test_windows(path: str, options: dict, lengths: tuple[int, int]) -> None:
    Case(1, 16, [lengths[0]], [lengths[1]], options=options).check()


@pytest.mark.parametrize("kind", ["prefix", "left", "holes"])
def test_key_padding_mask(path: str, kind: str) -> None:
    mask = padding([100, 0, 64], 101)
    if kind == "left":
        mask = mask.flip(1)
    if kind == "holes":
        mask = torch.rand(mask.shape) < 0.5
    Case(1, 16, [40] * 3, [101] * 3, options=dict(key_padding_mask=mask)).check()


@pytest.mark.parametrize("shape", [(2, 2, 40, 90), (1, 1, 40, 90), (2, 1, 1, 90)], ids=str)
def test_boolean_masks(path: str, shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.5
    mask[0, 0, 0] = False
    Case(2, 16, [40] * 2, [90] * 2, options=dict(attn_mask=mask)).check()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_everything_at_once(path: str, dtype: torch.dtype) -> None:
    options = dict(
        attn_mask=torch.rand(3, 1, 50, 110) < 0.7,
        key_padding_mask=padding([110, 90, 1], 110),
        bias=torch.randn(1, 2, 50, 110).to(dtype),
        is_causal=True,
        window_size=(60, 3),
        dropout_p=0.2,
        scale=0.3,
    )
    Case(2, 24, [50] * 3, [110] * 3, dtype, options=options).check()


def test_long_sequences() -> None:
    options = dict(window_size=(150, 90), dropout_p=0.1)
    Case(1, 16, [300], [280], options=options).check()


def test_no_gradient_of_lse(path: str) -> None:
    Case(1, 16, [40], [50], needs_lse_grad=False).check()


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_scales_that_are_not_positive(path: str, scale: float) -> None:
    Case(1, 16, [40], [70], options=dict(scale=scale, is_causal=True)).check()


def test_everything_dropped(path: str) -> None:
    Case(1, 16, [40], [70], options=dict(dropout_p=1.0)).check()


def test_rows_without_keys_are_zero(path: str) -> None:
    mask = torch.ones(1, 1, 40, 70, dtype=torch.bool)
    mask[0, 0, 5] = False
    case = Case(1, 16, [40], [70], options=dict(attn_mask=mask))
    output, lse = case.forward()
    assert lse[0, 0, 5] == -torch.inf
    assert not output[0, 0, 5].any()
    assert not case.backward(output, lse)[0][0, 0, 5].any()


@pytest.mark.filterwarnings("ignore:overflow")
def test_the_smallest_float_as_a_mask() -> None:
    """finfo.min added to every score of a row leaves the row uniform, as in eager float32."""
    bias = torch.zeros(1, 1, 8, 70)
    bias[..., 3, :] = torch.finfo(torch.float32).min
    bias[..., 4, 10:] = torch.finfo(torch.float32).min
    case = Case(1, 16, [8], [70], options=dict(bias=bias))
    output, _ = case.forward()
    torch.testing.assert_close(output[0, 0, 3], case.value[0, 0].mean(0))
    torch.testing.assert_close(output, case.exact(torch.float32)[0])


def test_empty_dimensions() -> None:
    for lengths_q, lengths_k in (([0], [5]), ([5], [0])):
        case = Case(2, 16, lengths_q, lengths_k, fused_layout=False)
        output, lse = case.forward()
        gradients = case.backward(output, lse)
        assert output.shape == case.query.shape and not output.any()
        assert (lse == -torch.inf).all()
        assert all(not gradient.any() for gradient in gradients)


def test_same_bits_every_time(path: str) -> None:
    options = dict(dropout_p=0.1, bias=torch.randn(1, 1, 70, 70))
    case = Case(1, 16, [70], [70], options=options)

    def run() -> tuple[torch.Tensor, ...]:
        output, lse = case.forward()
        return output, lse, *case.backward(output, lse)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_expanded_and_transposed_inputs() -> None:
    """Stride-0 gradients, transposed rows, expanded heads: the same numbers as contiguous copies."""
    case = Case(2, 16, [40] * 2, [70] * 2)
    case.key = case.key[:, :1].expand(-1, 2, -1, -1)
    case.query = case.query.transpose(2, 3).contiguous().transpose(2, 3)
    case.grad_output = torch.ones(()).expand(case.query.shape)
    case.check()


def test_output_lies_in_sequence_major_memory() -> None:
    case = Case(2, 16, [40], [40])
    output, lse = case.forward()
    gradients = case.backward(output, lse)[:3]
    assert all(x.transpose(1, 2).is_contiguous() for x in (output, *gradients))


def test_what_is_refused() -> None:
    query = torch.randn(1, 1, 4, 16)
    assert _triton.attention_refuses(query) is None
    assert "float64" in str(_triton.attention_refuses(query.double()))
    assert "257" in str(_triton.attention_refuses(torch.randn(1, 1, 4, 257)))
