"""torch.compile of the transformers model with freezing, which lets Inductor pack the weights for oneDNN;
on a GPU without it.

The padded batch compiles for its exact shapes; buckets compile once with dynamic shapes. Minutes of
compilation: only on request.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..case import Candidate, Case, Unavailable
from ..workloads.bert import Batch
from . import huggingface
from .padded import Forward, variants

NAME = "torch.compile"
DEVICES = ("cpu", "cuda")
DEFAULT = False


def version() -> str:
    huggingface.version()  # the model comes from there
    from torch._inductor import config

    assert hasattr(config, "freezing")
    find_compiler()
    return torch.__version__


def find_compiler() -> None:
    """Raises Unavailable where Inductor has no C++ compiler."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError) as error:
        raise Unavailable(f"no C++ compiler: {error}") from None


def bert(case: Case) -> Iterator[Candidate]:
    for layout, dynamic in (("padded", False), ("buckets", True)):
        model = huggingface.load(case.inputs, "float32", "sdpa").requires_grad_(False)
        forward = _forward(torch.compile(model, dynamic=dynamic))
        yield from variants(
            NAME, "torch.compile, freezing", "float32", case, forward, layouts=(layout,)
        )


def text_vectors(case: Case) -> Iterator[Candidate]:
    """`SentenceTransformer.compile(dynamic=True)`, as its documentation advises for texts."""
    from . import sentences

    inputs = case.inputs
    model = sentences.load_model(inputs)
    model.compile(dynamic=True)

    def run() -> Tensor:
        # Outside inference mode, whose tensors would be compiled for a second time.
        with torch.inference_mode(False), torch.no_grad():
            return inputs.encode(model)

    yield Candidate(NAME, NAME, "float32", run=run, result=lambda x: x, layout="padded")


def _forward(model: Any) -> Forward:
    from torch._inductor import config

    def forward(batch: Batch) -> Tensor:
        # no_grad, as freezing needs; inference tensors would be compiled for a second time
        with torch.no_grad(), config.patch(freezing=not batch.ids.is_cuda):
            outputs = model(input_ids=batch.ids, attention_mask=batch.mask.long())
        return outputs.last_hidden_state

    return forward
