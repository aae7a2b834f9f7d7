"""The linears of a BERT case alone, on its valid tokens: by torch's default path, and by oneDNN with packed weights.

No candidate for the work, but two parts of it: their difference is what torch's default GEMM costs, so that
the report can split a gain into padding, GEMM and the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..case import DTYPES, Candidate, Case
from ..ceilings import onednn_available, packed_linear
from ..workloads.bert import BertInputs

NAME = "gemm"
DEVICES = ("cpu", "cuda")
Linear = Callable[[Tensor], Tensor]

DEFAULT_PATH = "linears alone, F.linear"
PACKED_PATH = "linears alone, oneDNN packed"


def version() -> str:
    return torch.__version__


def bert(case: Case) -> Iterator[Candidate]:
    for dtype in case.dtypes:
        yield _linears(case.inputs, dtype, DEFAULT_PATH, _default_linear)
        if onednn_available() and case.device.type == "cpu":
            yield _linears(case.inputs, dtype, PACKED_PATH, packed_linear)


def _default_linear(weight: Tensor, bias: Tensor, rows: int) -> Linear:
    return lambda x: F.linear(x, weight, bias)


def _linears(
    inputs: BertInputs, dtype: str, label: str, make: Callable[[Tensor, Tensor, int], Linear]
) -> Candidate:
    tokens = [sum(batch.lengths) for batch in inputs.batches]
    layers: list[tuple[int, Linear]] = []
    for _ in range(inputs.shape.num_hidden_layers):
        for n, k in inputs.shape.linear_shapes():
            weight, bias = (
                torch.randn(n, k).to(inputs.device, DTYPES[dtype]),
                torch.zeros(n).to(inputs.device, DTYPES[dtype]),
            )
            layers.append((k, make(weight, bias, max(tokens))))
    rows = [
        {
            k: torch.randn(total, k).to(inputs.device, DTYPES[dtype])
            for _, k in inputs.shape.linear_shapes()
        }
        for total in tokens
    ]

    def run() -> None:
        for by_width in rows:
            for width, linear in layers:
                linear(by_width[width])

    flop = 2.0 * inputs.shape.linear_parameters() * sum(tokens)
    return Candidate(
        NAME, label, dtype, run=run, result=lambda output: output, part=True, flop=flop
    )
