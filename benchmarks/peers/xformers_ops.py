"""xFormers: memory-efficient attention under a block-diagonal mask. Not yet run on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from ..case import Candidate, Case
from ..workloads.operators import AttentionInputs
from .gpu_attention import candidates, need_cuda

NAME = "xFormers"
DEVICES = ("cuda",)


def version() -> str:
    import xformers

    need_cuda()
    return xformers.__version__


def attention(case: Case) -> Iterator[Candidate]:
    yield from candidates(NAME, case, _make)


def _make(inputs: AttentionInputs, offsets: Tensor) -> Callable[[], Tensor]:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens(list(inputs.lengths))
    query, key, value = (x[None] for x in (inputs.query, inputs.key, inputs.value))  # [1, T, H, D]
    return lambda: memory_efficient_attention(query, key, value, attn_bias=mask)[0]
