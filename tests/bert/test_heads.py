"""Every head against transformers' in float32: outputs, losses, gradients, the arguments people pass."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from ctxfast import bert  # noqa: E402
from tests.bert.head_cases import (  # noqa: E402
    HEADS,
    POOLED,
    Example,
    assert_close,
    assert_same_gradients,
    assert_same_outputs,
    example,
    gradients,
    pair,
)
from tests.bert.model_cases import SMALL  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread(seeded: None) -> None:
    """These models are too small for two."""
    torch.set_num_threads(1)


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def alone(model: Any, name: str, case: Example) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """transformers' span loss of each text alone, averaged over the texts, and its gradients."""
    losses = []
    for b, n in enumerate(case.lengths):
        inputs = {key: x[b : b + 1, :n] for key, x in case.inputs.items()}
        labels = {key: x[b : b + 1] for key, x in case.labels.items()}
        losses.append(model(**inputs, **labels).loss)
    loss = torch.stack(losses).mean()
    return loss, gradients(model, loss)


def compare(ours: Any, theirs: Any, name: str, case: Example, mode: str = "train") -> None:
    """Outputs, loss and every gradient, in training and in evaluation."""
    getattr(ours, mode)(), getattr(theirs, mode)()
    got, expected = ours(**case.arguments()), theirs(**case.arguments())
    wanted = gradients(theirs, expected.loss)
    if name == "BertForQuestionAnswering":
        expected.loss, wanted = alone(theirs, name, case)
    assert_same_outputs(got, expected, case.valid)
    assert_same_gradients(gradients(ours, got.loss), wanted)


@pytest.mark.parametrize("name", HEADS)
def test_names_and_shapes_are_those_of_transformers(name: str) -> None:
    ours, theirs = pair(name, num_labels=3 if "Question" not in name else 2)
    expected = {n: t.shape for n, t in theirs.state_dict().items()}
    assert {n: t.shape for n, t in ours.state_dict().items()} == expected
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", HEADS)
def test_random_configurations(name: str, seed: int) -> None:
    rng = random.Random(f"{name} {seed}")
    torch.manual_seed(seed)
    heads, head_size = rng.choice([1, 2, 3]), rng.choice([8, 10, 16, 33])
    labels = 2 if "Question" in name else rng.choice([2, 3, 5])
    ours, theirs = pair(
        name,
        hidden_size=heads * head_size,
        num_attention_heads=heads,
        num_hidden_layers=rng.choice([0, 1, 3]) if seed else 2,
        intermediate_size=rng.choice([7, 32, 100]),
        hidden_act=rng.choice(["gelu", "gelu_new", "relu", "silu"]),
        initializer_range=0.1,
        num_labels=labels,
        tie_word_embeddings=seed != 2,
        **NO_DROPOUT,
    )
    width = rng.randint(4, 20)
    lengths = [rng.randint(1, width) for _ in range(rng.choice([1, 2, 5]))]
    compare(ours, theirs, name, example(name, lengths, width, num_labels=labels))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("mask", ["ones", "none", "bool", "float"])
@pytest.mark.parametrize("name", HEADS)
def test_masks(name: str, mask: str, mode: str) -> None:
    ours, theirs = pair(name, **NO_DROPOUT)
    case = example(name, [5, 5] if mask in ("ones", "none") else [5, 2], 5)
    if mask in ("ones", "none"):
        case.valid = torch.ones_like(case.valid)
        case.lengths = [5] * len(case.lengths)
        case.inputs["attention_mask"] = torch.ones_like(case.inputs["attention_mask"])
    if mask == "none":
        del case.inputs["attention_mask"]
    elif mask != "ones":
        dtype = torch.bool if mask == "bool" else torch.float32
        case.inputs["attention_mask"] = case.inputs["attention_mask"].to(dtype)
    compare(ours, theirs, name, case, mode)


