"""sentence-transformers: its Transformer module on token ids, with the torch, ONNX and OpenVINO backends.

From text it pools and sorts by length itself; from token ids it gets length buckets as others do.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import Any

from torch import Tensor

from ..case import DTYPES, Candidate, Case, Unavailable
from ..workloads.accelerate import TextInputs
from ..workloads.bert import Batch, BertInputs
from . import huggingface
from .padded import Forward, variants

NAME = "sentence-transformers"
BACKENDS = ("torch", "onnx", "openvino")

# What each backend is made of, and which transformers the release with the highest bound asks for.
_PACKAGES = {
    "onnx": ("optimum-onnx", "0.1.0", "4.58"),
    "openvino": ("optimum-intel", "2.2.0", "5.6"),
}


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
            reasons.append(_reason(backend, error))
            continue
        yield from variants(NAME, f"{NAME} {backend}", "float32", case, forward)
    if reasons:
        raise Unavailable("; ".join(reasons))


def text_vectors(case: Case) -> Iterator[Candidate]:
    """Text to vectors with every backend, the one of torch in bfloat16 too. Raises as `bert` does."""
    inputs: TextInputs = case.inputs
    reasons = []
    for backend in BACKENDS:
        try:
            model = load_model(inputs, backend)
        except Exception as error:
            reasons.append(_reason(backend, error))
            continue
        for dtype in case.dtypes if backend == "torch" else ("float32",):
            yield _text_vectors(inputs, model.to(DTYPES[dtype]), f"{NAME} {backend}", dtype)
            model = load_model(inputs, backend) if backend == "torch" else model
    if reasons:
        raise Unavailable("; ".join(reasons))


def load_model(inputs: TextInputs, backend: str = "torch") -> Any:
    """The SentenceTransformer of a case."""
    from sentence_transformers import SentenceTransformer

    with huggingface.quiet():
        return SentenceTransformer(
            str(inputs.directory), device="cpu", backend=backend, local_files_only=True
        )


def _reason(backend: str, error: Exception) -> str:
    """Why a backend does not load: what it says, and what its package would need where that is missing."""
    reason = f"{backend} backend: {' '.join(str(error).split())}"
    package, release, bound = _PACKAGES.get(backend, ("", "", ""))
    if not package or _version(package) is not None:
        return reason
    return (
        f"{reason} ({package} is not installed; its release {release} requires transformers < {bound}, "
        f"here is {_version('transformers')})"
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _text_vectors(inputs: TextInputs, model: Any, label: str, dtype: str) -> Candidate:
    return Candidate(
        NAME,
        label,
        dtype,
        run=lambda: inputs.encode(model),
        result=lambda vectors: vectors.float(),
        layout="padded",
    )


def _load(inputs: BertInputs, backend: str) -> Any:
    from sentence_transformers.models import Transformer

    with huggingface.quiet():
        module = Transformer(
            str(inputs.directory), backend=backend, model_kwargs={"local_files_only": True}
        )
    return module.eval()


def _forward(module: Any) -> Forward:
    def forward(batch: Batch) -> Tensor:
        features = {"input_ids": batch.ids, "attention_mask": batch.mask.long()}
        return module(features)["token_embeddings"]

    return forward
