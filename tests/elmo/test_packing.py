"""Which weights of an ELMo are held twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ctxfast.benchmarks import memory
from ctxfast.elmo import batch_to_ids
from ctxfast.nn import PackedLinear, packed_bytes, refresh
from ctxfast.ops import _native
from tests.elmo import models
from tests.elmo.models import SENTENCES


@pytest.mark.skipif(not _native.available(), reason="packed copies are those of the native module")
def test_the_token_encoder_is_packed_where_it_is_a_large_part_in_16_bits():
    """dim 24, projection 8: 3,840 recurrent weights beside 1,440 of highways and projection of 18 filters."""
    ids = batch_to_ids(SENTENCES)
    large = {"filters": ((1, 40), (2, 40))}
    for changes, dtype, expected in (
        ({}, torch.float32, False),
        ({}, torch.bfloat16, False),
        (large, torch.float32, False),
        (large, torch.bfloat16, True),
    ):
        bilm = models.model(**changes).to(dtype)
        bilm.stateful = "reset"
        encoder = bilm._token_embedder
        with torch.inference_mode():
            layers = bilm.layers(ids)[0]
            assert (packed_bytes(encoder) > 0) == expected
            assert packed_bytes(bilm) > packed_bytes(encoder)
            for layer in encoder.modules():
                if isinstance(layer, PackedLinear):
                    layer.pack_exact = not expected
            refresh(bilm)
            assert torch.equal(bilm.layers(ids)[0], layers)
            assert (packed_bytes(encoder) > 0) != expected


# What a sentence needs beside the weights; 20 MiB of them are recurrent.
_PEAK = """
import sys, torch
from ctxfast.benchmarks import memory
from ctxfast.elmo import batch_to_ids
from ctxfast.nn import set_packing
from tests.elmo import models
torch.set_num_threads(2)
ids = batch_to_ids(models.SENTENCES)
small, bilm = models.model(), models.model(dim=2048, projection_dim=256, n_layers=1)
with torch.inference_mode():
    for model in (small, bilm):
        model.stateful = "reset"
        set_packing(model, sys.argv[1] == "packed")
    small.layers(ids)
    before = memory.resident("VmRSS")
    memory.forget_peak()
    bilm.layers(ids)
    print(memory.resident("VmHWM") - before)
"""


@pytest.mark.skipif(not memory.available(), reason="needs /proc/self/clear_refs")
@pytest.mark.skipif(not _native.available(), reason="packed copies are those of the native module")
def test_without_packing_no_weight_is_held_twice():
    def peak(how: str) -> float:
        command = [sys.executable, "-c", _PEAK, how]
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        return int(done.stdout) / 2**20

    assert peak("plain") < 8  # a third of them
    assert 20 < peak("packed") < 28
