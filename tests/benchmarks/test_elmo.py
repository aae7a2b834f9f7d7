"""The ELMo workload: its plain model against the package, its peers against each other."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from ctxfast.benchmarks import memory, peers, plain_elmo
from ctxfast.benchmarks.ceilings import Ceilings
from ctxfast.benchmarks.records import Memory
from ctxfast.benchmarks.workloads import cases
from ctxfast.benchmarks.workloads.elmo import SHAPES
from ctxfast.elmo import batch_to_ids


def test_candidates_agree_with_the_truth():
    for case in cases("elmo-inference", "tiny"):
        truth = case.truth()
        assert truth.shape[0] == case.facts["tokens"] and truth.isfinite().all()
        for peer in peers.find([]):
            if not peer.available or not peer.knows(case):
                continue
            for candidate in peer.candidates(case):
                with torch.inference_mode():
                    result = candidate.result(candidate.run()).double()
                bound = 1e-4 if candidate.dtype == "float32" else 0.3
                assert (result - truth).abs().max() < bound * truth.abs().max(), candidate.key


def test_ids_are_those_of_the_package():
    case = next(iter(cases("elmo-inference", "tiny")))
    sentences = [list(sentence) for sentence in case.inputs.sentences]
    assert torch.equal(case.inputs.ids(), batch_to_ids(sentences))


def test_published_sizes():
    for name, parameters in (
        ("small", 13_593_296),
        ("medium", 28_027_728),
        ("original", 93_600_848),
    ):
        with torch.device("meta"):
            arrays = SHAPES[name].arrays(None)
        assert sum(x.numel() for x in arrays.values()) == parameters


def test_limit_of_steps():
    ceilings = Ceilings({"float32": {"oneDNN": {16: 100.0}}}, {4: 10.0})
    limit = ceilings.limit_of_steps("float32", [(2e11, 1e6), (1e9, 5e9)], 4)
    assert limit == (2.0 + 2.0, "compute")
    assert (
        plain_elmo.Shape().steps([5, 3], 6)[-1][0] == 2.0 * plain_elmo.Shape().recurrent_elements()
    )


def _memory(name: str) -> tuple[Memory, Memory, int]:
    """Of ours and of eager, and the bytes of the recurrent weights."""
    source = ("workload", "elmo-inference", "base")
    case = memory.find_case(source, name)
    ours, eager = (
        memory.measure(case, source, peer, f"{peer} · float32") for peer in ("ctxfast", "eager")
    )
    return ours, eager, 4 * SHAPES[case.inputs.size].recurrent_elements()


@pytest.mark.full
@pytest.mark.skipif(not memory.available(), reason="needs /proc/self/clear_refs")
def test_a_batch_needs_less_memory_than_eager():
    """The windows of all characters are never held; what is held beside the weights are their packed copies."""
    ours, eager, _ = _memory("small-b32")
    assert ours.peak < eager.peak
    assert ours.held < 2.2 * eager.held


@pytest.mark.full
@pytest.mark.skipif(not memory.available(), reason="needs /proc/self/clear_refs")
@pytest.mark.parametrize("name", ["original-b1", "medium-b1", "small-b1"])
def test_a_sentence_needs_the_recurrent_weights_twice_and_no_more(name):
    ours, eager, recurrent = _memory(name)
    assert ours.peak <= eager.peak + recurrent


_PLAIN = """
import json, sys
from ctxfast.benchmarks import memory
from ctxfast.elmo import ElmoBiLm
from ctxfast.nn import set_packing
inherited = ElmoBiLm.eval
def without_packing(model):
    set_packing(model, False)
    return inherited(model)
ElmoBiLm.eval = without_packing
source = ["workload", "elmo-inference", "base"]
print(json.dumps(memory._measure_here(
    {"source": source, "case": sys.argv[1], "peer": "ctxfast", "key": "ctxfast · float32", "threads": 2}).__dict__))
"""


@pytest.mark.full
@pytest.mark.skipif(not memory.available(), reason="needs /proc/self/clear_refs")
@pytest.mark.parametrize("name", ["original-b1", "medium-b1", "small-b1"])
def test_without_packing_a_sentence_needs_no_more_than_eager(name):
    command = [sys.executable, "-c", _PLAIN, name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ours = json.loads(done.stdout.splitlines()[-1])
    _, eager, _ = _memory(name)
    assert ours["peak"] <= eager.peak and ours["held"] <= eager.held
