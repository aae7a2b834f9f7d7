"""OpenVINO's CPU plugin, float32 and bfloat16, converted from the transformers model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..case import Candidate, Case
from ..workloads.bert import Batch, BertInputs
from . import huggingface
from .padded import Forward, variants

NAME = "openvino"
_PRECISION = {"float32": "f32", "bfloat16": "bf16"}


def version() -> str:
    import openvino

    huggingface.version()  # the model comes from there
    return openvino.__version__


def bert(case: Case) -> Iterator[Candidate]:
    import openvino

    model = convert(case.inputs)
    for dtype in case.dtypes:
        compiled = openvino.compile_model(model, "CPU", settings(dtype))
        yield from variants(NAME, "OpenVINO", dtype, case, _forward(compiled))


def settings(dtype: str) -> dict[str, Any]:
    """One stream with torch's number of threads: the batch is done as one piece, as everywhere else."""
    return {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": _PRECISION[dtype],
    }


def _forward(compiled: Any) -> Forward:
    def forward(batch: Batch) -> Tensor:
        outputs = compiled([batch.ids.numpy(), batch.mask.long().numpy()])
        return torch.from_numpy(outputs[0])

    return forward


def convert(inputs: BertInputs) -> Any:
    """The OpenVINO model of a case, any batch size and length."""
    import openvino

    model = huggingface.load(inputs, "float32", "sdpa")

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            outputs = self.model(input_ids=input_ids, attention_mask=attention_mask)
            return outputs.last_hidden_state

    ids = torch.ones(2, 5, dtype=torch.int64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with warnings.catch_warnings(), huggingface.quiet():
        warnings.simplefilter("ignore")  # tracing warns of every Python branch of the model
        return openvino.convert_model(LastHiddenState(), example_input=(ids, mask))
