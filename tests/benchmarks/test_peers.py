"""Every installed peer computes the same BERT, and its absence has a reason."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ctxfast.benchmarks import checks, peers, workloads
from ctxfast.benchmarks.case import BadOption

BERT_PEERS = ["transformers", "onnxruntime", "openvino", "ctranslate2"]


@pytest.fixture(scope="module")
def case():
    return next(workloads.cases("bert-inference", "tiny"))


@pytest.fixture(scope="module")
def truth(case):
    return case.truth()


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ["eager", "ctxfast", *BERT_PEERS])
def test_a_peer_computes_the_same_bert(case, truth, name):
    """Padded, in buckets and packed: sentences come back in their order."""
    (peer,) = (p for p in peers.find([name]) if p.name == name)
    if not peer.available:
        pytest.skip(peer.reason)
    with torch.inference_mode():
        candidates = list(peer.candidates(case))
        for candidate in candidates:
            checks.check(candidate.result(candidate.run()), truth, candidate.dtype)
    keys = [candidate.key for candidate in candidates]
    assert len(set(keys)) == len(keys) and any("float32" in key for key in keys)
    layouts = {candidate.layout for candidate in candidates}
    if name in ("transformers", "onnxruntime", "openvino"):
        assert layouts == {"padded", "buckets"}
    elif name != "eager":
        assert layouts == {"packed"}


@pytest.mark.unpoisoned
@pytest.mark.parametrize("workload", ["attention", "linear", "layer-norm", "lstm"])
@pytest.mark.parametrize("name", ["eager", "torch", "ctxfast"])
def test_a_peer_computes_the_same_operator(workload, name):
    (peer,) = (p for p in peers.find([name]) if p.name == name)
    with torch.inference_mode():
        for case in workloads.cases(workload, "tiny"):
            truth = case.truth()
            for candidate in peer.candidates(case) if peer.knows(case) else ():
                checks.check(candidate.result(candidate.run()), truth, candidate.dtype)


def test_threads_are_those_of_torch(case):
    """OpenVINO and CTranslate2 say how many threads they took."""
    openvino = pytest.importorskip("openvino")
    from ctxfast.benchmarks.peers import open_vino

    pytest.importorskip("transformers")
    settings = open_vino.settings("float32")
    compiled = openvino.compile_model(open_vino.convert(case.inputs), "CPU", settings)
    assert compiled.get_property("INFERENCE_NUM_THREADS") == torch.get_num_threads()
    assert compiled.get_property("NUM_STREAMS") == 1


def test_absent_peers_have_a_reason():
    code = (
        "import sys\n"
        "for name in ('transformers', 'onnx', 'onnxruntime', 'openvino', 'ctranslate2'):\n"
        "    sys.modules[name] = None\n"
        "from ctxfast.benchmarks import peers\n"
        "print(*(f'{p.name}={p.reason}' for p in peers.find(peers.names())), sep='\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    reasons = dict(line.split("=", 1) for line in done.stdout.splitlines())
    for name in BERT_PEERS:
        assert "not importable" in reasons[name]
    assert reasons["ctxfast"] == reasons["eager"] == reasons["torch"] == ""


def test_slow_peers_run_on_request_alone():
    assert "torch.compile" not in peers.default_names()
    assert "torch.compile" in [peer.name for peer in peers.find(["torch.compile"])]
    assert [peer.name for peer in peers.find([])] == ["ctxfast", "eager", "gemm"]


def test_unknown_peer():
    with pytest.raises(BadOption, match="peers must be among ctxfast, .*, got 'tensorrt'"):
        peers.find(["tensorrt"])
