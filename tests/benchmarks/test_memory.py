"""Memory of a candidate, in a process that holds nothing else."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ctxfast.benchmarks import memory, peers, runner, workloads
from ctxfast.benchmarks.case import Unavailable
from ctxfast.benchmarks.ceilings import Ceilings

pytestmark = pytest.mark.skipif(not memory.available(), reason="needs /proc/self/clear_refs")
SOURCE = ("workload", "layer-norm", "tiny")

# A candidate that keeps 64 MiB, and needs 96 MiB more while it runs.
CODE = """
import json, torch
from ctxfast.benchmarks import memory
from ctxfast.benchmarks.case import Candidate
from ctxfast.benchmarks.peers import eager
def layer_norm(case):
    weights = torch.ones(64 * 2**18)
    def run():
        return float((torch.ones(96 * 2**18)).sum() + weights[0])
    yield Candidate("eager", "other", "float32", lambda: None, lambda x: x)
    yield Candidate("eager", "eager", "float32", run, lambda x: x)
eager.layer_norm = layer_norm
memory._load_library = lambda kind, peer: torch.ones(2**20).sum()
print(json.dumps(memory._measure_here(
    {"source": ["workload", "layer-norm", "tiny"], "case": "48x64", "peer": "eager",
     "key": "eager · float32", "threads": 1}).__dict__))
"""


def test_what_is_kept_and_the_peak_are_told_apart():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    figures = {name: value / 2**20 for name, value in json.loads(done.stdout).items()}
    assert figures["held"] == pytest.approx(64, abs=4)
    assert figures["peak"] == pytest.approx(160, abs=4)


def test_a_run_measures_it_and_says_why_not():
    case = next(workloads.cases("layer-norm", "tiny"))
    found = [p for p in peers.find(()) if p.name == peers.EAGER]
    options = runner.Options("tiny", 1, 2, memory=True)
    result = runner.run_case(case, options, found, Ceilings({}, {}), source=SOURCE)
    assert result.results[0].memory is not None
    with pytest.raises(Unavailable, match="could not be measured: StopIteration"):
        memory.measure(case, SOURCE, "eager", "eager · int8")
