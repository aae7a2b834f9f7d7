"""Every installed peer computes the same BERT, and its absence has a reason."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest
import torch

from ctxfast.benchmarks import checks, peers, workloads
from ctxfast.benchmarks.case import BadOption, Unavailable

BERT_PEERS = ["transformers", "onnxruntime", "openvino", "ctranslate2"]
OPTIONAL = (
    "transformers",
    "onnx",
    "onnxruntime",
    "openvino",
    "ctranslate2",
    "sentence_transformers",
    "fastembed",
)


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
        best = {candidate.layout for candidate in candidates if not candidate.lesser}
        assert best == (layouts if name == "transformers" else {"buckets"})
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
        f"for name in {OPTIONAL}:\n"
        "    sys.modules[name] = None\n"
        "from ctxfast.benchmarks import peers\n"
        "print(*(f'{p.name}={p.reason}' for p in peers.find(peers.names())), sep='\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    reasons = dict(line.split("=", 1) for line in done.stdout.splitlines())
    for name in [*BERT_PEERS, "sentence-transformers", "fastembed"]:
        assert "not importable" in reasons[name]
    assert reasons["ctxfast"] == reasons["eager"] == reasons["torch"] == ""


def test_slow_peers_run_on_request_alone():
    assert "torch.compile" not in peers.default_names()
    assert "torch.compile" in [peer.name for peer in peers.find(["torch.compile"])]
    assert [peer.name for peer in peers.find([])] == ["ctxfast", "eager", "gemm"]


def test_unknown_peer():
    with pytest.raises(BadOption, match="peers must be among ctxfast, .*, got 'tensorrt'"):
        peers.find(["tensorrt"])


@pytest.mark.parametrize("name", ["FlashAttention", "xFormers"])
def test_a_package_for_cuda_alone_says_so(monkeypatch, name):
    for package in ("flash_attn", "xformers"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (peer,) = (p for p in peers.find([name]) if p.name == name)
    assert peer.reason == "its kernels run on CUDA alone, and there is no CUDA device"
    assert peer.knows(next(workloads.cases("attention", "tiny")))


def test_every_backend_of_sentence_transformers_that_fails_is_named(monkeypatch, case):
    """Its torch backend here is the transformers model; the others lack their packages."""
    pytest.importorskip("transformers")
    from ctxfast.benchmarks.peers import huggingface, sentences

    class Module:
        def __init__(self, model):
            self.model = model

        def __call__(self, features):
            return {"token_embeddings": self.model(**features).last_hidden_state}

    def load(inputs, backend):
        if backend != "torch":
            raise ImportError(f"install {backend} things")
        return Module(huggingface.load(inputs, "float32", "sdpa"))

    monkeypatch.setattr(sentences, "_load", load)
    version = sentences._version
    absent = ("optimum-onnx", "optimum-intel")
    monkeypatch.setattr(
        sentences, "_version", lambda name: None if name in absent else version(name)
    )
    found = sentences.bert(case)
    with torch.inference_mode():
        labels = []
        with pytest.raises(
            Unavailable,
            match="onnx backend: install onnx things.*optimum-onnx.*requires transformers.*; openvino backend: install",
        ):
            for candidate in found:
                labels.append(candidate.label)
                checks.check(candidate.result(candidate.run()), case.truth(), "float32")
    assert labels == ["sentence-transformers torch", "sentence-transformers torch, length buckets"]


@pytest.mark.full
def test_flex_attention_computes_the_same():
    from ctxfast.benchmarks.peers import flex

    try:
        flex.version()
    except Exception as error:
        pytest.skip(str(error))
    case = next(c for c in workloads.cases("attention", "tiny") if "sms" in c.name)
    with torch.inference_mode():
        for candidate in flex.attention(case):
            checks.check(candidate.result(candidate.run()), case.truth(), candidate.dtype)
