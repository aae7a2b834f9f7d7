"""`accelerate(model, quantization="int8")`: the error that its arithmetic has by definition, and all else as it was."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ctxfast
from ctxfast import ops, reference
from ctxfast.ops import _dispatch
from ctxfast.ops.linear_int8 import int8_unavailable_reason
from tests.integrations.lifecycle_cases import notes
from tests.integrations.model_cases import FAMILIES, HEADS, batch, build, padding_mask, twin

transformers = pytest.importorskip("transformers")
if int8_unavailable_reason() is not None:
    pytest.skip(str(int8_unavailable_reason()), allow_module_level=True)

# Beside 8-bit products what is only multiplied again is bfloat16: half of its unit, relative to values near 1.
ROUNDING = torch.finfo(torch.bfloat16).eps / 2


def rms(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt())


def _linear(weight: ops.QuantizedWeight, bias: Tensor, input: Tensor) -> Tensor:
    return reference.linear_int8(input, *weight[:3], bias)


def simulated(model: nn.Module) -> nn.Module:
    """The stock model in plain PyTorch, every linear layer of its encoder computed by the definition."""
    result = twin(model)
    for name, module in result.base_model.named_modules():
        if isinstance(module, nn.Linear) and "pooler" not in name:
            module.forward = partial(_linear, ops.quantize_weight(module.weight), module.bias)
    return result


def compare(theirs: nn.Module, ours: nn.Module, call: dict[str, Tensor]) -> float:
    """The least cosine between tokens in int8 and in float32, after checking the error against the definition's."""
    valid = call["attention_mask"].bool()
    with torch.no_grad():
        exact = theirs(**call)[0][valid]
        expected = simulated(theirs)(**call)[0][valid]
        found = ours(**call)[0]
    assert found.dtype == exact.dtype and not found[~valid].any()
    found = found[valid]
    scale = max(1.0, float(exact.square().mean().sqrt()))
    error = rms(found, exact)
    assert 1e-5 < error <= 2 * (rms(expected, exact) + ROUNDING * scale)
    return float(torch.cosine_similarity(found, exact, dim=1).min())


