"""DistributedDataParallel and FSDP2 around an accelerated model, in one process and in two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ctxfast
from tests.integrations.lifecycle_cases import fused, inputs, notes
from tests.integrations.model_cases import build, close, twin

transformers = pytest.importorskip("transformers")

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

LABELS = torch.tensor([0, 2, 1, 1])
STEPS = 3


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train(model: nn.Module, rows: slice = slice(None)) -> list[Tensor]:
    """Logits of a few steps, in evaluation mode and in training mode by turns."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    call = {name: x[rows] for name, x in inputs().items()}
    logits = []
    for _ in range(STEPS):
        with torch.no_grad():
            logits.append(model.eval()(**call).logits)
        optimizer.zero_grad()
        model.train()(**call, labels=LABELS[rows]).loss.backward()
        optimizer.step()
    return logits


def shard(model: nn.Module, layers: bool) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if layers:
        for layer in model.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert (theirs[0] - theirs[-1]).abs().max() > 1e-3  # it learns
    for got, want in zip(ours, theirs, strict=True):
        close(got, want, 1e-4)


def test_distributed_data_parallel(group: None) -> None:
    theirs = build("bert", "ForSequenceClassification")
    ours = nn.parallel.DistributedDataParallel(ctxfast.accelerate(twin(theirs)))
    same(train(ours), train(theirs))
    assert fused(ours.module)
    again = ctxfast.accelerate(nn.parallel.DistributedDataParallel(twin(theirs)))
    same(train(again), train(theirs))
    assert fused(again.module)


@pytest.mark.parametrize("layers", [False, True], ids=["whole", "layers"])
@pytest.mark.parametrize("first", ["accelerate", "shard"])
def test_fully_sharded(group: None, layers: bool, first: str) -> None:
    theirs = build("bert", "ForSequenceClassification")
    if first == "accelerate":
        ours = shard(ctxfast.accelerate(twin(theirs)), layers)
    else:
        ours = ctxfast.accelerate(shard(twin(theirs), layers))
    same(train(ours), train(theirs))
    expected = theirs.state_dict()
    for name, value in ours.state_dict().items():
        close(value.full_tensor(), expected[name], 1e-4)
    with torch.no_grad():
        ours(**inputs())  # leaves the outermost parameters whole
    found = notes(ours)
    assert ("0 of 2 layers fused" if layers else "2 of 2 layers fused") in found
    ours.reshard()
    ctxfast.restore(ours)
    same(train(ours), train(theirs))


def _work(rank: int, folder: str, way: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/{way}", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        model = ctxfast.accelerate(build("bert", "ForSequenceClassification"))
        ddp = nn.parallel.DistributedDataParallel
        wrapped = ddp(model) if way == "ddp" else shard(model, layers=False)
        rows = slice(2 * rank, 2 * rank + 2)
        torch.save(train(wrapped, rows)[-1], f"{folder}/{way}{rank}")
    finally:
        dist.destroy_process_group()


@pytest.mark.full
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_train_as_one(way: str, tmp_path: Path) -> None:
    theirs = build("bert", "ForSequenceClassification")
    wanted = train(theirs)[-1]
    torch.multiprocessing.spawn(_work, (str(tmp_path), way), nprocs=2)
    close(torch.cat([torch.load(tmp_path / f"{way}{rank}") for rank in range(2)]), wanted, 1e-4)
