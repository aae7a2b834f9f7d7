"""Packed weights where several threads, or the pieces of a sharded model, use one module."""

from __future__ import annotations

import subprocess
import sys
import threading

import torch

from ctxfast.nn import PackedLinear

FSDP = """
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from ctxfast.nn import PackedLinear

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
torch.manual_seed(0)
model = nn.Sequential(PackedLinear(32, 48), nn.GELU(), PackedLinear(48, 8)).eval()
fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
x = torch.randn(16, 32)

def plain():
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters())
    a, b, c, d = (p.detach() for p in whole)
    return nn.functional.linear(nn.functional.gelu(nn.functional.linear(x, a, b)), c, d)

for _ in range(3):
    for _ in range(2):
        with torch.no_grad():
            assert (model(x) - plain()).abs().max() < 1e-5
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
print("agreed")
"""


def test_threads_share_a_module() -> None:
    layer, input = PackedLinear(32, 48).eval(), torch.randn(16, 32)
    with torch.no_grad():
        expected = torch.nn.functional.linear(input, layer.weight, layer.bias)
    errors = []

    def run() -> None:
        with torch.no_grad():
            for _ in range(20):
                errors.append((layer(input) - expected).abs().max().item())
                layer.drop_packed()

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 60 and max(errors) < 1e-5


def test_fully_sharded_weights() -> None:
    result = subprocess.run(
        [sys.executable, "-c", FSDP], capture_output=True, text=True, timeout=240
    )
    assert result.stdout.strip() == "agreed", result.stderr[-2000:]
