"""What every registered operator owes torch: opcheck, one graph, transforms, autocast, double backward."""

from __future__ import annotations

import pytest
import torch

from ctxfast import ops
from tests.oracle import assert_matches

DOUBLE = torch.float64
OFFSETS = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
VARLEN = {"cu_seqlens_q": OFFSETS, "cu_seqlens_k": OFFSETS, "max_seqlen_q": 16, "max_seqlen_k": 16}
IDS = torch.tensor([[1, 4, 2], [0, 3, 3]])


def attention_arguments(dtype):
    return [torch.randn(2, 3, 5, 7, dtype=dtype) for _ in range(3)]


def varlen_arguments(dtype):
    return [torch.randn(9, 2, 4, dtype=dtype) for _ in range(3)]


def norm_arguments(dtype):
    return [torch.randn(shape, dtype=dtype) for shape in ((2, 3, 6), (2, 3, 6), (6,), (6,))]


def linear_arguments(dtype):
    return [torch.randn(shape, dtype=dtype) for shape in ((2, 3, 6), (5, 6), (5,))]


def lstm_arguments(dtype):
    shapes = ((2, 3, 2), (8, 2), (8, 1), (8,), (1, 2), (2, 1), (2, 2))
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def lstm(x, w_ih, w_hh, bias, w_hr, h, c):
    lengths = [2, 3] * (x.shape[0] // 2)
    state = (h[: x.shape[0]], c[: x.shape[0]])
    return ops.lstm(
        x,
        w_ih,
        w_hh,
        bias,
        w_hr,
        lengths=lengths,
        initial_state=state,
        cell_clip=0.7,
        proj_clip=0.4,
    )[0]


def bilstm_arguments(dtype):
    shapes = ((2, 2, 1), (2, 8, 1), (2, 8, 1), (2, 1, 2))
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def bilstm(x, w_ih, w_hh, w_hr):
    pairs = [tuple(w.unbind()) for w in (w_ih, w_hh, w_hr)]
    return ops.bilstm((x, 2 * x), pairs[0], pairs[1], None, pairs[2])[0]


def embed_arguments(dtype):
    return [torch.randn(shape, dtype=dtype) for shape in ((5, 6), (2, 6), (4, 6), (6,), (6,))]


def embed(*tables):
    return ops.embed_layer_norm(IDS, IDS % 2, torch.arange(3).expand(2, 3), *tables, 1e-12)


def loss_arguments(dtype):
    return [torch.randn(shape, dtype=dtype) for shape in ((7, 6), (9, 6), (9,))]


LABELS = torch.tensor([3, -100, 0, 8, -100, 3, 1])


def loss(hidden, weight, bias):
    rows = hidden.shape[0] // 7
    return ops.linear_cross_entropy(hidden, weight, bias, LABELS.repeat(rows))


def characters(table, wide, narrow, bias):
    return ops.char_cnn(IDS, table, [wide, narrow], [bias[:3], bias[3:]], "tanh")


def character_arguments(dtype):
    return [torch.randn(shape, dtype=dtype) for shape in ((5, 4), (3, 4, 2), (2, 4, 1), (5,))]


def highway_arguments(dtype):
    return [torch.randn(shape, dtype=dtype) for shape in ((2, 3, 5), (10, 5), (10,))]


def mix_arguments(dtype):
    return [torch.randn(shape, dtype=dtype) for shape in ((3, 2, 4), (3,), (1,))]


CALLS = {
    "char_cnn": (characters, character_arguments),
    "highway_gate": (ops.highway, highway_arguments),
    "scalar_mix": (ops.scalar_mix, mix_arguments),
    "attention": (lambda q, k, v: ops.attention(q, k, v), attention_arguments),
    "attention_varlen": (lambda q, k, v: ops.attention_varlen(q, k, v, **VARLEN), varlen_arguments),
    "add_layer_norm": (lambda x, r, w, b: ops.add_layer_norm(x, r, w, b, 1e-5), norm_arguments),
    "linear": (lambda x, w, b: ops.linear(x, w, b, activation="gelu"), linear_arguments),
    "embed_layer_norm": (embed, embed_arguments),
    "lstm": (lstm, lstm_arguments),
    "bilstm": (bilstm, bilstm_arguments),
    "linear_cross_entropy": (loss, loss_arguments),
}
NAMES = list(CALLS)
OVERLOADS = {"bilstm": "lstm"}  # one registered operator for one direction and for two


def overload_arguments(name):
    """Arguments of the registered overload, gradients required."""
    tensors = [x.requires_grad_() for x in CALLS[name][1](torch.float32)]
    if name == "attention":
        mask = torch.tensor([[True, True, False, True, True], [True] * 5])
        bias = torch.randn(1, 3, 5, 5, requires_grad=True)
        return (*tensors, None, mask, bias, torch.tensor([3]), True, 3, -1, 0.2, 0.5)
    if name == "attention_varlen":
        return (*tensors, OFFSETS, OFFSETS, 16, 16, *(None,) * 4, False, -1, -1, 0.0, 0.5)
    if name == "add_layer_norm":
        return (*tensors, 1e-5, 0.0, None, None, None)
    if name == "char_cnn":
        table, wide, narrow, bias = tensors
        weight = torch.cat([wide.detach().flatten(), narrow.detach().flatten()]).requires_grad_()
        return (IDS, table, weight, bias, [2, 1], [3, 2], "tanh")
    if name == "highway_gate":
        return torch.randn(2, 3, 10, requires_grad=True), tensors[0]
    if name == "scalar_mix":
        return tensors[:2]
    if name == "linear":
        return (*tensors, "gelu", None, None)
    if name == "lstm":
        x, *weights, h, c = tensors
        twins = [argument for w in weights for argument in (w, None)]
        lengths, mask = torch.tensor([2, 3]), torch.rand(1, 2, 1)
        return (
            x,
            None,
            *twins,
            h[None],
            c[None],
            lengths,
            mask,
            None,
            None,
            True,
            0.7,
            0.4,
            None,
            True,
        )
    if name == "bilstm":
        x, *pairs = tensors
        twins = [w.detach().requires_grad_() for pair in pairs for w in pair]
        state = (torch.randn(2, 2, 1), torch.randn(2, 2, 2))
        rest = (None, None, None, None, False, None, None, None, False)
        return (x, None, *twins[:4], None, None, *twins[4:], *state, *rest)
    if name == "linear_cross_entropy":
        return (*tensors, LABELS, -100, True, True, True)
    return (IDS, IDS % 2, torch.arange(3).expand(2, 3), *tensors, 1e-12, 0)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    results = torch.library.opcheck(
        getattr(torch.ops.ctxfast, OVERLOADS.get(name, name)).default, overload_arguments(name)
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_to_second_order_in_float64(name):
    function, arguments = CALLS[name]
    leaves = [x.requires_grad_() for x in arguments(DOUBLE)]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ["attention", "linear", "add_layer_norm"])
def test_one_graph_for_all_shapes(name):
    function, arguments = CALLS[name]
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for batch in (2, 3, 5):
        tensors = arguments(torch.float32)
        tensors = [torch.cat([x] * batch) if x.dim() > 2 else x for x in tensors]
        torch.testing.assert_close(compiled(*tensors), function(*tensors))
    assert len(graphs) == 1


@pytest.mark.parametrize("name", NAMES)
def test_stride_zero_gradients(name):
    function, arguments = CALLS[name]
    leaves = [x.requires_grad_() for x in arguments(DOUBLE)]
    output = function(*leaves)
    grad = torch.tensor(0.5, dtype=DOUBLE).expand(output.shape)
    expanded = torch.autograd.grad(output, leaves, grad, retain_graph=True)
    contiguous = torch.autograd.grad(output, leaves, grad.contiguous())
    for a, b in zip(expanded, contiguous, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_functional_transforms(name):
    function, arguments = CALLS[name]
    tensors = arguments(DOUBLE)
    leaves = [x.clone().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    found = torch.func.grad(lambda *t: function(*t).square().sum(), tuple(range(len(tensors))))(
        *tensors
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    samples = torch.stack([tensors[0], tensors[0] * 2])
    mapped = torch.func.vmap(lambda x: function(x, *tensors[1:]))(samples)
    for sample, result in zip(samples, mapped, strict=True):
        torch.testing.assert_close(result, function(sample, *tensors[1:]))


@pytest.mark.parametrize("name", ["attention", "attention_varlen", "linear", "bilstm"])
def test_autocast_computes_in_its_dtype(name):
    function, arguments = CALLS[name]
    tensors = arguments(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = function(*tensors)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, function(*(x.bfloat16() for x in tensors)))


def test_layer_norm_under_autocast_takes_what_autocast_produces():
    x, residual, weight, bias = norm_arguments(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = ops.add_layer_norm(x.bfloat16(), residual, weight, bias, 1e-5)
    expected = ops.add_layer_norm(x.bfloat16().float(), residual, weight, bias, 1e-5)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing(name):
    function, arguments = CALLS[name]
    leaves = [x.requires_grad_() for x in arguments(DOUBLE)]
    plain = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    output = torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(output.square().sum(), leaves), plain, strict=True):
        assert torch.equal(a, b)


def test_checkpointing_repeats_the_dropout_mask():
    q, k, v = (x.requires_grad_() for x in attention_arguments(DOUBLE))

    def function(q, k, v):
        return ops.attention(q, k, v, dropout_p=0.5)

    torch.manual_seed(7)
    plain = torch.autograd.grad(function(q, k, v).square().sum(), (q, k, v))
    torch.manual_seed(7)
    output = torch.utils.checkpoint.checkpoint(function, q, k, v, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(output.square().sum(), (q, k, v)), plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", NAMES)
def test_second_device_while_another_is_current(name):
    function, arguments = CALLS[name]
    tensors = arguments(torch.float32)
    if name in ("attention", "linear", "add_layer_norm"):
        with torch.cuda.device(0):
            result = function(*(x.to("cuda:1") for x in tensors))
        with ops.use_backend("reference"):
            eager, exact = function(*tensors), function(*(x.double() for x in tensors))
        assert_matches(result.cpu(), eager, exact)
