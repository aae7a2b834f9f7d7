"""Adapters, quantised and absent weights, before and after `accelerate`: each row of the table is a test."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import ctxfast
from tests.integrations.lifecycle_cases import fused, inputs, notes, valid
from tests.integrations.model_cases import build, close, twin

transformers = pytest.importorskip("transformers")
TARGETS = ["query", "value", "intermediate.dense"]


def lora(model: nn.Module, **options: Any) -> nn.Module:
    """With adapters that are not born zero, the same ones for every call."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(7)
    config = peft.LoraConfig(
        r=4, **{"target_modules": TARGETS, "init_lora_weights": False, **options}
    )
    return peft.get_peft_model(model, config).eval()


@pytest.fixture(params=["before", "after"])
def adapted(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """(accelerated, stock), both with the same adapters, which came before or after `accelerate`."""
    theirs = build("bert")
    if request.param == "before":
        ours = ctxfast.accelerate(lora(twin(theirs)))
    else:
        ours = twin(theirs)
        valid(ctxfast.accelerate(ours))  # has packed its weights when the adapters come
        ours = lora(ours)
    return ours, lora(theirs)


def test_lora_outputs_gradients_and_merging(adapted: tuple[nn.Module, nn.Module]) -> None:
    ours, theirs = adapted
    assert fused(ours)
    close(valid(ours), valid(theirs))
    with ours.disable_adapter(), theirs.disable_adapter():
        plain = valid(ours)
        close(plain, valid(theirs))
    assert (valid(ours) - plain).abs().max() > 0.1
    for model in adapted:
        valid(model.train()).square().sum().backward()
        model.eval()
    expected = dict(theirs.named_parameters())
    trained = 0
    for name, parameter in ours.named_parameters():
        want = expected[name].grad
        assert (parameter.grad is None) == (want is None), name
        if want is not None:
            trained += 1
            close(parameter.grad, want, 1e-4)
    assert trained == 2 * 2 * len(TARGETS)
    with torch.no_grad():
        wanted = valid(theirs)
        close(valid(ours), wanted)
        ours.merge_adapter()
        close(valid(ours), wanted)
        ours.unmerge_adapter()
        close(valid(ours), wanted)
        merged = ours.merge_and_unload()
        close(valid(merged), wanted)
        assert fused(merged) and "peft" not in str(merged)
    assert type(ctxfast.restore(merged)) is transformers.BertModel


def test_lora_variants_and_a_head_that_is_trained_whole() -> None:
    for options in ({"use_dora": True}, {"use_rslora": True, "target_modules": ["dense"]}):
        theirs = build("bert", "ForSequenceClassification")
        ours = ctxfast.accelerate(lora(twin(theirs), task_type="SEQ_CLS", **options))
        theirs = lora(theirs, task_type="SEQ_CLS", **options)
        assert fused(ours)
        close(valid(ours), valid(theirs))
        for model in (ours, theirs):
            model(**inputs(), labels=torch.tensor([0, 2, 1, 1])).loss.backward()
        for (name, a), (_, b) in zip(
            ours.named_parameters(), theirs.named_parameters(), strict=True
        ):
            assert (a.grad is None) == (b.grad is None), name
            if b.grad is not None:
                close(a.grad, b.grad, 1e-4)


def test_dropout_of_adapters_is_drawn_in_training_alone() -> None:
    ours = ctxfast.accelerate(lora(build("bert"), lora_dropout=0.5))
    assert torch.equal(valid(ours), valid(ours))
    ours.train()
    assert (valid(ours) - valid(ours)).abs().max() > 0.01


def test_quantised_layers_run_their_own_code() -> None:
    theirs = build("bert")
    ours = ctxfast.accelerate(twin(theirs))
    results = []
    for model in (ours, theirs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces that it moves to torchao
            lower = torch.ao.quantization.quantize_dynamic(
                model.encoder.layer[1], {nn.Linear}, dtype=torch.qint8
            )
        model.encoder.layer[1] = lower
        with torch.no_grad():
            results.append(valid(model))
    assert "1 of 2 layers fused" in notes(ours) and "quantized" in notes(ours)
    close(*results, 5e-2)  # activations are rounded to 256 levels of the whole, padded grid


def test_weights_on_the_meta_device() -> None:
    theirs = build("bert")
    ours = ctxfast.accelerate(twin(theirs)).to("meta")
    result = ours(input_ids=torch.zeros(2, 5, dtype=torch.long, device="meta"))
    assert result.last_hidden_state.is_meta and result.last_hidden_state.shape == (2, 5, 32)
    assert "meta device" in notes(ours)
    ours.to_empty(device="cpu").load_state_dict(theirs.state_dict())
    for name, buffer in theirs.named_buffers():
        ours.get_buffer(name).copy_(buffer)
    close(valid(ours), valid(theirs))
    assert fused(ours)
