"""ctxfast itself, through the calls that a user or its own models make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import ctxfast
from ctxfast import nn, ops

from ..case import DTYPES, Candidate, Case
from ..workloads.bert import BertInputs, serves_int8, serves_tf32
from ..workloads.bert_pretraining import NO_DROPOUT, PretrainingInputs, checked_step, step
from ..workloads.elmo import ElmoInputs
from ..workloads.lstm import LstmInputs
from ..workloads.operators import (
    AttentionInputs,
    LayerNormInputs,
    LinearInputs,
    forward_and_backward,
)
from .accelerated import accelerated_bert, fine_tuning, text_vectors  # noqa: F401

NAME = "ctxfast"
DEVICES = ("cpu", "cuda")
_BERT_DETAIL = {
    "bfloat16": "computed in bfloat16, parameters in float32",
    "tf32": "float32; products as torch.set_float32_matmul_precision('high') allows",
    "int8": "products of 8-bit integers, sums and normalisation in float32, attention in bfloat16",
}


def version() -> str:
    return ctxfast.__version__


@contextmanager
def matmul_precision(level: str) -> Iterator[None]:
    """torch's precision of float32 products inside the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(level)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _candidate(
    dtype: str,
    run: Callable[[], Any],
    result: Callable[[Any], Tensor] = lambda output: output,
    detail: str = "",
) -> Candidate:
    return Candidate(NAME, NAME, dtype, run=run, result=result, detail=detail)


def bert(case: Case) -> Iterator[Candidate]:
    """`ctxfast.bert.BertModel` of float32 in every compute type: padded ids and mask in, last hidden state out."""
    for dtype in case.dtypes:
        yield _bert(case.inputs, dtype)
    if serves_int8(case):
        yield _bert(case.inputs, "int8")
    if serves_tf32(case):
        yield _bert(case.inputs, "tf32")


def _bert(inputs: BertInputs, dtype: str) -> Candidate:
    from ctxfast.bert import BertModel

    device = inputs.device
    held = torch.float32 if device.type == "cpu" else DTYPES[dtype]
    model = BertModel.from_pretrained(inputs.directory, dtype=held, add_pooling_layer=False)
    model = model.to(device)
    if device.type == "cpu" and dtype not in ("float32", "tf32"):
        nn.set_precision(model, dtype)

    def run() -> list[Tensor]:
        with matmul_precision("high" if dtype == "tf32" else "highest"):
            return [
                model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
                for batch in inputs.batches
            ]

    detail = _BERT_DETAIL.get(dtype, "") if device.type == "cpu" else ""
    return _candidate(dtype, run, inputs.valid, detail)


def bert_pretraining(case: Case) -> Iterator[Candidate]:
    """`ctxfast.bert.BertForPreTraining` with sparse prediction."""
    from ctxfast.bert import BertForPreTraining

    inputs: PretrainingInputs = case.inputs

    def load(**changes: float) -> BertForPreTraining:
        with torch.inference_mode(False):
            return BertForPreTraining.from_pretrained(
                inputs.directory, sparse_prediction=True, **changes
            )

    yield _candidate(
        "float32", step(load(), inputs), lambda loss: checked_step(load(**NO_DROPOUT), inputs)
    )


def elmo(case: Case) -> Iterator[Candidate]:
    """`ctxfast.elmo.ElmoBiLm`: character ids in, all layers out; in bfloat16 weights and activations."""
    for dtype in case.dtypes:
        yield _elmo(case.inputs, dtype)


def _elmo(inputs: ElmoInputs, dtype: str) -> Candidate:
    from ctxfast.elmo import ElmoBiLm

    model = ElmoBiLm(inputs.directory).eval().to(inputs.device, DTYPES[dtype])
    model.stateful = "reset"
    ids = inputs.ids()
    return _candidate(dtype, lambda: model.layers(ids)[0], inputs.valid)


def attention(case: Case) -> Iterator[Candidate]:
    """`ops.attention_varlen` on the packed tokens; `ops.attention` where there is no padding."""
    for dtype in case.dtypes:
        inputs: AttentionInputs = case.inputs.to(DTYPES[dtype])
        uniform = min(inputs.lengths) == max(inputs.lengths)
        yield _attention(inputs, dtype) if uniform else _attention_varlen(inputs, dtype)


