"""The snippets of model cards, each with the one line added: the same results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ctxfast
from tests.integrations.lifecycle_cases import fused
from tests.integrations.model_cases import close
from tests.integrations.model_files import TEXTS, save

transformers = pytest.importorskip("transformers")
LABELS = {0: "low", 1: "middle", 2: "high"}
PIPELINES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "feature-extraction": ("Model", TEXTS, {"padding": True}),
    "text-classification": ("ForSequenceClassification", TEXTS, {"top_k": None}),
    "token-classification": ("ForTokenClassification", TEXTS, {"aggregation_strategy": "simple"}),
    "fill-mask": ("ForMaskedLM", [f"[MASK] {text}" for text in TEXTS], {}),
}


def same(got: Any, want: Any) -> None:
    """The same nested lists and dictionaries, numbers within tolerance."""
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for name in want:
            same(got[name], want[name])
    elif isinstance(want, list | tuple):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            same(a, b)
    elif isinstance(want, float):
        assert float(got) == pytest.approx(want, abs=2e-5, rel=2e-5)
    else:
        assert got == want or float(got) == pytest.approx(float(want), abs=2e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("task", PIPELINES)
def test_pipeline(task: str, batch_size: int, tmp_path: Path) -> None:
    head, texts, options = PIPELINES[task]
    labels = {} if head in ("Model", "ForMaskedLM") else {"id2label": LABELS}
    folder = str(save(tmp_path, head=head, **labels))
    theirs, ours = (transformers.pipeline(task, folder, device="cpu") for _ in range(2))
    assert ctxfast.accelerate(ours) is ours
    if task == "feature-extraction":
        # What a pipeline returns for padding is zero; the tokens are compared.
        results = [
            pipeline(texts, batch_size=1, return_tensors=True) for pipeline in (ours, theirs)
        ]
        for a, b in zip(*results, strict=True):
            close(a, b)
        same(ours(texts), theirs(texts))
    else:
        same(
            ours(texts, batch_size=batch_size, **options),
            theirs(texts, batch_size=batch_size, **options),
        )
    assert fused(ours.model)


def test_question_answering(tmp_path: Path) -> None:
    """As the cards have it since the pipeline is gone: the span between the two largest logits."""
    folder = save(tmp_path, head="ForQuestionAnswering")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder)
    call = tokenizer(["where was anna ?"] * 5, TEXTS, padding=True, return_tensors="pt")
    kept = call["attention_mask"].bool()
    answers = []
    for accelerated in (False, True):
        if accelerated:
            ctxfast.accelerate(model)
        with torch.no_grad():
            outputs = model(**call)
        spans = []
        for row in range(len(TEXTS)):
            start, end = (
                int(x[row, kept[row]].argmax()) for x in (outputs.start_logits, outputs.end_logits)
            )
            spans.append(tokenizer.decode(call["input_ids"][row, start : end + 1]))
        answers.append((spans, outputs.start_logits[kept], outputs.end_logits[kept]))
    assert answers[0][0] == answers[1][0] and any(answers[0][0])
    close(answers[1][1], answers[0][1])
    close(answers[1][2], answers[0][2])
    assert fused(model)


def test_question_answering_pipeline(tmp_path: Path) -> None:
    from transformers.pipelines import SUPPORTED_TASKS

    if "question-answering" not in SUPPORTED_TASKS:
        pytest.skip("this transformers has no pipeline for question answering")
    folder = str(save(tmp_path, head="ForQuestionAnswering"))
    pipelines = [transformers.pipeline("question-answering", folder) for _ in range(2)]
    ctxfast.accelerate(pipelines[0])
    same(*(p(question="where was anna ?", context=TEXTS[2]) for p in pipelines))


def test_mean_pooling_of_model_cards(tmp_path: Path) -> None:
    folder = save(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder)

    def mean_pooling(output: Any, mask: torch.Tensor) -> torch.Tensor:
        wide = mask.unsqueeze(-1).expand(output[0].size()).float()
        return (output[0] * wide).sum(1) / wide.sum(1).clamp(min=1e-9)

    call = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    results = []
    for accelerated in (False, True):
        if accelerated:
            ctxfast.accelerate(model)
        with torch.no_grad():
            results.append(mean_pooling(model(**call), call["attention_mask"]))
    close(results[1], results[0])
