"""What FlashAttention and xFormers share: packed attention on CUDA, in half precision. Not yet run on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..case import DTYPES, Candidate, Case, Unavailable
from ..workloads.operators import AttentionInputs

HALF = ("bfloat16", "float16")
Run = Callable[[AttentionInputs, Tensor], Callable[[], Tensor]]  # inputs, offsets -> run


def need_cuda() -> None:
    """Raises Unavailable where no kernel of theirs can run."""
    if not torch.cuda.is_available():
        raise Unavailable("its kernels run on CUDA alone, and there is no CUDA device")


def candidates(name: str, case: Case, make: Run) -> Iterator[Candidate]:
    """A candidate for every half type of a case whose tensors are on CUDA."""
    for dtype in (dtype for dtype in case.dtypes if dtype in HALF):
        inputs: AttentionInputs = case.inputs.to(DTYPES[dtype])
        offsets = torch.tensor([0, *inputs.lengths]).cumsum(0).to(case.device, torch.int32)
        yield Candidate(name, name, dtype, run=make(inputs, offsets), result=lambda output: output)
