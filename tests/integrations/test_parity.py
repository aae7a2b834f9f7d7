"""Accelerated models against transformers: outputs, losses and gradients, for every family and head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ctxfast
from tests.integrations.model_cases import (
    FAMILIES,
    PAD,
    VOCABULARY,
    alone,
    assemble,
    batch,
    build,
    cases,
    close,
    padding_mask,
    twin,
)

LAYOUTS = ("right", "left", "holes", "ones")


def pair(family: str, head: str = "Model", **options: Any) -> tuple[nn.Module, nn.Module]:
    """(accelerated, as transformers made it) with the same weights."""
    theirs = build(family, head)
    ours = ctxfast.accelerate(twin(theirs), **options)
    return ours, theirs


def same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        want = expected[name].grad
        if want is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        assert parameter.grad is not None, name
        close(parameter.grad, want, 1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_encoder_equals_each_sentence_alone(family: str, layout: str) -> None:
    ours, theirs = pair(family)
    theirs.set_attn_implementation("eager")
    mask = padding_mask(layout)
    inputs = batch(mask, pad_ids=family in ("roberta", "xlm-roberta", "camembert", "mpnet"))
    expected = alone(theirs, inputs, output_hidden_states=True, output_attentions=True)
    for attentions in (False, True):
        got = ours(**inputs, output_hidden_states=True, output_attentions=attentions)
        assert len(got.hidden_states) == len(expected[0][1].hidden_states)
        assert torch.equal(got.hidden_states[-1], got.last_hidden_state)
        for index, state in enumerate(got.hidden_states):
            rows = [(kept, output.hidden_states[index][0]) for kept, output in expected]
            close(state, assemble(rows, mask))
            assert not state[~mask].any()
        if "pooler_output" in got:
            close(got.pooler_output, torch.cat([out.pooler_output for _, out in expected]))
    for index, weights in enumerate(got.attentions):
        for row, (kept, output) in enumerate(expected):
            want = output.attentions[index][0][:, kept][:, :, kept]
            close(weights[row][:, mask[row]][:, :, mask[row]], want)
            assert not weights[row][:, ~mask[row]].any()
            assert not weights[row][:, :, ~mask[row]].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_without_unpadding_it_equals_the_padded_batch(family: str, layout: str) -> None:
    ours, theirs = pair(family, unpad=False)
    theirs.set_attn_implementation("eager")
    inputs = batch(padding_mask(layout), pad_ids=layout != "holes")
    wanted = theirs(**inputs, output_hidden_states=True, output_attentions=True)
    for options in ({}, {"output_attentions": True}):
        got = ours(**inputs, output_hidden_states=True, **options)
        for state, want in zip(got.hidden_states, wanted.hidden_states, strict=True):
            close(state, want)
        if "pooler_output" in wanted:
            close(got.pooler_output, wanted.pooler_output)
    for weights, want in zip(got.attentions, wanted.attentions, strict=True):
        close(weights, want)
    assert list(got.keys()) == list(wanted.keys())


class _SingleChoice(nn.Module):
    """A multiple-choice head on one choice at a time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **call: Tensor) -> Any:
        flat = (
            ("position_ids",) if self.config.model_type == "distilbert" else ()
        )  # it does not flatten them
        return self.model(**{k: v if k in flat else v[:, None] for k, v in call.items()})


