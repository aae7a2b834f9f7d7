"""Plain PyTorch, operation by operation: the baseline that needs nothing but torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..case import DTYPES, Candidate, Case
from ..plain_bert import forward, read_weights, softmax_attention
from ..workloads.bert import Batch, BertInputs
from ..workloads.bert_pretraining import PretrainingInputs, plain_step
from ..workloads.operators import AttentionInputs, LayerNormInputs, LinearInputs

NAME = "eager"


def version() -> str:
    return torch.__version__


def bert(case: Case) -> Iterator[Candidate]:
    """One padded batch, explicit softmax over masked scores. In bfloat16 for its error alone: it is slow."""
    for dtype in case.dtypes:
        yield _bert(case.inputs, dtype)


def _bert(inputs: BertInputs, dtype: str) -> Candidate:
    weights = read_weights(inputs.directory, DTYPES[dtype])
    heads = inputs.shape.num_attention_heads

    def run_batch(batch: Batch) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return softmax_attention(q, k, v, heads, batch.mask)

        positions = torch.arange(batch.ids.shape[1])
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


def linear(case: Case) -> Iterator[Candidate]:
    for dtype in case.dtypes:
        inputs: LinearInputs = case.inputs.to(DTYPES[dtype])
        yield Candidate(NAME, "eager", dtype, run=inputs.run, result=lambda output: output)


def layer_norm(case: Case) -> Iterator[Candidate]:
    for dtype in case.dtypes:
        inputs: LayerNormInputs = case.inputs.to(DTYPES[dtype])
        yield Candidate(NAME, "eager", dtype, run=inputs.run, result=lambda output: output)


class PaddedAttention:
    """The packed inputs of an attention case on a padded grid [B, H, S, D], padded before timing starts."""

    def __init__(self, inputs: AttentionInputs) -> None:
        lengths = torch.tensor(inputs.lengths)
        self.mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]  # [B, S]
        self.dense = bool(self.mask.all())
        self.query, self.key, self.value = (
            self._pad(x) for x in (inputs.query, inputs.key, inputs.value)
        )

    def _pad(self, x: Tensor) -> Tensor:
        grid = x.new_zeros(*self.mask.shape, *x.shape[1:])
        grid[self.mask] = x
        return grid.transpose(1, 2)

    def softmax(self) -> Tensor:
        """[B, H, S, D] by explicit scores."""
        scores = self.query @ self.key.transpose(-1, -2) * self.query.shape[-1] ** -0.5
        if not self.dense:
            scores = scores.masked_fill(~self.mask[:, None, None, :], -torch.inf)
        return torch.softmax(scores, -1) @ self.value

    def sdpa(self) -> Tensor:
        """[B, H, S, D] by torch's scaled_dot_product_attention."""
        mask = None if self.dense else self.mask[:, None, None, :]
        return torch.nn.functional.scaled_dot_product_attention(
            self.query, self.key, self.value, attn_mask=mask
        )

    def valid(self, output: Tensor) -> Tensor:
        """[T, H, D] of the valid tokens."""
        return output.transpose(1, 2)[self.mask]
