"""`ctxfast.accelerate` on the models of transformers and sentence-transformers, for the peer ctxfast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import ctxfast
from ctxfast.ops.linear_int8 import int8_unavailable_reason

from ..case import DTYPES, Candidate, Case
from ..workloads.accelerate import TextInputs
from ..workloads.bert import BertInputs
from ..workloads.bert_pretraining import NO_DROPOUT
from ..workloads.fine_tuning import FineTuningInputs
from . import huggingface, sentences

NAME = "ctxfast"
LABEL = "ctxfast.accelerate"


def text_vectors(case: Case) -> Iterator[Candidate]:
    """An accelerated SentenceTransformer; in a narrower type the layers compute, the parameters stay float32."""
    inputs: TextInputs = case.inputs
    settings: list[tuple[str, dict[str, Any]]] = [
        (dtype, {"dtype": DTYPES[dtype]}) for dtype in case.dtypes
    ]
    if int8_unavailable_reason() is None:
        settings.append(("int8", {"quantization": "int8"}))
    for dtype, options in settings:
        model = ctxfast.accelerate(sentences.load_model(inputs), **options)
        yield Candidate(NAME, LABEL, dtype, run=_encode(inputs, model), result=lambda x: x)


def _encode(inputs: TextInputs, model: Any) -> Any:
    return lambda: inputs.encode(model)


def accelerated_bert(case: Case) -> Iterator[Candidate]:
    """transformers' BertModel, with what its check costs."""
    inputs: BertInputs = case.inputs
    for dtype in case.dtypes:
        model = ctxfast.accelerate(huggingface.load(inputs, dtype, "sdpa"))
        run = forward(inputs, model)
        run()
        yield Candidate(
            NAME,
            LABEL,
            dtype,
            run=run,
            result=inputs.valid,
            detail=f"the check of the modules takes {_check_microseconds(model, run):.0f} us a call",
        )


def forward(inputs: BertInputs, model: Any) -> Callable[[], list[Tensor]]:
    """Last hidden states of every batch from padded ids and mask."""
    masks = [batch.mask.long() for batch in inputs.batches]

    def run() -> list[Tensor]:
        return [
            model(input_ids=batch.ids, attention_mask=mask).last_hidden_state
            for batch, mask in zip(inputs.batches, masks, strict=True)
        ]

    return run


def _check_microseconds(model: Any, run: Callable[[], object], calls: int = 9) -> float:
    """What it costs to see that nobody has changed the model since the last call, whose weights have driven what is
    looked at out of the caches: the median."""
    state = vars(model)["_ctxfast"]
    checks = [state.certificate.holds]
    if state.stack is not None:
        checks.append(state.stack.snapshot.parameters_hold)
    times = []
    for _ in range(calls):
        run()
        start = time.perf_counter()
        for check in checks:
            check()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def fine_tuning(case: Case) -> Iterator[Candidate]:
    """An accelerated BertForSequenceClassification, with PEFT's adapters where the case has them."""
    inputs: FineTuningInputs = case.inputs

    def load(**changes: float) -> Any:
        with torch.inference_mode(False):
            model = huggingface.load_classifier(inputs, **changes)
            return inputs.prepare(ctxfast.accelerate(model))

    yield Candidate(
        NAME,
        LABEL,
        "float32",
        run=inputs.step(load()),
        result=lambda loss: inputs.result(load(**NO_DROPOUT)),
    )