def _labels(head: str, mask: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def draw(high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    rows = len(mask)
    if head == "ForMaskedLM":
        return {"labels": draw(VOCABULARY, mask.shape)}
    if head == "ForTokenClassification":
        return {"labels": draw(3, mask.shape)}
    if head == "ForSequenceClassification":
        return {"labels": draw(3, (rows,))}
    if head == "ForNextSentencePrediction":
        return {"labels": draw(2, (rows,))}
    if head == "ForMultipleChoice":
        return {"labels": draw(2, (2,))}
    if head == "ForQuestionAnswering":
        first = mask.int().argmax(1)
        return {"start_positions": first, "end_positions": torch.tensor([20, -1, 4, 3])}
    return {}


def _token_loss(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(logits[mask], labels[mask])


def _span_loss(logits: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """The mean over rows whose clamped position is a token."""
    losses = []
    for row, position in enumerate(positions.clamp(min=0).tolist()):
        if position < mask.shape[1] and mask[row, position]:
            losses.append(torch.logsumexp(logits[row, mask[row]], 0) - logits[row, position])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("layout", ("right", "left", "holes"))
@pytest.mark.parametrize(("family", "head"), [case for case in cases() if case[1] != "Model"])
def test_heads_and_gradients_equal_each_sentence_alone(family: str, head: str, layout: str) -> None:
    ours, theirs = pair(family, head)
    mask = padding_mask(layout)
    inputs, labels = batch(mask), _labels(head, mask)
    call, single = inputs, theirs
    if head == "ForMultipleChoice":
        call = {name: x.view(2, 2, -1) for name, x in inputs.items()}
        single = _SingleChoice(theirs)
    pretraining = head == "ForPreTraining"
    if pretraining:
        second = "sentence_order_label" if family == "albert" else "next_sentence_label"
        labels = {"labels": (inputs["input_ids"] * 7) % (2 if family == "electra" else VOCABULARY)}
        if family != "electra":
            labels[second] = torch.tensor([0, 1, 1, 0])
    got = ours(**call, **labels)
    rows = alone(single, inputs)

    def tokens(name: str) -> Tensor:
        return assemble([(kept, getattr(output, name)[0]) for kept, output in rows], mask)

    if head == "ForQuestionAnswering":
        loss = torch.zeros(())
        for side in ("start", "end"):
            logits, result = tokens(f"{side}_logits"), getattr(got, f"{side}_logits")
            close(result[mask], logits[mask])
            assert (result[~mask] == torch.finfo(torch.float32).min).all()
            loss = loss + _span_loss(logits, labels[f"{side}_positions"], mask) / 2
    elif pretraining and family == "electra":
        logits = tokens("logits")
        close(got.logits[mask], logits[mask])
        loss = F.binary_cross_entropy_with_logits(logits[mask], labels["labels"][mask].float())
    elif pretraining:
        name = "sop_logits" if family == "albert" else "seq_relationship_logits"
        logits, pooled = tokens("prediction_logits"), torch.cat([getattr(o, name) for _, o in rows])
        close(got.prediction_logits[mask], logits[mask])
        close(getattr(got, name), pooled)
        loss = _token_loss(logits, labels["labels"], mask) + F.cross_entropy(pooled, labels[second])
    elif head in ("ForMaskedLM", "ForTokenClassification"):
        logits = tokens("logits")
        close(got.logits[mask], logits[mask])
        loss = _token_loss(logits, labels["labels"], mask)
    else:
        logits = torch.cat([output.logits for _, output in rows]).view(got.logits.shape)
        close(got.logits, logits)
        loss = F.cross_entropy(logits, labels["labels"])
    close(got.loss, loss)
    got.loss.backward()
    loss.backward()
    same_gradients(ours, theirs)


@pytest.mark.parametrize(("family", "head"), [case for case in cases() if case[1] != "Model"])
def test_heads_without_unpadding_equal_the_padded_batch(family: str, head: str) -> None:
    ours, theirs = pair(family, head, unpad=False)
    mask = padding_mask("right")
    call = {**batch(mask), **_labels(head, mask)}
    if head == "ForMultipleChoice":
        call = {k: v if k == "labels" else v.view(2, 2, -1) for k, v in call.items()}
    got, wanted = ours(**call), theirs(**call)
    assert list(got.keys()) == list(wanted.keys())
    for name, want in wanted.items():
        close(got[name], want)
    if "loss" in wanted:
        got.loss.backward()
        wanted.loss.backward()
        same_gradients(ours, theirs)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "albert"])
def test_masks_and_positions_and_embeddings(family: str) -> None:
    ours, theirs = pair(family)
    mask = padding_mask("right")
    inputs = batch(mask)
    ids = inputs["input_ids"]
    positions = torch.randint(2, 30, ids.shape)
    tokens = torch.zeros_like(ids) if family in ("distilbert", "roberta") else ids % 2
    typed = {} if family == "distilbert" else {"token_type_ids": tokens}
    embeds = theirs.get_input_embeddings()(ids).detach()
    square = torch.rand(4, 1, 9, 9) > 0.3
    square |= torch.eye(9, dtype=torch.bool)
    calls: list[dict[str, Tensor]] = [
        {"input_ids": ids},
        {"input_ids": ids, "attention_mask": torch.ones(4, 9)},
        {"input_ids": ids, "attention_mask": mask.float(), **typed},
        {"input_ids": ids, "attention_mask": mask, "position_ids": positions},
        {"input_ids": ids, "attention_mask": mask, "position_ids": positions[:1]},
        {"inputs_embeds": embeds, "attention_mask": mask},
        {"input_ids": ids, "attention_mask": square},
        {"input_ids": ids, "attention_mask": torch.zeros(4, 1, 9, 9).masked_fill(~square, -1e30)},
        {"input_ids": ids[:, :1]},
    ]
    for call in calls:
        got, want = ours(**call).last_hidden_state, theirs(**call).last_hidden_state
        given = call.get("attention_mask")
        if given is not None and given.dim() == 2:
            got, want = got[given.bool()], want[given.bool()]
        close(got, want)
    assert ours(ids[:0], attention_mask=mask[:0]).last_hidden_state.shape == (0, 9, 32)


def test_rows_without_tokens_are_zero_and_do_not_train() -> None:
    ours, _ = pair("bert")
    inputs = batch(padding_mask("right"))
    inputs["attention_mask"][1] = 0
    embeds = torch.randn(4, 9, 32, requires_grad=True)
    got = ours(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).last_hidden_state
    assert not got[1].any()
    got.square().sum().backward()
    assert not embeds.grad[1].any() and embeds.grad[0].any()


def test_what_lies_in_padding_does_not_matter() -> None:
    ours, _ = pair("bert")
    mask = padding_mask("right")
    embeds = torch.randn(4, 9, 32)
    clean = ours(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    embeds[~mask] = float("nan")
    assert torch.equal(ours(inputs_embeds=embeds, attention_mask=mask).last_hidden_state, clean)


def test_a_masked_padding_id_takes_no_gradient() -> None:
    """RoBERTa's padding row, of words and of positions, stays still although a mask calls it a token."""
    ours, theirs = pair("roberta")
    ids = torch.tensor([[5, PAD, 7, 8]])
    for model in (ours, theirs):
        model(ids, torch.ones(1, 4)).last_hidden_state.square().sum().backward()
    same_gradients(ours, theirs)
    assert not ours.embeddings.position_embeddings.weight.grad[PAD].any()


@pytest.mark.parametrize("selection", [0, -1, [0, 2], [-2, 9]])
def test_hidden_states_by_index(selection: Any) -> None:
    ours, theirs = pair("bert")
    inputs = batch(padding_mask("ones"))
    wanted = theirs(**inputs, output_hidden_states=selection).hidden_states
    got = ours(**inputs, output_hidden_states=selection).hidden_states
    if wanted is None:
        assert got is None
        return
    if all(state is not None for state in wanted):
        pytest.skip("this transformers gives all states")
    assert [state is None for state in got] == [state is None for state in wanted]


@pytest.mark.parametrize("family", FAMILIES)
def test_tuples_have_the_same_form(family: str) -> None:
    ours, theirs = pair(family)
    inputs = batch(padding_mask("ones"))
    for options in ({}, {"output_hidden_states": True}):
        got = ours(**inputs, return_dict=False, **options)
        want = theirs(**inputs, return_dict=False, **options)
        assert [type(x) for x in got] == [type(x) for x in want]


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_the_compute_type_changes_nothing_else(dtype: torch.dtype) -> None:
    ours, theirs = pair("bert", dtype=dtype)
    inputs = batch(padding_mask("right"))
    mask = inputs["attention_mask"].bool()
    want = theirs(**inputs).last_hidden_state[mask]
    low = twin(theirs).to(dtype)(**inputs).last_hidden_state[mask].float()
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode:
            got = ours(**inputs)
        assert got.last_hidden_state.dtype == torch.float32 == ours.dtype
        error = (got.last_hidden_state[mask] - want).abs().max()
        assert 1e-4 < error <= 2 * (low - want).abs().max()
    got.last_hidden_state.sum().backward()
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    assert ours.encoder.layer[0].output.dense.weight.grad.dtype == torch.float32
