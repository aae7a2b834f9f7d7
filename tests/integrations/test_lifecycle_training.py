"""What people do to a model while they train it, after `accelerate`: each row of the table is a test."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ctxfast
from tests.integrations.lifecycle_cases import inputs, valid
from tests.integrations.model_cases import build, close, twin

transformers = pytest.importorskip("transformers")


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    theirs = build("bert")
    return ctxfast.accelerate(twin(theirs)), theirs


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(pair: tuple[nn.Module, nn.Module], reentrant: bool) -> None:
    gradients = []
    for model in pair:
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        valid(model).square().sum().backward()
        gradients.append([p.grad for n, p in model.named_parameters() if "pooler" not in n])
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs, 1e-4)
    ours = build("bert", dropout=0.3).train()  # recomputed dropout draws the same mask
    ctxfast.accelerate(ours)
    # Checkpointing hooks the word embeddings, whose module then draws its dropout by itself.
    ours.embeddings.dropout.eval()
    results = []
    for enable in (False, True):
        ours.zero_grad()
        if enable:
            ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        valid(ours).square().sum().backward()
        results.append(ours.encoder.layer[0].output.dense.weight.grad.clone())
    close(*results, 1e-5)


def test_autocast(pair: tuple[nn.Module, nn.Module]) -> None:
    ours, theirs = pair
    exact = valid(theirs)
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode, torch.autocast("cpu", torch.bfloat16):
            got, want = valid(ours), valid(theirs)
    assert got.dtype == want.dtype
    assert (got - exact).abs().max() <= 2 * (want - exact).abs().max() + 1e-2


def test_train_evaluate_train(pair: tuple[nn.Module, nn.Module]) -> None:
    histories = []
    for model in pair:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        history = []
        for _ in range(3):
            model.train()
            loss = valid(model).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                history.append(valid(model).clone())
        histories.append(history)
    for ours, theirs in zip(*histories, strict=True):
        close(ours, theirs, 1e-3)


def test_frozen_lower_layers(pair: tuple[nn.Module, nn.Module]) -> None:
    for model in pair:
        model.train()
        for module in (model.embeddings, model.encoder.layer[0]):
            module.requires_grad_(False)
        valid(model).square().sum().backward()
    ours, theirs = pair
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (expected[name].grad is None), name
        if parameter.grad is not None:
            close(parameter.grad, expected[name].grad, 1e-4)


def test_dropout_is_drawn_by_coordinates() -> None:
    ours = ctxfast.accelerate(build("bert", dropout=0.3)).train()
    call = inputs()
    wide = {name: nn.functional.pad(x, (0, 4)) for name, x in call.items()}
    results = []
    for given in (call, call, wide):
        torch.manual_seed(4)
        results.append(valid(ours, given))
    assert torch.equal(results[0], results[1])
    close(results[2], results[0])
    assert (valid(ours) - results[0]).abs().max() > 0.1
