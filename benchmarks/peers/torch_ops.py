"""torch's own fused operators: scaled_dot_product_attention, and oneDNN's linear with packed weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..case import DTYPES, Candidate, Case
from ..ceilings import onednn_available
from ..lengths import length_buckets
from ..workloads.lstm import LstmInputs
from ..workloads.operators import AttentionInputs, LinearInputs
from .eager import PaddedAttention

NAME = "torch"
DEVICES = ("cpu", "cuda")
BACKENDS = {
    "cpu": (SDPBackend.MATH,),
    "cuda": (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.MATH,
    ),
}


def version() -> str:
    return torch.__version__


def attention(case: Case) -> Iterator[Candidate]:
    """SDPA as it chooses, on one padded batch and on four length buckets; then by each of its backends."""
    for dtype in case.dtypes:
        inputs: AttentionInputs = case.inputs.to(DTYPES[dtype])
        padded = PaddedAttention(inputs)
        yield Candidate(NAME, "SDPA", dtype, run=padded.sdpa, result=padded.valid, layout="padded")
        if not padded.dense:
            yield _bucketed(inputs, dtype)
        for backend in BACKENDS[case.device.type]:
            yield _by_backend(padded, dtype, backend)


def attention_training(case: Case) -> Iterator[Candidate]:
    """Forward and backward of SDPA as it chooses, on one padded batch."""
    for dtype in case.dtypes:
        padded = PaddedAttention(case.inputs.to(DTYPES[dtype]))
        run = padded.training(padded.sdpa_of)
        yield Candidate(NAME, "SDPA", dtype, run=run, result=padded.valid_all, layout="padded")


def _by_backend(padded: PaddedAttention, dtype: str, backend: SDPBackend) -> Candidate:
    def run() -> Tensor:
        with sdpa_kernel(backend):
            return padded.sdpa()

    label = f"SDPA {backend.name.lower().replace('_', ' ')}"
    return Candidate(NAME, label, dtype, run=run, result=padded.valid, layout="padded")


def _bucketed(inputs: AttentionInputs, dtype: str) -> Candidate:
    groups = length_buckets(inputs.lengths, 4)
    buckets = [PaddedAttention(_sequences(inputs, group)) for group in groups]

    def result(outputs: list[Tensor]) -> Tensor:
        found: dict[int, Tensor] = {}
        for group, bucket, output in zip(groups, buckets, outputs, strict=True):
            lengths = [inputs.lengths[i] for i in group]
            found.update(zip(group, bucket.valid(output).split(lengths), strict=True))
        return torch.cat([found[i] for i in range(len(found))])

    return Candidate(
        peer=NAME,
        label="SDPA, length buckets",
        dtype=dtype,
        run=lambda: [bucket.sdpa() for bucket in buckets],
        result=result,
        layout="buckets",
        detail=f"{len(buckets)} buckets",
    )


def _sequences(inputs: AttentionInputs, chosen: list[int]) -> AttentionInputs:
    query, key, value = (
        torch.cat([x.split(list(inputs.lengths))[i] for i in chosen])
        for x in (inputs.query, inputs.key, inputs.value)
    )
    return AttentionInputs(query, key, value, tuple(inputs.lengths[i] for i in chosen))


def linear(case: Case) -> Iterator[Candidate]:
    """oneDNN with the weight packed before timing and the epilogue fused."""
    if onednn_available() and case.device.type == "cpu":
        for dtype in case.dtypes:
            yield _onednn(case.inputs.to(DTYPES[dtype]), dtype)


def _onednn(inputs: LinearInputs, dtype: str) -> Candidate:
    x, bias, residual = inputs.input, inputs.bias, inputs.residual
    packed = torch.ops.mkldnn._reorder_linear_weight(inputs.weight, x.shape[0])
    pointwise = torch.ops.mkldnn._linear_pointwise

    def run() -> Tensor:
        if residual is not None:
            return pointwise.binary(x, residual, packed, bias, "add")
        if inputs.activation == "gelu":
            return pointwise(x, packed, bias, "gelu", [], "none")
        return pointwise(x, packed, bias, "none", [], "")

    return Candidate(
        peer=NAME,
        label="oneDNN in torch",
        dtype=dtype,
        run=run,
        result=lambda output: output,
        detail="weight packed beforehand",
    )


def lstm(case: Case) -> Iterator[Candidate]:
    """torch.nn.LSTM: with a projection its loop of operators in C++, in float32; cuDNN on a GPU."""
    inputs: LstmInputs = case.inputs
    for dtype in case.dtypes if case.device.type == "cuda" else ("float32",):
        module = inputs.module(torch.nn.LSTM, DTYPES[dtype])
        yield Candidate(
            peer=NAME,
            label="torch.nn.LSTM",
            dtype=dtype,
            run=partial(inputs.run, module, DTYPES[dtype]),
            result=lambda output: output,
        )
