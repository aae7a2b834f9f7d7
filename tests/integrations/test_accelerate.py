"""What `accelerate` takes and refuses, what `explain` says, and `attn_implementation="ctxfast"`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import ctxfast
from ctxfast.ops import _native
from ctxfast.ops.linear_int8 import int8_unavailable_reason
from tests.integrations.model_cases import FAMILIES, alone, batch, build, close, padding_mask, twin

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("family", FAMILIES)
def test_explain_names_every_layer(family: str) -> None:
    model = ctxfast.accelerate(build(family))
    found = ctxfast.explain(model, **batch(padding_mask("right")))
    count = 4 if family == "albert" else 2
    assert found.notes == [f"model ({type(model).__name__}): {count} of {count} layers fused"]
    assert found.padding == pytest.approx(17 / 36)
    assert found.packed_bytes > 0 and found.calls["attention_varlen", "native"] == count
    assert "layers fused" in str(found)


def test_an_encoder_anywhere_in_a_module() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.towers = nn.ModuleDict({"a": build("bert"), "b": build("mpnet")})

    model = Mine()
    wanted = {name: tower(**batch(padding_mask("ones")))[0] for name, tower in model.towers.items()}
    assert ctxfast.accelerate(model) is model
    for name, tower in model.towers.items():
        close(tower(**batch(padding_mask("ones")))[0], wanted[name])
    notes = ctxfast.explain(model).notes
    assert [note.split(":")[0] for note in notes] == [
        "towers.a (BertModel)",
        "towers.b (MPNetModel)",
    ]


def test_a_subclass_without_a_forward_of_its_own() -> None:
    class Named(transformers.BertModel):
        def norm(self) -> float:
            return 1.0

    theirs = build("bert")
    ours = Named(theirs.config).eval()
    ours.load_state_dict(theirs.state_dict())
    assert ctxfast.accelerate(ours).norm() == 1.0 and type(ours).__name__ == "Named"
    close(ours(**batch(padding_mask("ones")))[0], theirs(**batch(padding_mask("ones")))[0])


def _decoder() -> nn.Module:
    config = build("bert").config
    config.is_decoder = True
    return transformers.BertLMHeadModel(config)


class Overridden(transformers.BertModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


REFUSED = {
    "nothing": (lambda: nn.Linear(2, 2), ValueError, "BERT, RoBERTa.* got Linear"),
    "another type": (
        lambda: transformers.T5Model(
            transformers.T5Config(
                vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
            )
        ),
        ValueError,
        "must hold an encoder of BERT.*'t5'",
    ),
    "decoder": (_decoder, ValueError, "BertModel is a decoder"),
    "own forward": (lambda: Overridden(build("bert").config), ValueError, "forward of its own"),
    "onnx": (lambda: SimpleNamespace(backend="onnx", model=build("bert")), ValueError, "onnx"),
    "openvino": (lambda: SimpleNamespace(backend="openvino"), ValueError, "openvino"),
    "no module": (lambda: "bert-base-uncased", TypeError, "torch module or a pipeline.* got str"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_reason(name: str) -> None:
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        ctxfast.accelerate(make())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": torch.int8}, ValueError, "dtype must be None or one of torch.float32"),
        ({"quantization": "int4"}, ValueError, "quantization must be None or 'int8', got 'int4'"),
        ({"cuda_graphs": True}, ValueError, "cuda_graphs=True needs the model on a CUDA.*got cpu"),
        ({"cuda_graphs": 1}, TypeError, "cuda_graphs must be a bool, got int"),
        ({"unpad": "yes"}, TypeError, "unpad must be a bool, got str"),
    ],
)
def test_bad_options_leave_the_model_alone(options: Any, error: Any, message: str) -> None:
    model = build("bert")
    with pytest.raises(error, match=message):
        ctxfast.accelerate(model, **options)
    assert type(model) is transformers.BertModel


@pytest.fixture
def registered() -> None:
    ctxfast.integrations.transformers.register()


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mpnet"])
@pytest.mark.parametrize("layout", ["right", "holes", "ones"])
def test_registered_attention_and_mask(registered: None, family: str, layout: str) -> None:
    theirs = build(family)
    ours = twin(theirs)
    ours.set_attn_implementation("ctxfast")
    theirs.set_attn_implementation("eager")
    mask = padding_mask(layout)
    inputs = batch(mask)
    got, want = ours(**inputs), theirs(**inputs)
    close(got[0], want[0])
    got[0].square().sum().backward()
    want[0].square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        if b.grad is not None:
            close(a.grad, b.grad, 1e-4)
    weights = ours(**inputs, output_attentions=True).attentions
    for a, b in zip(weights, theirs(**inputs, output_attentions=True).attentions, strict=True):
        close(a, b)
    for row, (kept, output) in enumerate(alone(theirs, inputs)):
        close(got[0][row, mask[row]], output[0][0, kept])


def test_registered_attention_in_a_causal_model(registered: None) -> None:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaModel(config).eval()
    inputs = batch(padding_mask("left"))
    mask = inputs["attention_mask"].bool()
    wanted = [model(**inputs)[0], model(input_ids=inputs["input_ids"])[0]]
    model.set_attn_implementation("ctxfast")
    close(model(**inputs)[0][mask], wanted[0][mask])
    close(model(input_ids=inputs["input_ids"])[0], wanted[1])


def test_accelerate_takes_a_registered_model(registered: None) -> None:
    theirs = build("bert")
    ours = twin(theirs)
    ours.set_attn_implementation("ctxfast")
    ctxfast.accelerate(ours)
    inputs = batch(padding_mask("ones"))
    close(ours(**inputs)[0], theirs(**inputs)[0])
    assert "2 of 2 layers fused" in ctxfast.explain(ours).notes[0]


@pytest.mark.parametrize(("size", "layers"), [(384, 6), (768, 12)])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"quantization": "int8"}])
def test_the_check_is_cheap(size: int, layers: int, options: dict[str, Any]) -> None:
    """What sees at each call that nobody has changed the model, beside the shortest forward there is."""
    import time

    if not _native.available():
        pytest.skip(f"native module absent: {_native.unavailable_reason()}")
    if options.get("quantization") and (reason := int8_unavailable_reason()):
        pytest.skip(reason)

    config = transformers.BertConfig(
        vocab_size=100, hidden_size=size, num_hidden_layers=layers, intermediate_size=4 * size
    )
    model = ctxfast.accelerate(transformers.BertModel(config).eval(), **options)
    call = {"input_ids": torch.arange(12)[None]}

    def best(function: Any, calls: int) -> float:
        times = []
        for _ in range(10):
            start = time.perf_counter()
            for _ in range(calls):
                function()
            times.append((time.perf_counter() - start) / calls)
        return min(times)

    with torch.inference_mode():
        forward = best(lambda: model(**call), 5)
        state = vars(model)["_ctxfast"]
        check = best(state.certificate.holds, 50)
        check += best(state.stack.snapshot.parameters_hold, 50)
    assert check < 0.02 * forward, f"{check * 1e6:.0f} us of {forward * 1e6:.0f} us"
