"""FlashAttention's own package (Dao et al., 2022): its kernel for packed sequences. Not yet run on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from ..case import Candidate, Case
from ..workloads.operators import AttentionInputs
from .gpu_attention import candidates, need_cuda

NAME = "FlashAttention"
DEVICES = ("cuda",)


def version() -> str:
    import flash_attn

    need_cuda()
    return flash_attn.__version__


def attention(case: Case) -> Iterator[Candidate]:
    yield from candidates(NAME, case, _make)


def _make(inputs: AttentionInputs, offsets: Tensor) -> Callable[[], Tensor]:
    from flash_attn import flash_attn_varlen_func

    longest = max(inputs.lengths)
    return lambda: flash_attn_varlen_func(
        inputs.query, inputs.key, inputs.value, offsets, offsets, longest, longest
    )
