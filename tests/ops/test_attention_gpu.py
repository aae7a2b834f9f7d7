"""Attention on a CUDA device: against float64, the CPU's bits of dropout, streams and graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ctxfast import ops
from tests.ops import fuzz
from tests.ops.attention_cases import Case, build, run, run_reference
from tests.ops.attention_oracle import exact_results
from tests.ops.implementations import only
from tests.ops.test_attention import FEATURES
from tests.ops.test_attention_dropout import P, specified
from tests.ops.test_attention_varlen import FEATURES as PACKED_FEATURES
from tests.oracle import assert_matches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CASES = {
    **FEATURES,
    **{f"packed, {name}": case for name, case in PACKED_FEATURES.items()},
    "long": Case(
        heads=3, seqlen_q=513, seqlen_k=700, head_dim=64, key_padding="prefix", dropout_p=0.1
    ),
    "long causal": Case(
        batch=1, seqlen_q=300, seqlen_k=300, head_dim=128, is_causal=True, bias=(0, 1, 1, 1)
    ),
    "packed, long": Case(
        lengths_q=(128, 77, 513, 0, 5), lengths_k=(128, 77, 513, 0, 5), head_dim=64, tail=30
    ),
}


def to_device(inputs, device="cuda"):
    """Inputs on another device: whole buffers are copied, so that strides and offsets stay."""
    for name in ("query", "key", "value", "bias", "grad_output", "grad_lse"):
        x = getattr(inputs, name)
        if x is not None:
            count = x.untyped_storage().nbytes() // x.element_size()
            buffer = x.as_strided((count,), (1,), 0).to(device, copy=True)
            setattr(inputs, name, buffer.as_strided(x.shape, x.stride(), x.storage_offset()))
    inputs.arguments = {
        name: x.to(device) if isinstance(x, torch.Tensor) else x
        for name, x in inputs.arguments.items()
    }
    return inputs


def check_on_device(case):
    results = run(case, to_device(build(case)), "triton")
    inputs = build(case)
    eager, (exact, rounding) = run_reference(case, inputs), exact_results(case, inputs)
    for name, x in results.items():
        terms = rounding[name].nan_to_num()
        assert_matches(x.cpu(), eager[name], exact[name], name=name, rounding=terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name, dtype):
    check_on_device(replace(CASES[name], dtype=dtype))


@pytest.mark.parametrize("part", range(20))  # small parts: processes share the compilation
def test_random_cases(part):
    failures = []
    for index in range(15 * part, 15 * part + 15):
        case = fuzz.draw(2, index, "triton")
        try:
            check_on_device(case)
        except AssertionError as error:
            failures.append(f"2:{index} {fuzz.describe(case)}: {error}")
    assert not failures, "\n".join(failures)


def test_dropout_mask_is_that_of_the_specification():
    sizes = (2, 3, 70, 256)
    q, k = (torch.zeros(2, 3, n, 256, device="cuda") for n in (70, 256))
    value = torch.eye(256, device="cuda").expand(2, 3, -1, -1)
    with only("triton"):
        output = ops.attention(q, k, value, dropout_p=P, seed=torch.tensor([31], device="cuda"))
    assert torch.equal((output != 0).cpu(), specified(31, P, *sizes))


def test_repeats_every_bit():
    case = Case(
        batch=60,
        heads=4,
        seqlen_q=97,
        seqlen_k=130,
        dtype=torch.bfloat16,
        bias=(0, 1, 1, 1),
        dropout_p=0.1,
    )
    inputs = to_device(build(case))
    first = run(case, inputs, "triton")
    for _ in range(250):
        for name, x in run(case, inputs, "triton").items():
            assert torch.equal(x, first[name]), name


def test_runs_on_the_current_stream():
    """The inputs are written late on a side stream; a launch on another stream would read what was there before."""
    case = Case(batch=4, heads=4, seqlen_q=256, seqlen_k=256, head_dim=64)
    inputs = to_device(build(case))
    expected = run(case, inputs, "triton")
    values = {name: getattr(inputs, name) for name in ("query", "key", "value", "grad_output")}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for name, x in values.items():
            late = torch.zeros_like(x)
            torch.cuda._sleep(50_000_000)
            late.copy_(x)
            setattr(inputs, name, late)
        found = run(case, inputs, "triton")
    stream.synchronize()
    for name, x in found.items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("packed", [False, True])
def test_graph_replay_with_changed_lengths(packed):
    """One captured graph of forward and backward serves every set of lengths within its capacity."""
    heads, dim, rows = 2, 64, 300
    shape = (rows, heads, dim) if packed else (3, heads, 130, dim)
    leaves = [torch.randn(shape, device="cuda", requires_grad=True) for _ in range(3)]
    grad = torch.randn(shape, device="cuda")
    seed = torch.tensor([5], device="cuda")
    cu = torch.zeros(4, dtype=torch.int32, device="cuda")
    mask = torch.zeros(3, 130, dtype=torch.bool, device="cuda")
    operator = ops.attention_varlen if packed else ops.attention
    arguments = {"key_padding_mask": mask}
    if packed:
        arguments = {
            "cu_seqlens_q": cu,
            "cu_seqlens_k": cu,
            "max_seqlen_q": 130,
            "max_seqlen_k": 130,
        }

    def step():
        output = operator(*leaves, **arguments, dropout_p=0.1, seed=seed)
        return (output, *torch.autograd.grad(output, leaves, grad))

    def set_lengths(lengths, number):
        cu.copy_(torch.tensor([0, *lengths]).cumsum(0))
        mask.copy_(torch.arange(130) < torch.tensor(lengths)[:, None])
        seed.fill_(number)

    set_lengths((10, 20, 30), 1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for number, lengths in enumerate([(130, 1, 99), (0, 130, 7), (5, 0, 0)]):
        set_lengths(lengths, number)
        graph.replay()
        for found, expected in zip([x.clone() for x in captured], step(), strict=True):
            assert torch.equal(found, expected)
