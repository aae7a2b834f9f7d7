"""ops.lstm and ops.bilstm: the reference against torch.nn.LSTM and against the equations, step by step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ctxfast import ops, reference
from ctxfast.reference.lstm import round_weight

DOUBLE = torch.float64


def parameters(module: nn.LSTM, layer: int = 0, suffix: str = ""):
    """weight_ih, weight_hh, bias, weight_hr of one layer and direction."""
    get = lambda name: getattr(module, f"{name}_l{layer}{suffix}", None)  # noqa: E731
    return get("weight_ih"), get("weight_hh"), get("bias_ih") + get("bias_hh"), get("weight_hr")


def assert_equal_with_gradients(found, expected, leaves):
    weights = [torch.randn(x.shape, dtype=x.dtype) for x in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    one, two = (
        torch.autograd.grad(
            sum((x * w).sum() for x, w in zip(results, weights, strict=True)), leaves
        )
        for results in (found, expected)
    )
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("proj_size", [0, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_is_torchs_lstm_in_float64(backend, proj_size, bidirectional):
    module = nn.LSTM(
        5, 7, proj_size=proj_size, batch_first=True, bidirectional=bidirectional, dtype=DOUBLE
    )
    features, directions = proj_size or 7, 1 + bidirectional
    x = torch.randn(4, 6, 5, dtype=DOUBLE, requires_grad=True)
    h = torch.randn(directions, 4, features, dtype=DOUBLE, requires_grad=True)
    c = torch.randn(directions, 4, 7, dtype=DOUBLE, requires_grad=True)
    output, state = module(x, (h, c))
    with ops.use_backend(backend):
        if bidirectional:
            weights = [
                None if a is None else (a, b)
                for a, b in zip(
                    parameters(module), parameters(module, suffix="_reverse"), strict=True
                )
            ]
            found = ops.bilstm(x, *weights, initial_state=(h, c))
        else:
            out, hn, cn = ops.lstm(x, *parameters(module), initial_state=(h[0], c[0]))
            found = out, hn.unsqueeze(0), cn.unsqueeze(0)
        leaves = [x, h, c, *module.parameters()]
        assert_equal_with_gradients(found, (output, *state), leaves)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_lengths_are_those_of_packed_sequences(backend):
    module = nn.LSTM(5, 7, proj_size=3, batch_first=True, bidirectional=True, dtype=DOUBLE)
    x = torch.randn(4, 6, 5, dtype=DOUBLE, requires_grad=True)
    lengths = torch.tensor([3, 6, 1, 3])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
    output, state = module(packed)
    output = nn.utils.rnn.pad_packed_sequence(output, batch_first=True)[0]
    weights = list(zip(parameters(module), parameters(module, suffix="_reverse"), strict=True))
    with ops.use_backend(backend):
        found = ops.bilstm(x, *weights, lengths=lengths)
        assert_equal_with_gradients(found, (output, *state), [x, *module.parameters()])


def test_rounding_of_weights():
    weight = torch.tensor([[1.0, -127.0, 0.4], [0.0, 0.0, 0.0]])
    assert torch.equal(
        round_weight(weight, torch.int8), torch.tensor([[1.0, -127.0, 0.0], [0.0] * 3])
    )
    assert torch.equal(round_weight(weight, torch.bfloat16), weight.bfloat16().float())
    assert round_weight(weight, None) is weight
    random = torch.randn(5, 40, dtype=DOUBLE)
    step = random.abs().amax(1, keepdim=True) / 127
    assert ((round_weight(random, torch.int8) - random).abs() <= step / 2 * 1.0001).all()


def test_reference_function_is_the_operator():
    x = torch.randn(2, 4, 3, dtype=DOUBLE)
    weights = [torch.randn(s, dtype=DOUBLE) for s in ((20, 3), (20, 2), (20,), (2, 5))]
    options = {
        "lengths": torch.tensor([4, 2]),
        "cell_clip": 0.3,
        "proj_clip": 0.2,
        "residual": torch.randn(2, 4, 2, dtype=DOUBLE),
        "recurrent_dropout_p": 0.4,
        "seed": torch.tensor([5]),
        "reverse": True,
    }
    for a, b in zip(
        ops.lstm(x, *weights, **options), reference.lstm(x, *weights, **options), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.unpoisoned
def test_one_graph_for_all_shapes_and_lengths():
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    weights = [torch.randn(s, requires_grad=True) for s in ((20, 3), (20, 2), (20,), (2, 5))]

    def function(x, lengths):
        options = {"lengths": lengths, "cell_clip": 0.3, "proj_clip": 0.2}
        return ops.lstm(x, *weights, **options)[0]

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for batch, steps in ((7, 6), (3, 9), (2, 4)):
        x = torch.randn(batch, steps, 3)
        lengths = torch.randint(0, steps + 1, (batch,))
        assert_equal_with_gradients((compiled(x, lengths),), (function(x, lengths),), weights)
    assert len(graphs) == 1
