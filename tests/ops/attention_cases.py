"""One attention call described by a `Case`: its tensors, and the check of a backend against float64.

`check` runs the public operator on one backend and compares output, lse and every gradient with `attention_oracle`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctxfast import ops, reference
from ctxfast.ops import _native
from tests.ops.implementations import only
from tests.oracle import CAPS, assert_matches

BACKENDS = ("native", "reference", "triton")
DTYPES = {
    "native": (torch.float32, torch.bfloat16, torch.float64),
    "reference": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """lengths_q and lengths_k, where given, make a packed call; a broadcast tuple has a 1 for every full dimension."""

    batch: int = 2
    heads: int = 2
    seqlen_q: int = 16
    seqlen_k: int = 16
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    lengths_q: tuple[int, ...] | None = None
    lengths_k: tuple[int, ...] | None = None
    tail: int = 0  # rows past the last offset
    slack: int = 0  # by how much max_seqlen exceeds the longest sequence
    key_padding: str = "none"  # prefix, left, holes, empty
    attn_mask: tuple[int, int, int, int] | None = None
    bias: tuple[int, int, int, int] | None = None
    bias_kind: str = "finite"  # or infinite: some entries are -inf
    bias_grad: bool = True
    is_causal: bool = False
    window: tuple[int, int] = (-1, -1)
    dropout_p: float = 0.0
    scale: float | None = None
    memory: str = "contiguous"  # transposed, columns, gaps, fused, expanded
    grad_memory: str = "contiguous"  # transposed, columns, rows, scalar
    lse_grad: bool = True
    magnitude: float = 1.0
    seed: int = 1
    threads: int = 2
    isa: str = ISAS[-1]

    @property
    def packed(self) -> bool:
        return self.lengths_q is not None

    @property
    def scores(self) -> tuple[int, int, int, int]:
        if self.packed:
            longest = (max(self.lengths_q) + self.slack, max(self.lengths_k) + self.slack)
            return (len(self.lengths_q), self.heads, *longest)
        return (self.batch, self.heads, self.seqlen_q, self.seqlen_k)


@dataclass
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    grad_output: Tensor
    grad_lse: Tensor | None
    arguments: dict[str, Any]  # every other keyword argument of the public operator


def lay_out(x: Tensor, memory: str) -> Tensor:
    """x [B, H, S, D] or [T, H, D] in memory of another order; "expanded" repeats the first head with stride 0."""
    if memory == "transposed":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if memory == "columns":
        return x.mT.contiguous().mT
    if memory == "expanded":
        return x[:, :1].contiguous().expand_as(x)
    if memory == "gaps":  # NaN between the rows, and a base that no vector load can rely on
        width = x.shape[-1] + 3
        buffer = x.new_full((x[..., 0].numel() * width + 1,), NAN)
        return buffer[1:].view(*x.shape[:-1], width)[..., : x.shape[-1]].copy_(x)
    if memory == "fused":  # one of three projections that lie side by side
        return x.new_full((*x.shape[:-2], 3, *x.shape[-2:]), NAN)[..., 1, :, :].copy_(x)
    return x.contiguous()


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def key_padding_mask(
    kind: str, batch: int, seqlen: int, generator: torch.Generator
) -> Tensor | None:
    """Bool [B, S]; in "empty" the first sequence attends nothing."""
    if kind == "none":
        return None
    if kind == "holes":
        return torch.rand(batch, seqlen, generator=generator) < 0.7
    lengths = torch.randint(0, seqlen + 1, (batch, 1), generator=generator)
    if kind == "empty":
        lengths[:1] = 0
    columns = torch.arange(seqlen)
    return (columns.flip(0) if kind == "left" else columns) < lengths


def build(case: Case) -> Inputs:
    """The tensors of a case. Rows that must not matter hold NaN: padded keys, and tokens past the last offset."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    arguments: dict[str, Any] = {
        "is_causal": case.is_causal,
        "window_size": case.window,
        "dropout_p": case.dropout_p,
        "scale": case.scale,
        "seed": torch.tensor([case.seed * 0x9E3779B97F4A7C15 % 2**64 - 2**63]),
    }
    if case.packed:
        cu_q, cu_k = offsets(case.lengths_q), offsets(case.lengths_k)
        shape_q = (int(cu_q[-1]) + case.tail, case.heads, case.head_dim)
        shape_k = (int(cu_k[-1]) + case.tail, case.heads, case.head_dim)
        arguments |= {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
        arguments |= {"max_seqlen_q": case.scores[2], "max_seqlen_k": case.scores[3]}
        lse_shape = (case.heads, shape_q[0])
    else:
        shape_q = (case.batch, case.heads, case.seqlen_q, case.head_dim)
        shape_k = (case.batch, case.heads, case.seqlen_k, case.head_dim)
        arguments["key_padding_mask"] = key_padding_mask(
            case.key_padding, case.batch, case.seqlen_k, generator
        )
        if case.attn_mask is not None:
            shape = [n if full else 1 for n, full in zip(case.scores, case.attn_mask, strict=True)]
            arguments["attn_mask"] = torch.rand(shape, generator=generator) < 0.8
        lse_shape = shape_q[:3]
    query, key, value = (normal(*s) * case.magnitude for s in (shape_q, shape_k, shape_k))
    bias = None
    if case.bias is not None:
        bias = normal(*(n if full else 1 for n, full in zip(case.scores, case.bias, strict=True)))
        if case.bias_kind == "infinite":
            bias[torch.rand(bias.shape, generator=generator) < 0.2] = -torch.inf
    row_dim = 0 if case.packed else 2
    shape = {"rows": [1 if d == row_dim else n for d, n in enumerate(shape_q)], "scalar": [1]}
    grad_output = normal(*shape.get(case.grad_memory, shape_q))
    if case.packed:
        for x, cu in ((query, cu_q), (key, cu_k), (value, cu_k), (grad_output, cu_q)):
            if x.dim() == 3 and x.shape[0] > 1:
                x[int(cu[-1]) :] = NAN
    elif arguments["key_padding_mask"] is not None:
        padding = ~arguments["key_padding_mask"][:, None, :, None]
        key, value = key.masked_fill(padding, NAN), value.masked_fill(padding, NAN)
    expanded = case.grad_memory in shape
    grad_output = (
        grad_output.expand(shape_q) if expanded else lay_out(grad_output, case.grad_memory)
    )
    lse_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    return Inputs(
        *(lay_out(x, case.memory) for x in (query, key, value)),
        bias,
        grad_output,
        torch.randn(lse_shape, generator=generator).to(lse_dtype) if case.lse_grad else None,
        arguments,
    )


@contextmanager
def machine(case: Case) -> Iterator[None]:
    """The number of threads and the instruction set of a case, or the best below it that this CPU has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    available = _native.available_isas() if _native.available() else ()
    before = _native.isa() if available else None
    try:
        if available:
            wanted = ISAS.index(case.isa)
            _native.set_isa([isa for isa in ISAS[: wanted + 1] if isa in available][-1])
        yield
    finally:
        torch.set_num_threads(threads)
        if before is not None:
            _native.set_isa(before)


def names(case: Case) -> list[str]:
    """The results of a case, in the order of `run`."""
    with_bias = ["dbias"] if case.bias is not None and case.bias_grad else []
    return ["output", "lse", "dquery", "dkey", "dvalue", *with_bias]


def run(case: Case, inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """Output, lse and gradients of the public operator, all of them computed by one backend."""
    leaves = [x.detach().requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
    arguments = dict(inputs.arguments)
    if inputs.bias is not None:
        arguments["bias"] = inputs.bias.detach().requires_grad_(case.bias_grad)
    operator = ops.attention_varlen_with_lse if case.packed else ops.attention_with_lse
    differentiated = leaves + ([arguments["bias"]] if "dbias" in names(case) else [])
    with machine(case), only(backend):
        outputs = operator(*leaves, **arguments)
        count = 1 if inputs.grad_lse is None else 2
        gradients = torch.autograd.grad(
            outputs[:count], differentiated, (inputs.grad_output, inputs.grad_lse)[:count]
        )
    results = (*(x.detach() for x in outputs), *gradients)
    return dict(zip(names(case), results, strict=True))


def run_reference(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The same from the eager functions in the dtype of the case: the baseline of the tolerance."""
    arguments = dict(inputs.arguments, bias=inputs.bias)
    for name in ("max_seqlen_q", "max_seqlen_k"):
        arguments.pop(name, None)
    tensors = (inputs.query, inputs.key, inputs.value)
    if case.packed:
        forward, backward = reference.attention_varlen, reference.attention_varlen_backward
    else:
        forward, backward = reference.attention_with_lse, reference.attention_backward
    outputs = forward(*tensors, **arguments)
    gradients = backward(inputs.grad_output, inputs.grad_lse, *tensors, **arguments)
    return dict(zip(names(case), (*outputs, *gradients), strict=False))


def check(case: Case, backend: str) -> None:
    """Every result of one backend against float64, by the 2x rule in maximum and RMS and under the caps."""
    from tests.ops.attention_oracle import exact_results

    torch.set_num_threads(1)  # small eager operators: a second thread only waits
    inputs = build(case)
    results = run(case, inputs, backend)
    eager = run_reference(case, inputs)
    exact, rounding = exact_results(case, inputs)
    for name, result in results.items():
        # The reference takes its lse, float32, from scores of the dtype of the case.
        cap = CAPS[case.dtype] if (name, backend) == ("lse", "reference") else None
        assert_matches(
            result,
            eager[name],
            exact[name],
            name=name,
            cap=cap,
            rounding=rounding[name].nan_to_num(),
        )
