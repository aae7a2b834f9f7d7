"""Every candidate of the workload of accelerated models is right, and a wrong one is seen."""

from __future__ import annotations

import pytest
import torch

from ctxfast.benchmarks import checks, peers, workloads

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def cases():
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("peft")
    return {case.name: case for case in workloads.cases("accelerate", "tiny")}


NAMES = ["text-24", "sms_spam-8", "1x12", "fine-tuning-4", "lora-4"]


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", NAMES)
def test_candidates_are_right(cases, name):
    case = cases[name]
    assert list(cases) == NAMES
    truth = case.truth()
    own = {}
    with torch.inference_mode():
        for peer in peers.find(["transformers", "sentence-transformers"]):
            if not peer.available or not peer.knows(case):
                continue
            try:
                for candidate in peer.candidates(case):
                    output = candidate.result(candidate.run())
                    checks.check(output, truth, candidate.dtype)
                    if peer.name == "ctxfast":
                        own[candidate.key] = output
            except peers.Unavailable as reason:
                assert "backend" in str(reason)
    assert "ctxfast.accelerate · float32" in own
    for key, output in own.items():
        with pytest.raises(checks.WrongResult):
            checks.check(output * 1.3, truth, key.rsplit(" ", 1)[1])