@pytest.mark.parametrize("layout", ["right", "holes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_error_is_that_of_the_definition(family: str, layout: str) -> None:
    theirs = build(family)
    ours = ctxfast.accelerate(twin(theirs), quantization="int8")
    with _dispatch.record() as verdicts:
        cosine = compare(theirs, ours, batch(padding_mask(layout)))
    assert cosine > 0.99
    layers = 4 if family == "albert" else 2
    counts = [v.ran for v in verdicts if v.operator == "linear_int8"]
    assert counts == ["native"] * (4 * layers + (family in ("electra", "albert")))
    assert f"{layers} of {layers} layers fused; products of 8-bit integers" in notes(ours)


@pytest.mark.parametrize("head", HEADS[1:5])
def test_heads_compute_as_before(head: str) -> None:
    """A head is exact on what the encoder gives to it."""
    theirs = build("bert", head)
    ours = ctxfast.accelerate(twin(theirs), quantization="int8")
    call = batch(padding_mask("ones"))
    with torch.no_grad():
        got, want = ours(**call), theirs(**call)
        states = ours.base_model(**call)
    for name, value in got.items():
        assert value.dtype == torch.float32 and 0 < rms(value, want[name]) < 0.2
    if head == "ForTokenClassification":
        assert torch.equal(got.logits, ours.classifier(states[0]))


@pytest.mark.parametrize("options", [{"unpad": False}, {"dtype": torch.bfloat16}])
def test_with_other_options(options: Any) -> None:
    theirs = build("mpnet")
    ours = ctxfast.accelerate(twin(theirs), quantization="int8", **options)
    call = batch(padding_mask("right"))
    valid = call["attention_mask"].bool()
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        got, want = ours(**call, **wanted), theirs(**call, **wanted)
    for name in ("hidden_states", "attentions"):
        for a, b in zip(got[name], want[name], strict=True):
            assert a.dtype == torch.float32
            if name == "hidden_states":
                a, b = a[valid], b[valid]
                assert torch.cosine_similarity(a, b, dim=1).min() > 0.99


def test_the_model_itself_stays_as_it_is() -> None:
    theirs = build("bert")
    ours = twin(theirs)
    call = batch(padding_mask("right"))
    with torch.no_grad():
        exact = ours(**call)[0]
        ctxfast.accelerate(ours, quantization="int8")
        rough = ours(**call)[0]
        assert ours.dtype == torch.float32 and ours.config.to_dict() == theirs.config.to_dict()
        for (a, x), (b, y) in zip(
            ours.state_dict().items(), theirs.state_dict().items(), strict=True
        ):
            assert a == b and torch.equal(x, y)
        assert torch.equal(copy.deepcopy(ours)(**call)[0], rough)
        assert 0 < ctxfast.explain(ours).packed_bytes < sum(p.nbytes for p in theirs.parameters())
        with ctxfast.accelerated(ours):
            assert "8-bit" not in notes(ours) and not torch.equal(ours(**call)[0], rough)
        assert torch.equal(ours(**call)[0], rough)
        assert torch.equal(ctxfast.restore(ours)(**call)[0], exact)


def test_a_changed_weight_is_seen() -> None:
    ours = ctxfast.accelerate(build("bert"), quantization="int8")
    call = batch(padding_mask("ones"))
    with torch.no_grad():
        before = ours(**call)[0]
        ours.encoder.layer[0].output.dense.weight.mul_(0.5)
        assert rms(ours(**call)[0], before) > 0.01


def test_a_layer_with_a_hook_runs_its_own_code() -> None:
    theirs = build("bert")
    ours = ctxfast.accelerate(twin(theirs), quantization="int8")
    seen: list[torch.dtype] = []
    dense = ours.encoder.layer[0].output.dense
    dense.register_forward_hook(lambda module, args, output: seen.append(args[0].dtype))
    with torch.no_grad():
        call = batch(padding_mask("right"))
        got, want = ours(**call)[0], theirs(**call)[0]
    assert seen == [torch.float32] and "layer 0: runs its own code" in notes(ours)
    valid = call["attention_mask"].bool()
    assert torch.cosine_similarity(got[valid], want[valid], dim=1).min() > 0.99


def test_autocast_takes_the_parameters() -> None:
    theirs = build("bert")
    ours = ctxfast.accelerate(twin(theirs), quantization="int8")
    call = batch(padding_mask("ones"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), _dispatch.record() as verdicts:
        got, want = ours(**call)[0], theirs(**call)[0]
    assert not any(v.operator == "linear_int8" for v in verdicts)
    assert torch.cosine_similarity(got.float(), want.float(), dim=2).min() > 0.999


@pytest.mark.parametrize("training", [True, False])
def test_gradients_and_training_are_refused(training: bool) -> None:
    model = ctxfast.accelerate(build("bert"), quantization="int8").train(training)
    match = "serves inference only.*" + ("got training mode" if training else "records gradients")
    with pytest.raises(RuntimeError, match=match):
        model(**batch(padding_mask("ones")))
    ctxfast.accelerate(model)  # without it the same model trains
    model(**batch(padding_mask("ones")))[0].sum().backward()


def test_types_and_machines_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"quantization='int8' is not.*not in torch\.float16"):
        ctxfast.accelerate(build("bert"), quantization="int8", dtype=torch.float16)
    from ctxfast.integrations import _accelerate

    monkeypatch.setattr(_accelerate, "int8_unavailable_reason", lambda: "no such instructions")
    model = build("bert")
    with pytest.raises(ValueError, match="quantization='int8' is not.*no such instructions"):
        ctxfast.accelerate(model, quantization="int8")
    assert type(model) is transformers.BertModel


def test_adapters_of_peft_run_beside_it() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query", "dense"], init_lora_weights=False)
    theirs = peft.get_peft_model(build("bert"), config).eval()
    ours = ctxfast.accelerate(twin(theirs), quantization="int8")
    call = batch(padding_mask("ones"))
    with torch.no_grad():
        got, want = ours(**call)[0], theirs(**call)[0]
    assert "2 of 2 layers fused" in notes(ours)
    assert torch.cosine_similarity(got, want, dim=2).min() > 0.99


def test_minilm_on_real_messages(data: Path, record_property: Any) -> None:
    """Vectors of messages from a trained model: the least cosine is reported."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from tests.integrations.test_sentence_transformers import loaded, messages, minilm

    assert sentence_transformers is not None
    texts, folder = messages(data, 48), Path(minilm())
    theirs, ours = (loaded("SentenceTransformer", folder) for _ in range(2))
    ctxfast.accelerate(ours, quantization="int8")
    got, want = (model.encode(texts, convert_to_tensor=True) for model in (ours, theirs))
    cosine = float(torch.cosine_similarity(got, want, dim=1).min())
    record_property("cosine", cosine)
    print(f"least cosine of 48 messages: {cosine:.5f}")
    assert got.dtype == torch.float32 and cosine > 0.99
