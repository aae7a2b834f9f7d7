"""set_precision: a compute type for inference that leaves parameters, outputs' dtype and training alone."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from ctxfast.nn import Highway, PackedLinear, TransformerEncoderLayer, packed_bytes, set_precision
from ctxfast.ops import _dispatch

ERROR = {"bfloat16": 2e-2, "int8": 4e-2}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_output_parameters_and_state(precision: str) -> None:
    layer = PackedLinear(64, 48).eval()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(5, 64)
    with torch.no_grad():
        exact = layer(x, "gelu")
        exact_bytes = packed_bytes(layer)
        set_precision(layer, precision)
        result = layer(x, "gelu")
        assert result.dtype == torch.float32 and not torch.equal(result, exact)
        assert relative(result, exact) < ERROR[precision]
        assert 0 < packed_bytes(layer) < exact_bytes
        set_precision(layer, None)
        assert torch.equal(layer(x, "gelu"), exact)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_highway(precision: str) -> None:
    layer, x = Highway(64, 2).eval(), torch.randn(5, 64)
    with torch.no_grad():
        exact = layer(x)
        set_precision(layer, precision)
        result = layer(x)
    assert not torch.equal(result, exact) and relative(result, exact) < ERROR[precision]
    assert packed_bytes(layer) > 0


def test_training_runs_on_the_parameters(precision: str) -> None:
    layer, x = PackedLinear(64, 48).eval(), torch.randn(5, 64)
    set_precision(layer, precision)
    with torch.no_grad():
        layer(x)
    output = layer(x)
    torch.testing.assert_close(output, nn.functional.linear(x, layer.weight, layer.bias))
    output.sum().backward()
    assert layer.weight.grad is not None and packed_bytes(layer) == 0
    with torch.no_grad():
        layer.weight.mul_(2.0)
        assert relative(layer(x), nn.functional.linear(x, layer.weight, layer.bias)) < 5e-2


def test_transformer_layer_with_stacked_projection(precision: str) -> None:
    layer = TransformerEncoderLayer(32, 4, 64, dropout=0.0, activation="gelu", batch_first=True)
    layer = layer.eval()
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        exact = layer(x)
        set_precision(layer, precision)
        with _dispatch.record() as verdicts:
            result = layer(x)
    assert 0 < relative(result, exact) < ERROR[precision]
    if precision == "int8":
        assert sum(v.operator == "linear_int8" and v.ran == "native" for v in verdicts) == 4


def test_copies_keep_the_precision(precision: str) -> None:
    layer, x = PackedLinear(32, 16).eval(), torch.randn(3, 32)
    set_precision(layer, precision)
    with torch.no_grad():
        expected = layer(x)
        twin = copy.deepcopy(layer)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        for other in (twin, loaded):
            assert torch.equal(other(x), expected)


def test_bad_names_are_refused() -> None:
    with pytest.raises(ValueError, match="^set_precision: precision must be None, .* got 'int4'"):
        set_precision(PackedLinear(4, 4), "int4")