def flipped(case: Example) -> Example:
    """The same texts with their padding on the left, and positions that count from their first tokens."""
    width = case.valid.shape[1]
    shift = torch.tensor([width - n for n in case.lengths])
    places = (torch.arange(width) - shift[:, None]) % width

    def roll(x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, width)
        return flat.gather(1, places[: len(flat)]).view(x.shape)

    inputs = {key: roll(x) for key, x in case.inputs.items()}
    shape = inputs["input_ids"].shape
    inputs["position_ids"] = (torch.arange(width) - shift[:, None]).clamp(min=0).view(shape)
    labels = {
        key: roll(x) if x.dim() == 2 else x + shift if "positions" in key else x
        for key, x in case.labels.items()
    }
    return Example(inputs, labels, roll(case.valid), case.lengths)


@pytest.mark.parametrize("name", HEADS)
def test_padding_on_the_left(name: str) -> None:
    """The same loss and gradients as with padding on the right."""
    ours, theirs = pair(name, **NO_DROPOUT)
    case = example(name, [5, 2, 4], 6)
    right, left = ours(**case.arguments()), ours(**flipped(case).arguments())
    assert_close(left.loss, right.loss)
    expected = gradients(ours, right.loss)
    assert_same_gradients(gradients(ours, left.loss), expected)
    if name not in POOLED | {"BertForPreTraining", "BertForQuestionAnswering"}:
        compare(ours, theirs, name, flipped(case))


@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("name", [n for n in HEADS if n != "BertForMultipleChoice"])
def test_four_dimensional_masks(name: str, kind: str) -> None:
    ours, theirs = pair(name, **NO_DROPOUT)
    case = example(name, [5, 5, 5], 5)
    mask = torch.rand(3, 1, 5, 5) < 0.6
    mask[..., 0] = True
    case.inputs["attention_mask"] = mask if kind == "bool" else torch.randn(3, 4, 5, 5)
    case.valid = torch.ones(3, 5, dtype=torch.bool)
    ours.train(), theirs.train()
    got, expected = ours(**case.arguments()), theirs(**case.arguments())
    assert_same_outputs(got, expected, case.valid)
    assert_same_gradients(gradients(ours, got.loss), gradients(theirs, expected.loss))


