"""fastembed: ONNX Runtime behind a tokenizer. It takes text, so a case of token ids cannot be given to it."""

from __future__ import annotations

from collections.abc import Iterator

from ..case import Candidate, Case, Unavailable

NAME = "fastembed"


def version() -> str:
    import fastembed

    return fastembed.__version__


def bert(case: Case) -> Iterator[Candidate]:
    raise Unavailable("it takes text, not token ids; its engine is measured as onnxruntime")
    yield