def attention_training(case: Case) -> Iterator[Candidate]:
    """Forward and backward of the same."""
    yield from attention(case)


def _attention(inputs: AttentionInputs, dtype: str) -> Candidate:
    grid = (len(inputs.lengths), inputs.lengths[0])

    def padded(x: Tensor) -> Tensor:
        return x.unflatten(0, grid).transpose(1, 2)  # [B, H, S, D]

    def packed(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)

    arguments = [padded(x) for x in (inputs.query, inputs.key, inputs.value)]
    if inputs.grad is None:
        return _candidate(dtype, lambda: ops.attention(*arguments), packed)
    run = forward_and_backward(
        lambda *leaves: ops.attention(*leaves), arguments, padded(inputs.grad)
    )
    return _candidate(dtype, run, lambda outputs: torch.cat([packed(x) for x in outputs]))


def _attention_varlen(inputs: AttentionInputs, dtype: str) -> Candidate:
    with torch.inference_mode(False):
        offsets = torch.tensor([0, *inputs.lengths]).cumsum(0).to(inputs.query.device, torch.int32)
    longest = max(inputs.lengths)
    arguments = (inputs.query, inputs.key, inputs.value)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.attention_varlen(
            query,
            key,
            value,
            cu_seqlens_q=offsets,
            cu_seqlens_k=offsets,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
        )

    if inputs.grad is None:
        return _candidate(dtype, lambda: attend(*arguments))
    return _candidate(dtype, forward_and_backward(attend, arguments, inputs.grad), torch.cat)


def linear(case: Case) -> Iterator[Candidate]:
    """`ops.linear` with its epilogue and the packed weight that ctxfast's layers keep for inference."""
    for dtype in case.dtypes:
        yield _linear(case.inputs.to(DTYPES[dtype]), dtype)


def _linear(inputs: LinearInputs, dtype: str) -> Candidate:
    x, weight, bias = inputs.input, inputs.weight, inputs.bias
    layer = nn.PackedLinear(x.shape[-1], len(weight), device=x.device, dtype=DTYPES[dtype]).eval()
    layer.load_state_dict({"weight": weight, "bias": bias})

    def run() -> Tensor:
        copy = layer.packed_weight((layer,), x)  # its validity is checked in every call
        return ops.linear(
            x,
            layer.weight,
            layer.bias,
            activation=inputs.activation,
            residual=inputs.residual,
            packed=None if copy is None else copy.weight,
        )

    return _candidate(dtype, run=run, detail="weight packed beforehand")


def layer_norm(case: Case) -> Iterator[Candidate]:
    """`ops.add_layer_norm`."""
    for dtype in case.dtypes:
        yield _layer_norm(case.inputs.to(DTYPES[dtype]), dtype)


def _layer_norm(inputs: LayerNormInputs, dtype: str) -> Candidate:
    x, residual, weight, bias = inputs.input, inputs.residual, inputs.weight, inputs.bias
    return _candidate(dtype, run=lambda: ops.add_layer_norm(x, residual, weight, bias, inputs.eps))


def lstm(case: Case) -> Iterator[Candidate]:
    """`nn.LSTM`; in bfloat16 on a CPU it keeps its weights so and computes in float32."""
    for dtype in case.dtypes:
        yield _lstm(case.inputs, dtype)


def _lstm(inputs: LstmInputs, dtype: str) -> Candidate:
    if inputs.input.is_cuda:
        module = inputs.module(nn.LSTM, DTYPES[dtype])
        return _candidate(dtype, run=lambda: inputs.run(module, DTYPES[dtype]))
    module = inputs.module(nn.LSTM, torch.float32)
    detail = "weights packed in every call" if inputs.training else "weights packed beforehand"
    if dtype == "bfloat16":
        module.weight_dtype = torch.bfloat16
        detail = "weights in bfloat16, arithmetic in float32"
    return _candidate(dtype, run=lambda: inputs.run(module, torch.float32), detail=detail)
