"""One line more in programs with sentence-transformers: the same vectors and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ctxfast
from tests.integrations.lifecycle_cases import fused, notes
from tests.integrations.model_cases import close
from tests.integrations.model_files import TEXTS, save

sentence_transformers = pytest.importorskip("sentence_transformers")
PAIRS = [(a, b) for a in TEXTS[:3] for b in TEXTS[2:]]


def loaded(kind: str, folder: Path, **options: Any) -> Any:
    cls = getattr(sentence_transformers, kind)
    return cls(str(folder), device="cpu", local_files_only=True, **options)


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet", "roberta"])
def test_sentence_transformer(family: str, tmp_path: Path) -> None:
    folder = save(tmp_path, family)
    theirs, ours = (loaded("SentenceTransformer", folder) for _ in range(2))
    assert ctxfast.accelerate(ours) is ours
    assert fused(ours)
    for options in ({}, {"normalize_embeddings": True}, {"output_value": "token_embeddings"}):
        got, want = (
            model.encode(TEXTS, convert_to_tensor="output_value" not in options, **options)
            for model in (ours, theirs)
        )
        for a, b in zip(got, want, strict=True):
            close(a, b)
    assert ours.encode(TEXTS[0]).dtype == np.float32
    ctxfast.restore(ours)
    assert np.array_equal(ours.encode(TEXTS), theirs.encode(TEXTS))


def test_fine_tuning_of_a_sentence_transformer(tmp_path: Path) -> None:
    folder = save(tmp_path)
    gradients = []
    for accelerated in (True, False):
        model = loaded("SentenceTransformer", folder).train()
        if accelerated:
            ctxfast.accelerate(model)
        features = (
            model.preprocess(TEXTS) if hasattr(model, "preprocess") else model.tokenize(TEXTS)
        )
        vectors = torch.nn.functional.normalize(model(features)["sentence_embedding"])
        (vectors @ vectors.T).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        close(gradient, gradients[1][name], 1e-4)


def test_cross_encoder(tmp_path: Path) -> None:
    folder = save(tmp_path, head="ForSequenceClassification", num_labels=1)
    theirs, ours = (loaded("CrossEncoder", folder) for _ in range(2))
    ctxfast.accelerate(ours)
    assert fused(ours)
    close(*(torch.from_numpy(model.predict(PAIRS)) for model in (ours, theirs)))
    ranks = [model.rank(TEXTS[0], TEXTS[1:]) for model in (ours, theirs)]
    assert [r["corpus_id"] for r in ranks[0]] == [r["corpus_id"] for r in ranks[1]]


def test_sparse_encoder(tmp_path: Path) -> None:
    folder = save(tmp_path, head="ForMaskedLM")
    theirs, ours = (loaded("SparseEncoder", folder) for _ in range(2))
    ctxfast.accelerate(ours)
    assert fused(ours)
    close(*(model.encode(TEXTS).to_dense() for model in (ours, theirs)))


def test_other_backends_are_refused(tmp_path: Path) -> None:
    model = loaded("SentenceTransformer", save(tmp_path))
    model.backend = "onnx"
    with pytest.raises(ValueError, match="runs on onnx, not on PyTorch"):
        ctxfast.accelerate(model)


@pytest.mark.full
def test_encode_on_two_processes(tmp_path: Path) -> None:
    model = loaded("SentenceTransformer", save(tmp_path))
    wanted = model.encode(TEXTS)
    ctxfast.accelerate(model)
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        got = model.encode(TEXTS, pool=pool, chunk_size=2)
    finally:
        model.stop_multi_process_pool(pool)
    close(torch.from_numpy(got), torch.from_numpy(wanted))


def minilm() -> str:
    from ctxfast import demo

    try:
        return str(demo.find_weights())
    except FileNotFoundError as error:
        pytest.skip(str(error))


def messages(data: Path, count: int) -> list[str]:
    lines = (data / "sms_spam" / "SMSSpamCollection").read_text(encoding="utf-8").splitlines()
    return [line.split("\t", 1)[1] for line in lines[:: len(lines) // count][:count]]


def test_minilm_on_real_messages(data: Path) -> None:
    """Every token of every message as transformers computes it for the message alone; then the vectors."""
    transformers = pytest.importorskip("transformers")
    folder, texts = minilm(), messages(data, 48)
    theirs, ours = (loaded("SentenceTransformer", Path(folder)) for _ in range(2))
    ctxfast.accelerate(ours)
    assert "6 of 6 layers fused" in notes(ours)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    bert = transformers.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        call = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        states = ctxfast.accelerate(bert)(**call).last_hidden_state
        ctxfast.restore(bert)
        for row, text in enumerate(texts):
            alone = bert(**tokenizer(text, truncation=True, return_tensors="pt")).last_hidden_state
            count = alone.shape[1]
            close(states[row, :count], alone[0])
            assert not states[row, count:].any()
        close(*(model.encode(texts, convert_to_tensor=True) for model in (ours, theirs)))
        low = ctxfast.accelerate(ours, dtype=torch.bfloat16).encode(texts, convert_to_tensor=True)
        assert low.dtype == torch.float32
        cosines = (low * theirs.encode(texts, convert_to_tensor=True)).sum(1)
        assert cosines.min() > 0.999