@pytest.mark.parametrize("name", HEADS)
def test_given_positions_and_embeddings(name: str) -> None:
    ours, theirs = pair(name, **NO_DROPOUT)
    case = example(name, [4, 6], 6)
    ids = case.inputs.pop("input_ids")
    case.inputs["position_ids"] = torch.randint(24, ids.shape)
    case.inputs["inputs_embeds"] = torch.randn(*ids.shape, 32)
    compare(ours, theirs, name, case)
    leaves = [case.inputs["inputs_embeds"].clone().requires_grad_() for _ in range(2)]
    for model, leaf in zip((ours, theirs), leaves, strict=True):
        if name != "BertForQuestionAnswering":
            model(**case.arguments(inputs_embeds=leaf)).loss.backward()
        else:
            alone(model, name, Example({**case.inputs, "inputs_embeds": leaf}, case.labels,
                                       case.valid, case.lengths))  # fmt: skip
    assert_close(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("name", HEADS)
def test_hidden_states_and_attentions(name: str) -> None:
    ours, theirs = pair(name)
    theirs.set_attn_implementation("eager")
    case = example(name, [5, 2], 5)
    options = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        got, expected = ours(**case.arguments(**options)), theirs(**case.arguments(**options))
        plain = ours(**case.arguments())
    if name == "BertForQuestionAnswering":
        expected.loss = got.loss
    assert_same_outputs(got, expected, case.valid)
    for mine, other in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert_close(mine[case.valid], other[case.valid])
    for mine, other in zip(got.attentions, expected.attentions, strict=True):
        rows = case.valid[:, None, :, None]
        assert_close(mine, other * rows)
    for field in plain:
        assert_close(plain[field], got[field], field)


@pytest.mark.parametrize("name", HEADS)
def test_tuples_and_absent_labels(name: str) -> None:
    ours, theirs = pair(name)
    case = example(name, [5, 2], 5)
    with torch.no_grad():
        fields = ours(**case.arguments())
        assert isinstance(ours(**case.arguments(), return_dict=False), tuple)
        assert ours(**case.arguments(), return_dict=False)[0] == fields.loss == fields[0]
        unlabelled, expected = ours(**case.inputs), theirs(**case.inputs)
        assert_same_outputs(unlabelled, expected, case.valid)
        assert unlabelled.loss is None
        for label in case.labels:
            if len(case.labels) == 2:  # one kind of labels alone gives no loss
                assert ours(**case.inputs, **{label: case.labels[label]}).loss is None
        ours.config.return_dict = False
        assert isinstance(ours(**case.inputs), tuple)


@pytest.mark.parametrize("name", HEADS)
def test_the_last_layer_is_computed_for_the_rows_of_the_head(name: str) -> None:
    sparse = name in ("BertForPreTraining", "BertForMaskedLM")
    ours, _ = pair(name, sparse_prediction=sparse)
    rows: list[int] = []
    for layer in ours.bert.encoder.layer:
        layer.output.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    case = example(name, [20, 20, 18, 21], 21)
    tokens = sum(-(-n // 1) for n in case.lengths)
    everything = -(-tokens // 16) * 16
    ours.train()(**case.arguments())
    few = name in POOLED or sparse
    assert rows[0] == everything
    assert (rows[1] < everything) == few, rows
    rows.clear()
    ours(**case.arguments(), output_hidden_states=True)
    assert rows == [everything] * 2


@pytest.mark.parametrize("problem", ["regression", "regression of 3", "single", "multi"])
def test_problem_types(problem: str) -> None:
    count = {"regression": 1, "regression of 3": 3, "single": 4, "multi": 4}[problem]
    given = "regression" if problem == "regression of 3" else None
    for explicit in (True, False):
        ours, theirs = pair(
            "BertForSequenceClassification", num_labels=count, problem_type=given, **NO_DROPOUT
        )
        case = example("BertForSequenceClassification", [5, 2, 4], 5)
        case.labels["labels"] = {
            "regression": torch.randn(3),
            "regression of 3": torch.randn(3, 3),
            "single": torch.randint(4, (3,)),
            "multi": torch.randint(2, (3, 4)).float(),
        }[problem]
        if explicit:
            name = {"single": "single_label_classification", "multi": "multi_label_classification"}
            ours.config.problem_type = theirs.config.problem_type = name.get(problem, "regression")
        compare(ours, theirs, "BertForSequenceClassification", case)
        assert ours.config.problem_type == theirs.config.problem_type is not None


def test_regression_of_one_takes_a_column_and_integers() -> None:
    ours, _ = pair("BertForSequenceClassification", num_labels=1)
    case = example("BertForSequenceClassification", [5, 2, 4], 5)
    with torch.no_grad():
        losses = [ours(**case.inputs, labels=y).loss for y in (
            torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1, 2, 3])
        )]  # fmt: skip
    assert losses[0] == losses[1] == losses[2]


def test_labels_in_padding_count_for_nothing() -> None:
    for name in ("BertForMaskedLM", "BertForTokenClassification", "BertForPreTraining"):
        ours, _ = pair(name)
        case = example(name, [5, 2], 6)
        expected = ours(**case.arguments()).loss
        case.labels["labels"][~case.valid] = 1
        assert torch.equal(ours(**case.arguments()).loss, expected)
        case.labels["labels"][:] = -100
        assert ours(**case.arguments()).loss.isnan()


def test_spans_that_are_outside_the_text() -> None:
    """As transformers treats each text alone: below 0 is 0, at the end or behind it is ignored."""
    ours, theirs = pair("BertForQuestionAnswering")
    case = example("BertForQuestionAnswering", [5, 3, 4, 4], 6)
    case.labels["start_positions"] = torch.tensor([-3, 3, 9, 2])
    case.labels["end_positions"] = torch.tensor(
        [[4], [1], [5], [0]]
    )  # a column, as DataParallel gives
    starts, ends = [], []
    with torch.no_grad():
        got = ours(**case.arguments())
        for b, (n, start, end) in enumerate(
            zip(case.lengths, (0, None, None, 2), (4, 1, None, 0), strict=True)
        ):
            output = theirs(**{key: x[b : b + 1, :n] for key, x in case.inputs.items()})
            for place, logits, losses in (
                (start, output.start_logits, starts),
                (end, output.end_logits, ends),
            ):
                if place is not None:
                    losses.append(F.cross_entropy(logits, torch.tensor([place])))
        wide = {key: F.pad(x, (0, 3)) for key, x in case.inputs.items()}
        assert_close(ours(**wide, **case.labels).loss, got.loss)
    assert_close(got.loss, (torch.stack(starts).mean() + torch.stack(ends).mean()) / 2)
    best = got.start_logits.argmax(1)
    assert (best < torch.tensor(case.lengths)).all()


@pytest.mark.parametrize("name", HEADS)
def test_a_row_without_tokens_and_no_rows(name: str) -> None:
    ours, _ = pair(name, **NO_DROPOUT)
    case = example(name, [3, 4], 5)
    with torch.no_grad():
        expected = ours(**case.inputs)
        field = next(iter(expected))
        mask = case.inputs["attention_mask"].clone()
        mask[0] = 0
        got = ours(**{**case.inputs, "attention_mask": mask})
        assert_close(got[field][1:], expected[field][1:])
        nothing = ours(**{**case.inputs, "attention_mask": torch.zeros_like(mask)})
        assert nothing[field].isfinite().all()
        empty = ours(**{key: x[:0] for key, x in case.inputs.items()})
        assert empty[field].shape == (0, *expected[field].shape[1:])


BAD = [
    ("BertForMaskedLM", "labels", torch.ones(2, 4, dtype=torch.long), ValueError, r"labels must be \[2, 5\]"),
    ("BertForMaskedLM", "labels", torch.ones(2, 5), TypeError, "labels must be integers, got torch.float32"),
    ("BertForPreTraining", "next_sentence_label", torch.ones(3).long(), ValueError, r"must be \[2\]"),
    ("BertForNextSentencePrediction", "labels", torch.ones(2), TypeError, "must be integers"),
    ("BertForTokenClassification", "labels", torch.ones(2).long(), ValueError, r"labels must be \[2, 5\]"),
    ("BertForSequenceClassification", "labels", torch.ones(3).long(), ValueError, r"labels must be \[2\]"),
    ("BertForSequenceClassification", "labels", torch.ones(3, 2), ValueError, r"must be \(2, 2\)"),
    ("BertForQuestionAnswering", "start_positions", torch.ones(3).long(), ValueError, "start_positions"),
    ("BertForMultipleChoice", "labels", torch.ones(6).long(), ValueError, r"labels must be \[2\]"),
    ("BertForMultipleChoice", "input_ids", torch.ones(2, 5).long(), ValueError, "batch, choices, sequence"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "argument", "value", "error", "message"), BAD)
def test_bad_arguments(name: str, argument: str, value: Any, error: Any, message: str) -> None:
    ours, _ = pair(name)
    case = example(name, [5, 2], 5)
    with pytest.raises(error, match=message) as raised:
        ours(**case.arguments(**{argument: value}))
    assert name in str(raised.value) and "\n" not in str(raised.value)


def test_spans_have_two_ends() -> None:
    with pytest.raises(ValueError, match="num_labels must be 2"):
        bert.BertForQuestionAnswering(bert.BertConfig(**SMALL, num_labels=3))


def test_a_transformers_configuration_is_accepted() -> None:
    import transformers

    config = transformers.BertConfig(**SMALL, num_labels=3)
    assert bert.BertForTokenClassification(config).classifier.out_features == 3
