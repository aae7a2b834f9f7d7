"""Training steps: sparse prediction, dropout, gradient checkpointing, and 200 steps beside transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ctxfast import bert

transformers = pytest.importorskip("transformers")

from tests.bert.head_cases import (  # noqa: E402
    HEADS,
    assert_close,
    assert_same_gradients,
    example,
    gradients,
    pair,
)

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SPARSE = ("BertForMaskedLM", "BertForPreTraining")


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_prediction_changes_no_number(name: str) -> None:
    ours, theirs = pair(name, sparse_prediction=True, **NO_DROPOUT)
    case = example(name, [9, 1, 12, 5], 12)
    case.labels["labels"][2] = -100  # a text without labels
    ours.train(), theirs.train()
    got, expected = ours(**case.arguments()), theirs(**case.arguments())
    logits = "logits" if name == "BertForMaskedLM" else "prediction_logits"
    assert got[0] is got.loss and logits not in got
    assert_close(got.loss, expected.loss)
    assert_same_gradients(gradients(ours, got.loss), gradients(theirs, expected.loss))
    ours.eval()
    with torch.no_grad():
        dense = ours(**case.arguments())
    assert_close(dense[logits][case.valid], expected[logits][case.valid])
    assert_close(dense.loss, got.loss.detach())
    assert logits in ours.train()(**case.inputs)
    if name == "BertForPreTraining":  # without both kinds of labels there is no loss to give
        assert logits in ours(**case.inputs, labels=case.labels["labels"])


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_prediction_of_no_words(name: str) -> None:
    ours, _ = pair(name, sparse_prediction=True, **NO_DROPOUT)
    case = example(name, [3, 4], 4)
    case.labels["labels"][:] = -100
    assert ours.train()(**case.arguments()).loss.isnan()


def test_logits_of_a_training_step_can_be_differentiated() -> None:
    """The loss takes a shorter way, which must not cut theirs."""
    ours, theirs = pair("BertForMaskedLM", **NO_DROPOUT)
    case = example("BertForMaskedLM", [5, 2], 5)
    weight = torch.randn(2, 5, 60) * case.valid[..., None]
    found = []
    for model in (ours.train(), theirs.train()):
        output = model(**case.arguments())
        found.append(gradients(model, output.loss + (output.logits * weight).sum() / 50))
    assert_same_gradients(*found)


def widened(arguments: dict[str, Tensor], extra: int) -> dict[str, Tensor]:
    """The same batch with more padding, and the mask as a 4-dimensional one: our own padded run."""
    pad = torch.nn.functional.pad
    wide = {
        key: pad(x, (0, extra), value=-100 if key == "labels" else 0) if x.dim() == 2 else x
        for key, x in arguments.items()
    }
    wide["attention_mask"] = wide["attention_mask"].bool()[:, None, None]
    return wide


@pytest.mark.parametrize("name", [n for n in HEADS if n != "BertForMultipleChoice"])
def test_dropout_does_not_see_the_layout(name: str) -> None:
    rates = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    for sparse in (False, True) if name in SPARSE else (False,):
        model, _ = pair(name, sparse_prediction=sparse, **rates)
        model.train()
        case = example(name, [7, 2, 5], 7)
        results = []
        for arguments in (case.arguments(), widened(case.arguments(), 4)):
            if name == "BertForQuestionAnswering":  # its loss knows padding by a plain mask only
                arguments = dict(arguments)
                arguments.pop("start_positions"), arguments.pop("end_positions")
            torch.manual_seed(5)
            output = model(**arguments)
            if name == "BertForQuestionAnswering":
                value = output.start_logits[:, :7].masked_fill(~case.valid, 0.0).square().sum()
            else:
                value = output.loss
            results.append((value, gradients(model, value)))
        assert_close(results[1][0], results[0][0])
        assert_same_gradients(results[1][1], results[0][1])
        torch.manual_seed(6)
        assert (model(**case.arguments())[0] - results[0][0]).abs().max() > 1e-5


@pytest.mark.parametrize("sparse", [False, True])
def test_dropout_does_not_see_which_rows_are_computed(sparse: bool) -> None:
    """The last layer for a few rows, and for all because hidden states are asked for: one loss."""
    rates = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    names = SPARSE if sparse else ("BertForSequenceClassification", "BertForNextSentencePrediction")
    for name in names:
        model, _ = pair(name, sparse_prediction=sparse, **rates)
        model.train()
        case = example(name, [7, 2, 5], 7)
        losses = []
        for states in (False, True):
            torch.manual_seed(5)
            losses.append(model(**case.arguments(output_hidden_states=states)).loss)
        assert_close(losses[0], losses[1])


@pytest.mark.parametrize("name", ["BertForPreTraining", "BertForSequenceClassification"])
def test_gradient_checkpointing(name: str) -> None:
    model, _ = pair(name, hidden_dropout_prob=0.2, sparse_prediction=name in SPARSE)
    model.train()
    case = example(name, [7, 2, 5], 7)
    calls: list[int] = []
    model.bert.encoder.layer[0].register_forward_pre_hook(lambda *_: calls.append(1))
    results = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        calls.clear()
        torch.manual_seed(5)
        loss = model(**case.arguments()).loss
        results.append((gradients(model, loss), len(calls)))
    assert_same_gradients(results[1][0], results[0][0])
    assert [count for _, count in results] == [1, 2]
    assert model.is_gradient_checkpointing
    calls.clear()
    model.eval()(**case.arguments())
    assert len(calls) == 1
    config = bert.BertConfig(**{**vars(model.config), "gradient_checkpointing": True})
    assert getattr(bert, name)(config).is_gradient_checkpointing
    with pytest.raises(ValueError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


STEPS = 200


def batches(vocabulary: int, seed: int = 3) -> list[dict[str, Tensor]]:
    """Ragged texts of two sentences, each of one word said again and again, with words masked."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(STEPS):
        lengths = torch.randint(4, 17, (8,), generator=generator)
        valid = torch.arange(16) < lengths[:, None]
        words = torch.randint(5, vocabulary, (8, 2), generator=generator)
        random = torch.rand(8, generator=generator) < 0.5
        words[~random, 1] = words[~random, 0]  # a sentence that follows says the same
        ids = words[:, (torch.arange(16) > 2).long()]
        chosen = (torch.rand(8, 16, generator=generator) < 0.2) & valid
        chosen[:, 1] = True
        found.append(
            {
                "input_ids": ids.masked_fill(chosen, 3).masked_fill(~valid, 0),
                "attention_mask": valid.long(),
                "token_type_ids": (torch.arange(16) > 2).long().expand(8, 16) * valid,
                "labels": ids.masked_fill(~chosen, -100),
                "next_sentence_label": random.long(),
            }
        )
    return found


