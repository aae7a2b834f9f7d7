"""FlexAttention compiled by Inductor: packed tokens under a block mask of their sequences.

Every shape compiles anew, for tens of seconds: only on request.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..case import DTYPES, Candidate, Case
from ..workloads.operators import AttentionInputs
from . import inductor

NAME = "FlexAttention"
DEVICES = ("cpu", "cuda")
DEFAULT = False


def version() -> str:
    import torch.nn.attention.flex_attention  # noqa: F401

    inductor.find_compiler()
    return torch.__version__


def attention(case: Case) -> Iterator[Candidate]:
    torch._dynamo.reset()  # the shapes of earlier cases count towards its limit of recompilations
    for dtype in case.dtypes:
        yield _packed(case.inputs.to(DTYPES[dtype]), dtype)


def _packed(inputs: AttentionInputs, dtype: str) -> Candidate:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths = torch.tensor(inputs.lengths, device=inputs.query.device)
    sequence = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)  # [T]

    def same_sequence(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sequence[q] == sequence[k]

    total = len(sequence)
    mask = create_block_mask(same_sequence, None, None, total, total, device=lengths.device)
    query, key, value = (
        x.transpose(0, 1)[None].contiguous() for x in (inputs.query, inputs.key, inputs.value)
    )  # [1, H, T, D]
    compiled = torch.compile(flex_attention, dynamic=False)

    def run() -> Tensor:
        with torch.no_grad():
            return compiled(query, key, value, block_mask=mask)

    return Candidate(NAME, NAME, dtype, run=run, result=lambda output: output[0].transpose(0, 1))
