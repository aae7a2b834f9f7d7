"""Weights that Hugging Face's accelerate keeps elsewhere and brings in for each call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import ctxfast
from tests.integrations.lifecycle_cases import fused, notes, valid
from tests.integrations.model_cases import build, close, twin

transformers = pytest.importorskip("transformers")
placement = pytest.importorskip("accelerate")


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    theirs = build("bert")
    return twin(theirs), theirs


@pytest.mark.parametrize("first", ["accelerate", "offload"])
def test_cpu_offload_and_back(pair: tuple[nn.Module, nn.Module], first: str) -> None:
    ours, theirs = pair
    if first == "accelerate":
        ctxfast.accelerate(ours)
    placement.cpu_offload(ours, execution_device=torch.device("cpu"))
    assert ours.encoder.layer[0].output.dense.weight.is_meta
    ctxfast.accelerate(ours)
    with torch.no_grad():
        close(valid(ours), valid(theirs))
        assert "runs its own code" in notes(ours)
        placement.hooks.remove_hook_from_submodules(ours)
        close(valid(ours), valid(theirs))
    assert fused(ours)
    ctxfast.restore(ours)
    assert type(ours) is transformers.BertModel
    close(valid(ours), valid(theirs))


def test_device_map_with_a_layer_on_disk(pair: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    ours, theirs = pair
    places = dict.fromkeys(("embeddings", "encoder.layer.0", "pooler"), "cpu")
    places["encoder.layer.1"] = "disk"
    ctxfast.accelerate(ours)
    placement.dispatch_model(
        ours, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    with torch.no_grad():
        close(valid(ours), valid(theirs))
    assert "an offload hook" in notes(ours)
    assert ours.encoder.layer[1].output.dense.weight.is_meta


def test_device_map_of_from_pretrained(pair: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    _, theirs = pair
    theirs.save_pretrained(tmp_path)
    ours = ctxfast.accelerate(transformers.BertModel.from_pretrained(tmp_path, device_map="cpu"))
    close(valid(ours), valid(theirs))
    assert fused(ours)


def test_the_accelerator_prepares_it(pair: tuple[nn.Module, nn.Module]) -> None:
    ours, theirs = pair
    accelerator = placement.Accelerator(cpu=True, mixed_precision="bf16")
    ours, optimizer = accelerator.prepare(
        ctxfast.accelerate(ours), torch.optim.SGD(ours.parameters(), lr=1e-2)
    )
    result = valid(ours)
    assert result.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        low = valid(theirs)
    exact = valid(theirs)
    assert (result - exact).abs().max() <= 2 * (low - exact).abs().max() + 1e-2
    before = ours.encoder.layer[0].output.dense.weight.clone()
    accelerator.backward(result.square().sum())
    optimizer.step()
    assert (ours.encoder.layer[0].output.dense.weight - before).abs().max() > 0
    unwrapped = accelerator.unwrap_model(ours, keep_fp32_wrapper=False)
    assert ctxfast.restore(unwrapped) is unwrapped
