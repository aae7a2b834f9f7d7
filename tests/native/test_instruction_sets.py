"""Every instruction set that the binary holds, against float64: what runs on one machine must be right on another."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from ctxfast import ops, reference
from ctxfast.ops import _native, _native_linear
from tests.ops.implementations import only
from tests.oracle import assert_matches

NAMES = ("baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
pytestmark = pytest.mark.skipif(
    not _native.available(), reason=f"native module absent: {_native.unavailable_reason()}"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("head_dim", [1, 17, 64, 100])
def test_attention_forward_and_backward(isa, dtype, head_dim):
    torch.manual_seed(head_dim)
    shapes = [(2, 2, 19, head_dim), (2, 2, 70, head_dim), (2, 2, 70, head_dim), (1, 2, 19, 70)]
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    mask = torch.rand(2, 70) < 0.8
    grad = torch.randn(shapes[0]).to(dtype)
    call = {"key_padding_mask": mask, "dropout_p": 0.2, "seed": torch.tensor([9])}
    call |= {"window_size": (20, 50)}

    def run(function, to):
        leaves = [x.to(to).requires_grad_() for x in inputs]
        output = function(*leaves[:3], bias=leaves[3], **call)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(to))]

    with only("native"):
        found = run(ops.attention, dtype)
    eager, exact = run(reference.attention, dtype), run(reference.attention, torch.float64)
    for name, *three in zip(
        ("output", "dq", "dk", "dv", "dbias"), found, eager, exact, strict=True
    ):
        if dtype == torch.float64:  # both are exact to rounding; sums of up to 100 terms
            torch.testing.assert_close(three[0], three[2], rtol=1e-12, atol=1e-13)
        else:
            assert_matches(*three, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_and_embeddings(isa, dtype):
    x, residual = (torch.randn(5, 100).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(100).to(dtype) for _ in range(2))
    with only("native"):
        result = ops.add_layer_norm(x, residual, weight, bias, 1e-12)
    eager = reference.add_layer_norm(x, residual, weight, bias, 1e-12)
    wide = [t.double() for t in (x, residual, weight, bias)]
    assert_matches(result, eager, reference.add_layer_norm(*wide, 1e-12))
    ids = torch.randint(2, (4, 7))
    tables = [torch.randn(9, 100).to(dtype) for _ in range(3)]
    with only("native"):
        result = ops.embed_layer_norm(ids, ids, ids, *tables, weight, bias, 1e-12)
    eager = reference.embed_layer_norm(ids, ids, ids, *tables, weight, bias, 1e-12)
    wide = [t.double() for t in (*tables, weight, bias)]
    assert_matches(result, eager, reference.embed_layer_norm(ids, ids, ids, *wide, 1e-12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cross_entropy(isa, dtype):
    logits, labels = (torch.randn(5, 101) * 3).to(dtype), torch.randint(101, (5,))
    exact = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum() * 0.5, exact)
    found = logits.clone()
    result = _native_linear.cross_entropy_(found, labels, 0.5, True)
    wide = torch.finfo(result.dtype).eps
    rounding = torch.finfo(dtype).eps / 2  # of what is stored
    torch.testing.assert_close(result.double(), losses, rtol=8 * wide, atol=8 * wide)
    torch.testing.assert_close(found.double(), gradient, rtol=rounding + 8 * wide, atol=wide)


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_in_panels(isa, activation, dtype):
    for rows in (1, 2, 3, 7, 12, 16, 31, 32, 50):
        given = torch.randn(rows, 802), torch.randn(75, 802) / 28, torch.randn(75)
        x, weight, bias = (t.to(dtype) for t in given)
        with only("native"):
            result = ops.linear(
                x, weight, bias, activation=activation, packed=_native_linear.pack(weight)
            )
        eager = reference.linear(x, weight, bias, activation=activation)
        wide = [t.double() for t in (x, weight, bias)]
        exact = reference.linear(*wide, activation=activation)
        rounding = torch.finfo(dtype).eps * reference.linear(*wide)
        rounding = rounding if activation in ("gelu", "gelu_tanh") else None
        assert_matches(result, eager, exact, rounding=rounding)


def test_environment_variable_is_an_upper_bound():
    code = "import torch; from ctxfast.ops import _native; print(_native.isa())"
    for name in NAMES:
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "CTXFAST_CPU_ISA": name},
            capture_output=True,
            text=True,
        )
        allowed = [n for n in NAMES[: NAMES.index(name) + 1] if n in _native.available_isas()]
        assert run.stdout.strip() == allowed[-1], run.stderr


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="set_isa: name must be one of .*, got 'sse9'"):
        _native.set_isa("sse9")