def train(model: Any, arguments: list[dict[str, Tensor]]) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    torch.manual_seed(11)
    torch.set_num_threads(1)  # the model is too small for two
    losses = []
    for step in arguments:
        loss = model(**step).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


TINY = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 32, "initializer_range": 0.05}  # fmt: skip


@pytest.mark.unpoisoned
def test_two_hundred_steps_beside_transformers() -> None:
    """Packed and sparse against padded and eager, from the same parameters: one curve."""
    ours, theirs = pair("BertForPreTraining", **TINY, sparse_prediction=True, **NO_DROPOUT)
    steps = batches(12)
    got, expected = train(ours, steps), train(theirs, steps)
    assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) < 1e-4
    assert sum(got[-20:]) / 20 < sum(got[:20]) / 20 - 1.0


@pytest.mark.unpoisoned
def test_two_hundred_steps_with_dropout() -> None:
    """Packed against our own padded run: the same masks, one curve."""
    packed, _ = pair("BertForPreTraining", **TINY)
    padded, _ = pair("BertForPreTraining", **TINY)
    padded.load_state_dict(packed.state_dict())
    steps = batches(12)
    got = train(packed, steps)
    expected = train(padded, [widened(step, 3) for step in steps])
    assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) < 1e-4
    assert sum(got[-20:]) / 20 < sum(got[:20]) / 20 - 0.5
