"""ctxfast's own classes, where the workload is about other people's: how much of their speed `accelerate` reaches."""

from __future__ import annotations

from collections.abc import Iterator

import ctxfast

from ..case import DTYPES, Candidate, Case
from . import accelerated

NAME = "ctxfast.bert"


def version() -> str:
    return ctxfast.__version__


def accelerated_bert(case: Case) -> Iterator[Candidate]:
    """`ctxfast.bert.BertModel`."""
    from ctxfast.bert import BertModel

    for dtype in case.dtypes:
        model = BertModel.from_pretrained(
            case.inputs.directory, dtype=DTYPES[dtype], add_pooling_layer=False
        )
        run = accelerated.forward(case.inputs, model)
        yield Candidate(NAME, f"{NAME}.BertModel", dtype, run=run, result=case.inputs.valid)
