"""Cases on another device. Tensors of the meta device, which refuse to meet those of a CPU, stand for a GPU."""

import dataclasses

import pytest
import torch

from ctxfast.benchmarks import peers, timing, workloads
from ctxfast.benchmarks.case import BadOption, Case
from ctxfast.benchmarks.options import Options

META = torch.device("meta")
# Peer and workload: those that do not index by a mask, which the meta device cannot.
RUNNABLE = (
    *(("eager", name) for name in ("bert-latency", "linear", "layer-norm", "lstm")),
    ("torch", "lstm"),
)


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, dict | tuple | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _case(name: str) -> Case:
    return next(workloads.cases(name, "tiny", META))


@pytest.mark.parametrize("name", workloads.names("tiny", device="cuda"))
def test_every_input_moves_and_the_truth_stays(name):
    here, moved = next(workloads.cases(name, "tiny")), _case(name)
    assert moved.device == META
    assert all(x.device == META for x in _tensors(moved.inputs))
    assert moved.truth().device.type == "cpu"
    assert torch.equal(moved.truth(), here.truth())
    assert set(moved.dtypes) == {*here.dtypes, "float16"}


@pytest.mark.parametrize("peer, name", RUNNABLE)
def test_candidates_compute_where_the_inputs_are(peer, name):
    case = _case(name)
    (found,) = (p for p in peers.find([peer]) if p.name == peer)
    assert found.available and found.knows(case)
    ran = 0
    with torch.inference_mode():
        for candidate in found.candidates(case):
            assert all(x.device == META for x in _tensors(candidate.run()))
            ran += 1
    assert ran


def test_a_peer_says_where_it_runs():
    found = {peer.name: peer for peer in peers.find(peers.names())}
    assert found["ctxfast"].runs_on("cuda") and found["ctxfast"].runs_on("cpu")
    assert not found["FlashAttention"].runs_on("cpu")
    assert not found["ctranslate2"].runs_on("cuda")


def test_what_cannot_run_on_a_gpu_is_refused():
    with pytest.raises(BadOption, match="bert-pretraining must be cpu, got 'meta'"):
        workloads.cases("bert-pretraining", "tiny", META)
    with pytest.raises(BadOption, match="device must be cpu or cuda, got 'tpu'"):
        Options(device="tpu").check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(BadOption, match="no CUDA device"):
        Options(device="cuda").check()


def test_no_workload_is_listed_twice():
    assert len(workloads.names("large")) == len(set(workloads.names("large"))) == 3


def test_the_clock_of_a_gpu_waits_for_it(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    device = torch.device("cuda", 0)
    assert timing.clock_of(device)() > 0
    assert waited == [device]
    assert timing.clock_of(torch.device("cpu"))() > 0
    assert waited == [device]
