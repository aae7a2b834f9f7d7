"""Compute types for inference: what they change, by how much, and what they leave alone."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ctxfast
from ctxfast import reference
from ctxfast.bert import BertForMaskedLM, BertForSequenceClassification, BertModel
from ctxfast.nn import PackedLinear, packed_bytes, set_precision
from ctxfast.ops import _dispatch, quantize_weight
from ctxfast.ops.linear_int8 import int8_unavailable_reason
from tests.bert.model_cases import batch, pair

needs_int8 = pytest.mark.skipif(
    int8_unavailable_reason() is not None, reason=str(int8_unavailable_reason())
)
LENGTHS = [9, 1, 4, 12]


def rms(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt())


def _swapped(function: Any, rest: tuple[Tensor, ...], x: Tensor, *_: Any) -> Tensor:
    return function(x, *rest)


def simulated(model: BertModel, precision: str) -> BertModel:
    """The model in plain PyTorch, every linear layer computed by the definition of the precision."""
    twin = copy.deepcopy(model)
    if precision == "bfloat16":
        return twin.bfloat16()
    for module in twin.modules():
        if isinstance(module, PackedLinear):
            weight = quantize_weight(module.weight)
            definition = partial(reference.linear_int8, bias=module.bias)
            module.forward = partial(_swapped, definition, weight[:3])
    return twin


def test_error_is_that_of_the_definition(precision: str) -> None:
    """At most twice that of the same arithmetic in plain PyTorch, and not none."""
    model, _ = pair(hidden_size=64, intermediate_size=96)
    ids, mask = batch(LENGTHS, 12)
    with torch.no_grad():
        exact = model(ids, mask)
        with ctxfast.ops.use_backend("reference"):
            expected = simulated(model, precision)(ids, mask)
        set_precision(model, precision)
        with _dispatch.record() as verdicts:
            found = model(ids, mask)
        set_precision(model, None)
        again = model(ids, mask)
    for name in ("last_hidden_state", "pooler_output"):
        error = rms(found[name], exact[name])
        # Beside int8 what feeds products alone is bfloat16: half of its unit, relative to values near 1.
        rounding = torch.finfo(torch.bfloat16).eps / 2
        assert 1e-4 < error <= 2 * (rms(expected[name], exact[name]) + rounding)
        assert found[name].dtype == torch.float32
        assert torch.equal(again[name], exact[name])
    assert not found.last_hidden_state[~mask.bool()].any()
    if precision == "int8":
        counts = [v.ran for v in verdicts if v.operator == "linear_int8"]
        assert counts == ["native"] * (2 * 4 + 1)


def test_types_of_all_outputs(precision: str) -> None:
    model, _ = pair()
    ids, mask = batch(LENGTHS, 12)
    set_precision(model, precision)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        output = model(ids, mask, **wanted)
        set_precision(model, None)
        exact = model(ids, mask, **wanted)
    for name in ("hidden_states", "attentions"):
        for found, right in zip(output[name], exact[name], strict=True):
            assert found.dtype == torch.float32
            assert rms(found, right) < 0.05


def test_selected_rows_and_masks(precision: str) -> None:
    """A classifier computes its last layer for first tokens alone; masks of the caller take the padded way."""
    base, _ = pair()
    model = BertForSequenceClassification(base.config).eval()
    ids, mask = batch(LENGTHS, 12)
    grid = (mask[:, None, :, None] * mask[:, None, None, :]).bool()
    with torch.no_grad():
        exact = model(ids, mask).logits
        set_precision(model, precision)
        assert 0 < rms(model(ids, mask).logits, exact) < 0.05
        assert rms(model(ids, grid).logits, model(ids, mask).logits) < 0.05


def test_training_and_gradients_are_untouched(precision: str) -> None:
    model, _ = pair(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    twin = copy.deepcopy(model)
    set_precision(model, precision)
    ids, mask = batch(LENGTHS, 12)
    with torch.no_grad():
        model(ids, mask)
    for x in (model, twin):
        x(ids, mask).last_hidden_state.square().sum().backward()
    assert packed_bytes(model) == 0
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert a.grad is None or torch.equal(a.grad, b.grad)
    with torch.no_grad():
        assert torch.equal(
            model.train()(ids, mask).last_hidden_state, twin.train()(ids, mask).last_hidden_state
        )


def test_layers_with_hooks_run_on_their_parameters(precision: str) -> None:
    """What wraps a layer gets the parameters' type, in the middle of layers that compute in a narrower one."""
    model, _ = pair()
    ids, mask = batch(LENGTHS, 12)
    seen: list[torch.dtype] = []

    class Adapter(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.layer = layer

        @property
        def weight(self) -> Tensor:
            return self.layer.weight

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.dtype)
            return nn.functional.linear(x, self.layer.weight, self.layer.bias)

    for block in model.encoder.layer:
        for part, name in (
            (block.attention.self, "value"),
            (block.attention.output, "dense"),
            (block.intermediate, "dense"),
            (block.output, "dense"),
        ):
            setattr(part, name, Adapter(getattr(part, name)))
    with torch.no_grad():
        exact = model(ids, mask).last_hidden_state
        set_precision(model, precision)
        result = model(ids, mask).last_hidden_state
    assert set(seen) == {torch.float32} and len(seen) == 16
    assert result.dtype == torch.float32 and rms(result, exact) < 0.05


@needs_int8
def test_from_pretrained(tmp_path: Path) -> None:
    model, _ = pair()
    model.save_pretrained(tmp_path)
    loaded = BertModel.from_pretrained(tmp_path, quantization="int8")
    ids, mask = batch(LENGTHS, 12)
    set_precision(model, "int8")
    with torch.no_grad():
        assert torch.equal(loaded(ids, mask).last_hidden_state, model(ids, mask).last_hidden_state)
    assert loaded.dtype == torch.float32
    assert "inference in int8: 13 linear layers" in str(ctxfast.explain(loaded))
    loaded.save_pretrained(tmp_path / "again")
    again = BertModel.from_pretrained(tmp_path / "again")
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "inference in" not in str(ctxfast.explain(again))
    with pytest.raises(ValueError, match="quantization must be None or 'int8', got 'int4'"):
        BertModel.from_pretrained(tmp_path, quantization="int4")


@needs_int8
def test_tied_head() -> None:
    base, _ = pair()
    model = BertForMaskedLM(base.config).eval()
    ids, mask = batch(LENGTHS, 12)
    with torch.no_grad():
        exact = model(ids, mask).logits
        set_precision(model, "int8")
        result = model(ids, mask).logits
    assert result.dtype == torch.float32 and rms(result, exact) < 0.1 * float(exact.std())
