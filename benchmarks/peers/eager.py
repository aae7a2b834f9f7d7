"""Plain PyTorch, operation by operation: the baseline that needs nothing but torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..case import DTYPES, Candidate, Case
from ..plain_bert import (
    Product,
    alone,
    forward,
    product_int8,
    product_tf32,
    read_weights,
    softmax_attention,
)
from ..plain_elmo import PlainElmo
from ..workloads.bert import Batch, BertInputs, serves_int8, serves_tf32
from ..workloads.bert_pretraining import PretrainingInputs, plain_step
from ..workloads.elmo import ElmoInputs
from ..workloads.lstm import LstmInputs
from ..workloads.operators import (
    AttentionInputs,
    LayerNormInputs,
    LinearInputs,
    forward_and_backward,
)

NAME = "eager"
DEVICES = ("cpu", "cuda")


def version() -> str:
    return torch.__version__


def bert(case: Case) -> Iterator[Candidate]:
    """One padded batch, explicit softmax over masked scores. Timed in float32, else for its error alone: it is slow."""
    for dtype in case.dtypes:
        yield _bert(case.inputs, dtype)
    if serves_int8(case):
        yield _emulated(case.inputs, "int8", product_int8)
    if serves_tf32(case):
        yield _emulated(case.inputs, "tf32", product_tf32)


def _bert(inputs: BertInputs, dtype: str) -> Candidate:
    read = read_weights(inputs.directory, DTYPES[dtype])
    weights = {name: weight.to(inputs.device) for name, weight in read.items()}
    heads = inputs.shape.num_attention_heads

    def run_batch(batch: Batch) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return softmax_attention(q, k, v, heads, batch.mask)

        positions = torch.arange(batch.ids.shape[1], device=inputs.device)
        return forward(weights, inputs.shape, batch.ids, positions, attend)

    return Candidate(
        peer=NAME,
        label="eager",
        dtype=dtype,
        run=lambda: [run_batch(batch) for batch in inputs.batches],
        result=inputs.valid,
        layout="padded",
        timed=dtype == "float32",
    )


def _emulated(inputs: BertInputs, dtype: str, product: Product) -> Candidate:
    """Linear layers on emulated products, everything else in float32; tokens are packed, to save emulation."""
    weights = read_weights(inputs.directory, torch.float32)
    ids, lengths = inputs.packed_ids(), inputs.lengths
    return Candidate(
        peer=NAME,
        label="eager",
        dtype=dtype,
        run=lambda: alone(weights, inputs.shape, ids, lengths, product),
        result=lambda output: output,
        detail="products emulated",
        timed=False,
    )


def bert_pretraining(case: Case) -> Iterator[Candidate]:
    """The padded encoder in float32, for its error alone."""
    inputs: PretrainingInputs = case.inputs
    mask, heads = inputs.batch.mask, inputs.shape.num_attention_heads

    def encode(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return softmax_attention(q, k, v, heads, mask)

        positions = torch.arange(mask.shape[1])
        return forward(weights, inputs.shape, inputs.batch.ids, positions, attend)[mask]

    yield Candidate(
        peer=NAME,
        label="eager",
        dtype="float32",
        run=lambda: plain_step(inputs, torch.float32, encode),
        result=lambda output: output,
        layout="padded",
        timed=False,
    )


def elmo(case: Case) -> Iterator[Candidate]:
    """As AllenNLP computes it: all tokens encoded, a Python loop over time. In bfloat16 for its error alone."""
    for dtype in case.dtypes:
        yield _elmo(case.inputs, dtype)


def _elmo(inputs: ElmoInputs, dtype: str) -> Candidate:
    model = PlainElmo(inputs.directory, DTYPES[dtype], inputs.device)
    ids, lengths = inputs.with_boundaries(), inputs.lengths
    return Candidate(
        peer=NAME,
        label="eager",
        dtype=dtype,
        run=lambda: model(ids, lengths),
        result=inputs.valid,
        layout="padded",
        timed=dtype == "float32",
    )


def attention(case: Case) -> Iterator[Candidate]:
    """Explicit scores and softmax on the padded grid."""
    for dtype in case.dtypes:
        inputs: AttentionInputs = case.inputs.to(DTYPES[dtype])
        padded = PaddedAttention(inputs)
        yield Candidate(
            peer=NAME,
            label="eager",
            dtype=dtype,
            run=padded.softmax,
            result=padded.valid,
            layout="padded",
        )


def attention_training(case: Case) -> Iterator[Candidate]:
    """Forward and backward of the same. In bfloat16 for its error alone: it is slow."""
    for dtype in case.dtypes:
        padded = PaddedAttention(case.inputs.to(DTYPES[dtype]))
        yield Candidate(
            peer=NAME,
            label="eager",
            dtype=dtype,
            run=padded.training(padded.softmax_of),
            result=padded.valid_all,
            layout="padded",
            timed=dtype == "float32",
        )


def linear(case: Case) -> Iterator[Candidate]:
    for dtype in case.dtypes:
        inputs: LinearInputs = case.inputs.to(DTYPES[dtype])
        yield Candidate(NAME, "eager", dtype, run=inputs.run, result=lambda output: output)


def layer_norm(case: Case) -> Iterator[Candidate]:
    for dtype in case.dtypes:
        inputs: LayerNormInputs = case.inputs.to(DTYPES[dtype])
        yield Candidate(NAME, "eager", dtype, run=inputs.run, result=lambda output: output)


class EagerLstm(torch.nn.Module):
    """Both directions of an LSTM, with projection or without, as loops over time in Python."""

    def __init__(self, parameters: torch.nn.LSTM) -> None:
        super().__init__()
        self.lstm = parameters

    def forward(self, x: Tensor) -> tuple[Tensor]:
        forward, reverse = self._direction(x, ""), self._direction(x.flip(1), "_reverse")
        return (torch.cat((forward, reverse.flip(1)), 2),)

    def _direction(self, x: Tensor, suffix: str) -> Tensor:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        w_ih, w_hh, b_ih, b_hh = (getattr(self.lstm, f"{n}_l0{suffix}") for n in names)
        w_hr = getattr(self.lstm, f"weight_hr_l0{suffix}", None)
        gates = F.linear(x, w_ih, b_ih + b_hh)
        h, c = x.new_zeros(len(x), w_hh.shape[1]), x.new_zeros(len(x), w_hh.shape[0] // 4)
        outputs = []
        for step in range(x.shape[1]):
            i, f, g, o = (gates[:, step] + F.linear(h, w_hh)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            h = h if w_hr is None else F.linear(h, w_hr)
            outputs.append(h)
        return torch.stack(outputs, 1)


def lstm(case: Case) -> Iterator[Candidate]:
    """A loop over time in Python. In bfloat16 for its error alone: it is slow."""
    inputs: LstmInputs = case.inputs
    for dtype in case.dtypes:
        module = EagerLstm(inputs.module(torch.nn.LSTM, DTYPES[dtype]))
        yield Candidate(
            peer=NAME,
            label="eager",
            dtype=dtype,
            run=partial(inputs.run, module, DTYPES[dtype]),
            result=lambda output: output,
            timed=dtype == "float32",
        )


class PaddedAttention:
    """The packed inputs of an attention case on a padded grid [B, H, S, D], padded before timing starts."""

    def __init__(self, inputs: AttentionInputs) -> None:
        lengths = torch.tensor(inputs.lengths)
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        self.mask = mask.to(inputs.query.device)  # [B, S]
        self.dense = bool(self.mask.all())
        self.inputs = tuple(self._pad(x) for x in (inputs.query, inputs.key, inputs.value))
        self.grad = None if inputs.grad is None else self._pad(inputs.grad)

    def _pad(self, x: Tensor) -> Tensor:
        grid = x.new_zeros(*self.mask.shape, *x.shape[1:])
        grid[self.mask] = x
        return grid.transpose(1, 2)

    def softmax(self) -> Tensor:
        """[B, H, S, D] by explicit scores."""
        return self.softmax_of(*self.inputs)

    def softmax_of(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if not self.dense:
            scores = scores.masked_fill(~self.mask[:, None, None, :], -torch.inf)
        return torch.softmax(scores, -1) @ value

    def sdpa(self) -> Tensor:
        """[B, H, S, D] by torch's scaled_dot_product_attention."""
        return self.sdpa_of(*self.inputs)

    def sdpa_of(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = None if self.dense else self.mask[:, None, None, :]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    def training(self, function: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
        """Forward and backward of one of the above; padded rows have no gradient from outside."""
        assert self.grad is not None
        return forward_and_backward(function, self.inputs, self.grad)

    def valid(self, output: Tensor) -> Tensor:
        """[T, H, D] of the valid tokens."""
        return output.transpose(1, 2)[self.mask]

    def valid_all(self, outputs: list[Tensor]) -> Tensor:
        """[4T, H, D]: of the output and the three gradients."""
        return torch.cat([self.valid(output) for output in outputs])
