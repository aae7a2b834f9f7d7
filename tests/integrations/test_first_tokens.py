"""The last layer for first tokens alone: whom it serves, that nobody can tell, and who gets every row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ctxfast
from ctxfast import ops
from ctxfast.bert.selection import Selection
from ctxfast.integrations import _encoder, _first_tokens
from ctxfast.ops.linear_int8 import int8_unavailable_reason
from tests.integrations.model_cases import FAMILIES, batch, build, close, padding_mask, twin

transformers = pytest.importorskip("transformers")
HEAD = "ForSequenceClassification"
LABELS = torch.tensor([0, 2, 1, 1])


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> list[Selection]:
    """The selections that were made."""
    seen: list[Selection] = []
    make = Selection.first_tokens

    def spy(batch: Any) -> Selection:
        seen.append(make(batch))
        return seen[-1]

    monkeypatch.setattr(Selection, "first_tokens", spy)
    return seen


def call(layout: str = "right") -> dict[str, Tensor]:
    return batch(padding_mask(layout))


def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_encoder, "first_tokens_suffice", lambda model: False)


@pytest.mark.parametrize("layout", ["right", "left", "holes", "ones"])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_those_of_all_rows(
    selections: list[Selection], monkeypatch: pytest.MonkeyPatch, family: str, layout: str
) -> None:
    """With dropout, which is drawn for each token by its place."""
    results = []
    for alone in (True, False):
        if not alone:
            everything(monkeypatch)
        model = ctxfast.accelerate(build(family, HEAD, dropout=0.2)).train()
        torch.manual_seed(1)
        output = model(**call(layout), labels=LABELS)
        output.loss.backward()
        results.append((output.logits, output.loss, [p.grad for p in model.parameters()]))
    assert len(selections) == (0 if family == "mpnet" else 1)
    (logits, loss, gradients), (all_logits, all_loss, all_gradients) = results
    close(logits, all_logits)
    close(loss, all_loss)
    for ours, theirs in zip(gradients, all_gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            close(ours, theirs, 1e-4)


@pytest.mark.parametrize("options", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_inference(
    selections: list[Selection], monkeypatch: pytest.MonkeyPatch, family: str, options: str
) -> None:
    if options == "int8" and (reason := int8_unavailable_reason()):
        pytest.skip(reason)
    chosen = {
        "float32": {},
        "bfloat16": {"dtype": torch.bfloat16},
        "int8": {"quantization": "int8"},
    }
    model = ctxfast.accelerate(build(family, HEAD), **chosen[options])
    with torch.no_grad():
        whole = model(**call()).logits
        assert not selections or family == "mpnet"  # 15 rows are not worth the calls of the parts
        monkeypatch.setattr(_encoder, "_ROWS_WORTH_PARTS", 15)
        alone = model(**call()).logits
    assert len(selections) == (0 if family == "mpnet" else 1)
    close(alone, whole)


def test_inference_by_parts(selections: list[Selection]) -> None:
    theirs = build("bert", HEAD)
    ours = ctxfast.accelerate(twin(theirs))
    ours.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *args: None)
    with torch.no_grad():
        close(ours(**call("ones")).logits, theirs(**call("ones")).logits)
    assert len(selections) == 1


def test_rows_without_tokens(selections: list[Selection]) -> None:
    """Their pooled row is that of zeros, as it is where all rows are computed."""
    model = ctxfast.accelerate(build("bert", HEAD))
    inputs = call()
    inputs["attention_mask"][2] = 0
    logits = model(**inputs).logits
    assert len(selections) == 1
    with torch.no_grad():
        model.bert.register_forward_hook(lambda *args: None)
        close(logits, model(**inputs).logits)
        inputs["attention_mask"].zero_()
        assert model(**inputs).logits.isfinite().all()
    assert len(selections) == 1


def test_gradient_checkpointing(selections: list[Selection]) -> None:
    results = []
    for checkpointing in (False, True):
        model = ctxfast.accelerate(build("bert", HEAD)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**call(), labels=LABELS).loss.backward()
        results.append([p.grad for p in model.parameters()])
    assert len(selections) == 2
    for a, b in zip(*results, strict=True):
        close(a, b)


def test_packed_weights_of_the_last_layer_are_dropped_by_a_step(
    selections: list[Selection],
) -> None:
    """What a fused optimiser writes it does not announce."""
    model = ctxfast.accelerate(build("bert", HEAD))
    with torch.no_grad():
        before = model(**call()).logits
    for name in ("query", "key", "value"):
        with torch.enable_grad():
            model(**call())
        weight = getattr(model.bert.encoder.layer[1].attention.self, name).weight
        weight.data[1, 2:30] += 3.0
        with torch.no_grad():
            after = model(**call()).logits
            assert (after - before).abs().max() > 1e-3
            before = after
    assert len(selections) == 3


# Who sees other rows than the first.


def hook_the_encoder(model: nn.Module) -> None:
    def mean_first(module: nn.Module, args: Any, output: Any) -> Any:
        assert output.last_hidden_state.shape == (4, 9, 32)

    model.base_model.register_forward_hook(mean_first)


def hook_the_reader(model: nn.Module) -> None:
    reader = model.classifier if model.base_model_prefix == "roberta" else model.bert.pooler

    def look(module: nn.Module, args: Any) -> None:
        assert args[0].shape == (4, 9, 32)

    reader.register_forward_pre_hook(look)


def hook_the_last_layer(model: nn.Module) -> None:
    def look(module: nn.Module, args: Any, output: Tensor) -> None:
        assert output.shape == (4, 9, 32)

    model.base_model.encoder.layer[1].register_forward_hook(look)


def patch_the_encoder(model: nn.Module) -> None:
    forward = model.base_model.forward

    def look(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        assert output.last_hidden_state.shape == (4, 9, 32)
        return output

    model.base_model.forward = look


def read_the_mean(model: nn.Module) -> None:
    class Mean(nn.Module):
        def __init__(self, old: nn.Module, projection: nn.Linear) -> None:
            super().__init__()
            self.old, self.dense, self.activation = old, projection, nn.Tanh()

        def forward(self, features: Tensor) -> Tensor:
            assert features.shape == (4, 9, 32)
            return self.old(features.mean(1, keepdim=True).expand_as(features))

    if model.base_model_prefix == "roberta":
        model.classifier = Mean(model.classifier, model.classifier.dense)
    else:
        model.bert.pooler = Mean(model.bert.pooler, model.bert.pooler.dense)


def states_by_configuration(model: nn.Module) -> None:
    model.config.output_hidden_states = True


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize(
    "change",
    [
        hook_the_encoder,
        hook_the_reader,
        hook_the_last_layer,
        patch_the_encoder,
        read_the_mean,
        states_by_configuration,
    ],
)
def test_who_sees_other_rows_gets_them(
    selections: list[Selection], family: str, change: Callable[[nn.Module], None]
) -> None:
    theirs = build(family, HEAD)
    ours = ctxfast.accelerate(twin(theirs))
    ours(**call("ones"))
    assert len(selections) == 1
    for model in (ours, theirs):
        change(model)
    close(ours(**call("ones")).logits, theirs(**call("ones")).logits)
    assert len(selections) == 1


def test_states_and_weights_that_are_asked_for(selections: list[Selection]) -> None:
    theirs = build("bert", HEAD)
    theirs.set_attn_implementation("eager")
    ours = ctxfast.accelerate(twin(theirs))
    for name in ("hidden_states", "attentions"):
        got, want = (m(**call("ones"), **{f"output_{name}": True}) for m in (ours, theirs))
        for a, b in zip(got[name], want[name], strict=True):
            close(a, b)
    four = {**call("ones"), "attention_mask": torch.ones(4, 1, 9, 9, dtype=torch.bool)}
    close(ours(**four).logits, theirs(**four).logits)
    assert not selections


@pytest.mark.parametrize("part", ["head", "encoder"])
def test_classes_of_ones_own(selections: list[Selection], part: str) -> None:
    """A subclass may hand the states on to somebody, whatever forward it has."""
    theirs = build("bert", HEAD)
    ours = twin(theirs)
    chosen = ours if part == "head" else ours.bert
    # Of the same name.
    chosen.__class__ = type(type(chosen).__name__, (type(chosen),), {})
    ctxfast.accelerate(ours)
    close(ours(**call("ones")).logits, theirs(**call("ones")).logits)
    assert not selections


def test_another_encoder_within_the_head(selections: list[Selection]) -> None:
    """The classifier of a head may call an encoder itself, of which it reads what it likes."""
    theirs = build("bert", HEAD)
    inner = build("bert")

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = twin(inner)

        def forward(self, pooled: Tensor) -> Tensor:
            states = self.inner(inputs_embeds=pooled[:, None].expand(-1, 9, -1))
            assert states.last_hidden_state.shape == (4, 9, 32)
            return states.last_hidden_state.mean(1)[:, :3]

    theirs.classifier = Classifier()
    ours = ctxfast.accelerate(twin(theirs))
    close(ours(**call("ones")).logits, theirs(**call("ones")).logits)
    assert len(selections) == 1


def test_other_heads_and_an_encoder_without_layers(selections: list[Selection]) -> None:
    choices = ctxfast.accelerate(build("bert", "ForMultipleChoice"))
    choices(**{name: x.view(2, 2, -1) for name, x in call().items()})
    theirs = build("bert", HEAD)
    theirs.bert.encoder.layer = nn.ModuleList()
    ours = ctxfast.accelerate(twin(theirs))
    close(ours(**call("ones")).logits, theirs(**call("ones")).logits)
    assert not selections


def test_the_table_names_classes_that_exist() -> None:
    for name, reader in _first_tokens._READERS.items():
        head = getattr(transformers, name)
        module = __import__(head.__module__, fromlist=["*"])
        assert reader is None or hasattr(module, reader[1])


def test_through_triton(selections: list[Selection]) -> None:
    """Packed weights are native code's alone, and it reads the plain ones."""
    model, stock = (build("bert", HEAD) for _ in range(2))
    stock.load_state_dict(model.state_dict())
    arguments = call()
    with torch.no_grad(), ops.use_backend("triton"):
        close(ctxfast.accelerate(model)(**arguments).logits, stock(**arguments).logits)
    assert len(selections) == 1
