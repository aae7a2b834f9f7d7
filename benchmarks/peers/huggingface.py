"""transformers: attn_implementation "sdpa" and "eager", the weights from the same directory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..case import DTYPES, Candidate, Case
from ..workloads.bert import Batch, BertInputs
from ..workloads.bert_pretraining import NO_DROPOUT, PretrainingInputs, checked_step, step
from ..workloads.fine_tuning import FineTuningInputs
from .padded import Forward, variants

NAME = "transformers"
DEVICES = ("cpu", "cuda")


def version() -> str:
    import transformers

    return transformers.__version__


@contextmanager
def quiet() -> Iterator[None]:
    """Without the loading bar and its report: stdout and stderr belong to the benchmark."""
    from transformers.utils import logging as its_logging

    level, bars = its_logging.get_verbosity(), its_logging.is_progress_bar_enabled()
    its_logging.set_verbosity(logging.ERROR)
    its_logging.disable_progress_bar()
    try:
        yield
    finally:
        its_logging.set_verbosity(level)
        if bars:
            its_logging.enable_progress_bar()


def load(inputs: BertInputs, dtype: str, attention: str) -> Any:
    """The transformers model of a case, in eval mode."""
    from transformers import BertModel

    with quiet():
        model = BertModel.from_pretrained(
            inputs.directory,
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            add_pooling_layer=False,
            local_files_only=True,
        )
    return model.to(inputs.device).eval()


def bert(case: Case) -> Iterator[Candidate]:
    for dtype in case.dtypes:
        forward = _forward(load(case.inputs, dtype, "sdpa"))
        first = dtype == case.dtypes[0]  # padded batches of this one are what most people run
        yield from variants(
            NAME, "transformers sdpa", dtype, case, forward, lesser=False if first else None
        )
    forward = _forward(load(case.inputs, case.dtypes[0], "eager"))
    yield from variants(
        NAME,
        "transformers eager",
        case.dtypes[0],
        case,
        forward,
        layouts=("padded",),
        lesser=True,
    )


def accelerated_bert(case: Case) -> Iterator[Candidate]:
    for dtype in case.dtypes:
        forward = _forward(load(case.inputs, dtype, "sdpa"))
        yield from variants(NAME, "transformers sdpa", dtype, case, forward, layouts=("padded",))


def load_classifier(inputs: FineTuningInputs, **changes: float) -> Any:
    """BertForSequenceClassification, sdpa, with changes to its configuration."""
    from transformers import BertForSequenceClassification

    with quiet():
        return BertForSequenceClassification.from_pretrained(
            inputs.directory, attn_implementation="sdpa", local_files_only=True, **changes
        )


def fine_tuning(case: Case) -> Iterator[Candidate]:
    """BertForSequenceClassification on the padded batch, with PEFT's adapters where the case has them."""
    import torch

    inputs: FineTuningInputs = case.inputs

    def load(**changes: float) -> Any:
        with torch.inference_mode(False):
            return inputs.prepare(load_classifier(inputs, **changes))

    yield Candidate(
        NAME,
        "transformers sdpa",
        "float32",
        run=inputs.step(load()),
        result=lambda loss: inputs.result(load(**NO_DROPOUT)),
        layout="padded",
    )


def _forward(model: Any) -> Forward:
    def forward(batch: Batch) -> Tensor:
        outputs = model(input_ids=batch.ids, attention_mask=batch.mask.long())
        return outputs.last_hidden_state

    return forward


def bert_pretraining(case: Case) -> Iterator[Candidate]:
    """BertForPreTraining, sdpa, on the padded batch."""
    import torch
    from transformers import BertForPreTraining

    inputs: PretrainingInputs = case.inputs

    def load(**changes: float) -> Any:
        with quiet(), torch.inference_mode(False):
            return BertForPreTraining.from_pretrained(
                inputs.directory, attn_implementation="sdpa", local_files_only=True, **changes
            )

    yield Candidate(
        NAME,
        "transformers sdpa",
        "float32",
        run=step(load(), inputs),
        result=lambda loss: checked_step(load(**NO_DROPOUT), inputs),
        layout="padded",
    )
