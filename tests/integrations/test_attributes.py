"""Plain attributes that somebody changes on an accelerated model: they mean what they mean in transformers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ctxfast
from tests.integrations.lifecycle_cases import inputs, notes, valid
from tests.integrations.model_cases import FAMILIES, batch, build, close, padding_mask, twin

transformers = pytest.importorskip("transformers")

# What every module has, `training` left out.
_COMMON = vars(nn.Module()).keys() - {"training"}
# A memory setting: transformers refuses lengths that are no multiple of it, and fused layers have no use for it.
_CHUNKS = "chunk_size_feed_forward"


def full() -> dict[str, Tensor]:
    """A batch without padding and without a mask, the one in which causal attention is causal."""
    return {"input_ids": batch(padding_mask("ones"))["input_ids"]}


def states(model: nn.Module) -> Tensor:
    return model(**full()).last_hidden_state


def outcome(model: nn.Module) -> Tensor | type[Exception]:
    try:
        return states(model)
    except Exception as error:
        return type(error)


def others(value: Any) -> Iterator[Any]:
    """Values that somebody might write in its place."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, 2 * value, value // 2)
    elif isinstance(value, float):
        yield from (value + 0.4, 0)
    elif isinstance(value, str):
        yield "tanh" if value == "none" else "none"
    elif isinstance(value, tuple):
        yield from ((*value, 2), tuple(x // 2 for x in value), list(value))
    elif value is None:
        yield from (True, 1, 0.5)
    elif isinstance(value, functools.partial) or callable(value):
        yield F.relu


def attributes(model: nn.Module) -> list[tuple[str, str, Any]]:
    """Every attribute of every class of module, once: path of the module, name and value."""
    found: dict[tuple[type, str], tuple[str, str, Any]] = {}
    for path, module in model.named_modules():
        if path:
            for name, value in vars(module).items():
                if name not in _COMMON and not name.startswith("_") and name != "config":
                    found.setdefault((type(module), name), (path, name, value))
    return list(found.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_attribute_means_what_it_means_in_transformers(family: str) -> None:
    theirs = build(family)
    ours = ctxfast.accelerate(twin(theirs))
    before = copies(theirs)
    changed = set()
    with torch.no_grad():
        wanted = states(theirs)
        close(states(ours), wanted)
        for path, name, value in attributes(theirs):
            for other in others(value):
                for model in (ours, theirs):
                    setattr(model.get_submodule(path), name, other)
                found, expected = outcome(ours), outcome(theirs)
                label = f"{path}.{name} = {other!r}: {notes(ours)}"
                if isinstance(expected, Tensor):
                    assert isinstance(found, Tensor), f"{label}, {found}"
                    close(found, expected)
                    if not torch.equal(expected, wanted):
                        changed.add(name)
                elif name != _CHUNKS:
                    assert not isinstance(found, Tensor), f"{label}, {expected}"
                for model in (ours, theirs):
                    setattr(model.get_submodule(path), name, value)
                    for parameter, kept in zip(model.parameters(), before, strict=True):
                        parameter.copy_(kept)  # max_norm writes into tables
                close(states(ours), wanted)
                assert "own code" not in notes(ours)
    assert changed >= {"eps", "max_norm"}


def copies(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def gelu_of_torch(model: nn.Module) -> None:
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.GELU()


# Path of a module, name and new value of its attribute, and what `explain` says; None where the layer stays fused.
CHANGES: dict[str, tuple[str, str, Any, str | None]] = {
    "causal": ("encoder.layer.1.attention.self", "is_causal", True, "is causal"),
    "cross": ("encoder.layer.1.attention", "is_cross_attention", True, "is cross attention"),
    "head size": (
        "encoder.layer.1.attention.self",
        "attention_head_size",
        16,
        "4 heads of 16 for a width of 32",
    ),
    "heads": (
        "encoder.layer.1.attention.self",
        "num_attention_heads",
        2,
        "2 heads of 8 for a width of 32",
    ),
    "scaling": ("encoder.layer.1.attention.self", "scaling", 2.0, None),
    "no scaling": ("encoder.layer.1.attention.self", "scaling", None, None),
    "eps": ("encoder.layer.1.output.LayerNorm", "eps", 0.5, None),
    "first eps": ("embeddings.LayerNorm", "eps", 0.5, None),
    "act": (
        "encoder.layer.1.intermediate.intermediate_act_fn",
        "act",
        F.silu,
        "act is not that of its class",
    ),
    "max_norm": ("embeddings.word_embeddings", "max_norm", 0.5, "has max_norm"),
    "types' max_norm": ("embeddings.token_type_embeddings", "max_norm", 0.5, "has max_norm"),
    "feed_forward_chunk": (
        "encoder.layer.1",
        "feed_forward_chunk",
        lambda hidden: 2 * hidden,
        "has a feed_forward_chunk of its own instance",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_attribute_counts_and_explain_names_it(change: str) -> None:
    path, name, value, note = CHANGES[change]
    theirs = build("bert")
    padding = change == "cross"  # looks at what is in padding
    ours = ctxfast.accelerate(twin(theirs), unpad=not padding)
    run = valid if padding else states
    with torch.no_grad():
        before = run(ours)
        for model in (ours, theirs):
            setattr(model.get_submodule(path), name, value)
        close(states(ours), states(theirs))
        close(valid(ours), valid(theirs))
        counts = change not in ("heads", "no scaling")
        assert ((run(theirs) - before).abs().max() > 1e-3) == counts
    assert ("own code" in notes(ours)) == (note is not None)
    assert note is None or note in notes(ours)


def test_a_shape_of_a_norm_that_does_not_fit_raises_as_it_does_in_transformers() -> None:
    ours = ctxfast.accelerate(build("bert"))
    with torch.no_grad():
        states(ours)
        ours.encoder.layer[1].output.LayerNorm.normalized_shape = (16,)
        with pytest.raises(RuntimeError, match=r"normalized_shape|normalized_size|shape"):
            states(ours)
    assert "output.LayerNorm.normalized_shape is (16,)" in notes(ours)


def test_the_form_of_torchs_own_gelu_counts() -> None:
    theirs = build("bert")
    gelu_of_torch(theirs)
    ours = ctxfast.accelerate(twin(theirs))
    with torch.no_grad():
        before = valid(ours)
        for model in (ours, theirs):
            model.encoder.layer[1].intermediate.intermediate_act_fn.approximate = "tanh"
        close(valid(ours), valid(theirs), 1e-6)
        assert (valid(ours) - before).abs().max() > 1e-5
        assert "2 of 2 layers fused" in notes(ours)
        for model in (ours, theirs):
            model.encoder.layer[1].intermediate.intermediate_act_fn.approximate = "none"
        assert torch.equal(valid(ours), before)


@pytest.mark.parametrize(
    "path",
    [
        "embeddings.dropout",
        "encoder.layer.1.attention.output.dropout",
        "encoder.layer.1.output.dropout",
    ],
)
def test_a_rate_of_dropout_counts(path: str) -> None:
    """At 1 nothing is left to chance."""
    theirs = build("bert").train()
    ours = ctxfast.accelerate(twin(theirs))
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            before = valid(ours).detach()
            for model in (ours, theirs):
                model.get_submodule(path).p = 1.0
            close(valid(ours), valid(theirs))
            assert (valid(ours) - before).abs().max() > 0.01
            for model in (ours, theirs):
                model.get_submodule(path).p = 0.0
            assert torch.equal(valid(ours), before)


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra", "albert", "roberta"])
def test_positions_that_somebody_wrote_into_the_buffer_count(family: str) -> None:
    theirs = build(family)
    ours = ctxfast.accelerate(twin(theirs))
    with torch.no_grad():
        before = valid(ours)
        for model in (ours, theirs):
            model.embeddings.position_ids += 3
        close(valid(ours), valid(theirs))
        assert torch.equal(valid(ours), before) == (family == "roberta")  # which counts ids


def test_the_index_of_padding_counts() -> None:
    theirs = build("roberta")
    ours = ctxfast.accelerate(twin(theirs))
    with torch.no_grad():
        before = valid(ours)
        for model in (ours, theirs):
            model.embeddings.padding_idx = 4
        close(valid(ours), valid(theirs))
        assert (valid(ours) - before).abs().max() > 0.01


@pytest.mark.parametrize("layers", [1, 2, 6])
def test_the_number_of_alberts_layers_counts(layers: int) -> None:
    theirs = build("albert")
    ours = ctxfast.accelerate(twin(theirs))
    with torch.no_grad():
        before = valid(ours)
        for model in (ours, theirs):
            model.config.num_hidden_layers = layers
        close(valid(ours), valid(theirs))
        assert (valid(ours) - before).abs().max() > 0.01
    assert f"{layers} of {layers} layers fused" in notes(ours)


def test_causal_calls_and_configurations_run_the_stock_forward() -> None:
    theirs = build("bert")
    ours = ctxfast.accelerate(twin(theirs))
    with torch.no_grad():
        before = states(ours)
        close(ours(**full(), is_causal=True)[0], theirs(**full(), is_causal=True)[0])
        close(states(ours), before)
        for model in (ours, theirs):
            model.config.is_causal = True
        close(states(ours), states(theirs))
        assert "the attention is causal" in notes(ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_inspected_again_while_nothing_changes(family: str) -> None:
    theirs = build(family, "ForSequenceClassification", problem_type="single_label_classification")
    head = ctxfast.accelerate(theirs)
    state = vars(head.base_model)["_ctxfast"]
    head(**inputs())
    found = state.inspection
    for _ in range(2):
        head.eval()
        with torch.no_grad():
            head(**inputs(), labels=torch.zeros(4, dtype=torch.long))
            head(**inputs(), output_hidden_states=True)
        head(**inputs()).logits.sum().backward()
        assert state.inspection is found
    head.train()
    head(**inputs())
    assert state.inspection is not found
