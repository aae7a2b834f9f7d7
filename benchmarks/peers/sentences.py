"""sentence-transformers: its Transformer module on token ids, with the torch, ONNX and OpenVINO backends.

Its pooling and its sorting of texts by length belong to a run from text; here it gets length buckets as others do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..case import Candidate, Case, Unavailable
from ..workloads.bert import Batch, BertInputs
from . import huggingface
from .padded import Forward, variants

NAME = "sentence-transformers"
BACKENDS = ("torch", "onnx", "openvino")


def version() -> str:
    import sentence_transformers

    return sentence_transformers.__version__


def bert(case: Case) -> Iterator[Candidate]:
    """Raises Unavailable after the backends that work, with the reason for each that does not."""
    reasons = []
    for backend in BACKENDS:
        try:
            forward = _forward(_load(case.inputs, backend))
        except Exception as error:  # its backends need packages of their own
            reasons.append(f"{backend} backend: {' '.join(str(error).split())}")
            continue
        yield from variants(NAME, f"{NAME} {backend}", "float32", case, forward)
    if reasons:
        raise Unavailable("; ".join(reasons))


def _load(inputs: BertInputs, backend: str) -> Any:
    from sentence_transformers.models import Transformer

    with huggingface.quiet():
        module = Transformer(
            str(inputs.directory), backend=backend, model_args={"local_files_only": True}
        )
    return module.eval()


def _forward(module: Any) -> Forward:
    def forward(batch: Batch) -> Tensor:
        features = {"input_ids": batch.ids, "attention_mask": batch.mask.long()}
        return module(features)["token_embeddings"]

    return forward
