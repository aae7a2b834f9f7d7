"""MultiheadAttention against torch.nn.MultiheadAttention."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ctxfast.nn import MultiheadAttention, PackedLinear, packed_bytes
from ctxfast.ops import _dispatch
from tests.nn.comparison import DOUBLE, assert_equal, compare, twin
from tests.oracle import assert_matches

E, H, B, L, S = 24, 3, 2, 5, 7  # features, heads, batch, queries, keys
PADDING = torch.tensor([[False] * 5 + [True] * 2, [True, False, False, True] + [False] * 3])
CAUSAL = torch.ones(L, S, dtype=torch.bool).triu(1)


def modules(**arguments) -> tuple[nn.Module, nn.Module]:
    arguments = {"dtype": DOUBLE, **arguments}
    return twin(MultiheadAttention(E, H, **arguments), nn.MultiheadAttention(E, H, **arguments))


def tensors(batch_first: bool = True, kdim: int = E, vdim: int = E) -> list[Tensor]:
    shapes = ((B, L, E), (B, S, kdim), (B, S, vdim))
    inputs = [torch.randn(shape, dtype=DOUBLE) for shape in shapes]
    return inputs if batch_first else [x.transpose(0, 1).contiguous() for x in inputs]


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=DOUBLE).masked_fill(mask, -torch.inf)


def caller(**arguments):
    """A call with these arguments, floating ones in the dtype of the inputs."""

    def call(module: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
        query, key, value = inputs * 3 if len(inputs) == 1 else inputs
        cast = {
            k: v.to(query.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in arguments.items()
        }
        output, weights = module(query, key, value, **cast)
        return (output,) if weights is None else (output, weights)

    return call


def mask_cases() -> dict[str, dict]:
    generator = torch.Generator().manual_seed(5)
    each = torch.rand(B * H, L, S, generator=generator) < 0.4
    each[..., 2] = False  # a key that is no padding
    noise = torch.randn(B * H, L, S, generator=generator, dtype=DOUBLE)
    return {
        "none": {},
        "padding": {"key_padding_mask": PADDING},
        "additive padding": {"key_padding_mask": additive(PADDING)},
        "weighted padding": {"key_padding_mask": additive(PADDING) + noise[0, :1]},
        "bool": {"attn_mask": CAUSAL},
        "causal": {"attn_mask": CAUSAL, "is_causal": True},
        "causal and padding": {
            "attn_mask": CAUSAL.clone(),
            "is_causal": True,
            "key_padding_mask": PADDING & (torch.arange(S) > 3),
        },
        "additive": {"attn_mask": additive(CAUSAL)},
        "bool of each head": {"attn_mask": each},
        "additive of each head": {"attn_mask": noise + additive(each)},
        "both bool": {"attn_mask": each, "key_padding_mask": PADDING},
        "both additive": {"attn_mask": noise, "key_padding_mask": additive(PADDING) + noise[1, :1]},
    }


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("need_weights", [False, True], ids=["fused", "weights"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("case", mask_cases())
def test_masks(case: str, batch_first: bool, need_weights: bool) -> None:
    ours, theirs = modules(batch_first=batch_first)
    call = caller(**mask_cases()[case], need_weights=need_weights, average_attn_weights=batch_first)
    compare(ours, theirs, call, tensors(batch_first))


@pytest.mark.parametrize(
    "arguments",
    [
        {"bias": False},
        {"kdim": 10, "vdim": 12},
        {"kdim": 10, "vdim": 12, "bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    ],
    ids=str,
)
def test_constructor_arguments(arguments: dict) -> None:
    ours, theirs = modules(batch_first=True, **arguments)
    inputs = tensors(kdim=arguments.get("kdim", E), vdim=arguments.get("vdim", E))
    for need_weights in (False, True):
        call = caller(key_padding_mask=PADDING, need_weights=need_weights)
        compare(ours, theirs, call, inputs)


@pytest.mark.parametrize("batch_first", [True, False])
def test_shared_inputs(batch_first: bool) -> None:
    """Self-attention, and keys that are the values, run their projections as one product."""
    ours, theirs = modules(batch_first=batch_first)
    query, key, _ = tensors(batch_first)
    compare(ours, theirs, caller(need_weights=False), [query])
    pair = lambda module, q, k: module(q, k, k, need_weights=False)[:1]
    compare(ours, theirs, pair, [query, key])


@pytest.mark.parametrize("need_weights", [False, True])
def test_unbatched(need_weights: bool) -> None:
    ours, theirs = modules(batch_first=True)
    inputs = [x[0] for x in tensors()]
    for masks in (
        {},
        {"attn_mask": CAUSAL, "key_padding_mask": PADDING[0]},
        {"attn_mask": torch.randn(H, L, S, dtype=DOUBLE)},
    ):
        for average in (True, False):
            call = caller(**masks, need_weights=need_weights, average_attn_weights=average)
            compare(ours, theirs, call, inputs)


def test_attn_mask_gets_its_gradient() -> None:
    ours, theirs = modules(batch_first=True)
    inputs = tensors()
    found = []
    for module in (ours, theirs):
        mask = torch.linspace(-1, 1, L * S, dtype=DOUBLE).view(L, S).requires_grad_()
        module(*inputs, attn_mask=mask, need_weights=False)[0].square().sum().backward()
        found.append(mask.grad)
    assert_equal(*found)


def test_causal_is_taken_at_its_word() -> None:
    ours, theirs = modules(batch_first=True)
    inputs = tensors()
    expected = theirs(*inputs, attn_mask=CAUSAL, need_weights=False)[0]
    anything = torch.zeros(L, S, dtype=torch.bool)
    for need_weights in (False, True):
        output = ours(*inputs, attn_mask=anything, is_causal=True, need_weights=need_weights)[0]
        assert_equal(output, expected)


def blocked_row(floating: bool) -> Tensor:
    mask = CAUSAL.clone()
    mask[3] = True
    return additive(mask) if floating else mask


@pytest.mark.parametrize("floating", [False, True], ids=["bool", "additive"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_rows_without_a_key(need_weights: bool, floating: bool) -> None:
    """Zero weights, hence the bias of out_proj; finite gradients, and zero for the query of the row."""
    ours, theirs = modules(batch_first=True)
    inputs = [x.requires_grad_() for x in tensors()]
    mask = blocked_row(floating)
    output, weights = ours(*inputs, attn_mask=mask, need_weights=need_weights)
    expected, _ = theirs(*inputs, attn_mask=CAUSAL)
    kept = [0, 1, 2, 4]
    assert_equal(output[:, kept], expected[:, kept])
    assert_equal(output[:, 3], ours.out_proj.bias.expand(B, E))
    assert weights is None or not weights[:, 3].any()
    found = torch.autograd.grad(output.square().sum(), [*inputs, *ours.parameters()])
    assert all(torch.isfinite(g).all() for g in found)
    assert not found[0][:, 3].any()
    # A sequence of padding alone is the same for all of its rows.
    padding = PADDING.clone()
    padding[1] = True
    output = ours(*inputs, key_padding_mask=padding, need_weights=need_weights)[0]
    assert_equal(output[1], ours.out_proj.bias.expand(L, E))


@pytest.mark.parametrize("floating", [False, True], ids=["bool", "additive"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_nan_in_padding_stays_there(need_weights: bool, floating: bool) -> None:
    ours, _ = modules(batch_first=True)
    query, key, value = tensors()
    mask = additive(PADDING) if floating else PADDING
    expected = ours(query, key, value, key_padding_mask=mask, need_weights=need_weights)[0]
    key, value = (x.masked_fill(PADDING[..., None], torch.nan) for x in (key, value))
    output = ours(query, key, value, key_padding_mask=mask, need_weights=need_weights)[0]
    assert torch.equal(output, expected)


def test_parameters_and_state_are_torch_s() -> None:
    for arguments in ({}, {"kdim": 4, "bias": False}, {"add_bias_kv": True}):
        torch.manual_seed(7)
        theirs = nn.MultiheadAttention(E, H, **arguments)
        torch.manual_seed(7)
        ours = MultiheadAttention(E, H, **arguments)
        assert isinstance(ours, nn.MultiheadAttention)
        pairs = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
        assert all(n == m and torch.equal(a, b) for (n, a), (m, b) in pairs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())


def test_from_torch_shares_parameters() -> None:
    _, theirs = modules(batch_first=True, dropout=0.5)
    theirs.eval()
    ours = MultiheadAttention.from_torch(theirs)
    assert type(ours) is MultiheadAttention and not ours.training and ours.dropout == 0.5
    assert all(a is b for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    inputs = tensors()
    assert_equal(ours(*inputs)[0], theirs(*inputs)[0])


def test_dropout_statistics() -> None:
    """Weights are dropped with probability p and rescaled; heads, rows and draws are independent."""
    p, size = 0.3, 64
    ours = MultiheadAttention(E, H, dropout=p, batch_first=True, dtype=DOUBLE)
    x = torch.randn(8, size, E, dtype=DOUBLE)
    weights = ours(x, x, x, average_attn_weights=False)[1]
    kept = (weights != 0).double()
    full = ours.eval()(x, x, x, average_attn_weights=False)[1]
    realised = 1 - round(p * 65536) / 65536
    assert_equal(weights, kept * full / realised)
    sigma = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 5 * sigma
    for other in (kept.roll(1, 0), kept.roll(1, 1), kept.roll(1, 2), kept.roll(1, 3)):
        correlation = ((kept - (1 - p)) * (other - (1 - p))).mean() / (p * (1 - p))
        assert abs(correlation) < 5 / kept.numel() ** 0.5
    again = ours.train()(x, x, x, average_attn_weights=False)[1] != 0
    both = (again.double() * kept).mean()
    assert abs(both - (1 - p) ** 2) < 5 * sigma


def test_dropout_is_the_same_with_and_without_weights() -> None:
    ours, _ = modules(batch_first=True, dropout=0.4)
    inputs = [x.requires_grad_() for x in tensors()]
    found = []
    for need_weights in (False, True):
        torch.manual_seed(11)
        output = ours(*inputs, key_padding_mask=PADDING, need_weights=need_weights)[0]
        found.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    for fused, explicit in zip(*found, strict=True):
        assert_equal(fused, explicit)


def test_inference_packs_and_training_unpacks() -> None:
    ours, theirs = modules(batch_first=True, dtype=torch.float32)
    ours.eval(), theirs.eval()
    exact = copy.deepcopy(theirs).to(DOUBLE)
    x = torch.randn(B, L, E)
    wide = x.to(DOUBLE)
    with torch.no_grad():
        output = ours(x, x, x, need_weights=False)[0]
        assert_matches(output, theirs(x, x, x)[0], exact(wide, wide, wide)[0])
        if packed_bytes(ours) == 0:
            pytest.skip("nothing to pack for on this machine")
        ours.in_proj_weight.mul_(2)
        theirs.in_proj_weight.mul_(2)
        exact.in_proj_weight.mul_(2)
        output = ours(x, x, x, need_weights=False)[0]
        assert_matches(output, theirs(x, x, x)[0], exact(wide, wide, wide)[0])
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert packed_bytes(other) == 0
        assert torch.equal(other(x, x, x)[0], ours(x, x, x)[0])
    assert packed_bytes(ours) == 0  # that call recorded gradients


class Doubled(PackedLinear):
    def forward(self, input: Tensor, activation: str | None = None) -> Tensor:
        return 2 * super().forward(input, activation)


class Twice(nn.Module):
    def forward(self, parameter: Tensor) -> Tensor:
        return 2 * parameter


def test_own_submodules_hooks_and_parametrisations_count() -> None:
    ours, theirs = modules(batch_first=True)
    x = tensors()[0]
    expected = theirs(x, x, x)[0]
    handle = ours.out_proj.register_forward_hook(lambda module, args, output: output + 1)
    assert_equal(ours(x, x, x, need_weights=False)[0], expected + 1)
    handle.remove()
    parametrize.register_parametrization(ours, "in_proj_weight", Twice())
    theirs.in_proj_weight.data *= 2
    assert_equal(ours(x, x, x, need_weights=False)[0], theirs(x, x, x)[0])
    parametrize.remove_parametrizations(ours, "in_proj_weight")
    own = Doubled(E, E, dtype=DOUBLE)
    own.load_state_dict(ours.out_proj.state_dict())
    ours.out_proj = own
    assert_equal(ours(x, x, x, need_weights=False)[0], 2 * theirs(x, x, x)[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_run_in_torch() -> None:
    ours, theirs = modules(batch_first=True, dtype=torch.float32)
    ours.eval(), theirs.eval()
    ours.num_heads = theirs.num_heads = 4
    ours.head_dim = theirs.head_dim = E // 4
    x = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    with torch.no_grad():
        output, expected = (m(x, x, x, need_weights=False)[0] for m in (ours, theirs))
    for a, b in zip(output.unbind(), expected.unbind(), strict=True):
        assert torch.equal(a, b)


def test_autocast() -> None:
    ours, theirs = modules(batch_first=True)
    inputs = [x.float() for x in tensors()]
    exact = theirs(*(x.double() for x in inputs), need_weights=False)[0]
    ours, theirs = ours.float(), theirs.float()
    for need_weights in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            output = ours(*inputs, need_weights=need_weights)[0]
            eager = theirs(*inputs, need_weights=need_weights)[0]
        assert output.dtype == eager.dtype == torch.bfloat16
        error, allowed = ((o.double() - exact).abs().max() for o in (output, eager))
        assert error <= 2 * (allowed + torch.finfo(torch.bfloat16).eps * exact.abs().max())


@pytest.mark.unpoisoned
def test_one_graph() -> None:
    ours, _ = modules(batch_first=True, dropout=0.2)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=backend)
    for size in (3, 5, 8):
        x = torch.randn(size, 2 * size, E, dtype=DOUBLE)
        padding = torch.rand(size, 2 * size) < 0.3
        found = []
        for module in (compiled, ours):
            torch.manual_seed(2)
            found.append(module(x, x, x, key_padding_mask=padding, need_weights=False)[0])
        assert_equal(*found)
    assert len(graphs) == 1


def test_the_fused_operator_runs() -> None:
    ours, _ = modules(batch_first=True)
    with _dispatch.record() as verdicts:
        ours(*tensors(), need_weights=False)
    assert "attention" in {v.operator for v in verdicts}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"query": torch.zeros(B, L, 8)}, ValueError, r"query must be \[batch, sequence, 24\]"),
        ({"query": torch.zeros(1, B, L, E)}, ValueError, "query must be"),
        ({"key": torch.zeros(S, E)}, ValueError, "key must be"),
        ({"value": torch.zeros(B, S + 1, E)}, ValueError, r"value must be \[2, 7, 24\]"),
        ({"query": torch.zeros(B + 1, L, E)}, ValueError, "key must have the batch size of query"),
        (
            {"attn_mask": torch.zeros(S, L)},
            ValueError,
            r"attn_mask must be \(5, 7\) or \(6, 5, 7\)",
        ),
        ({"attn_mask": torch.zeros(L, S).int()}, TypeError, "attn_mask must be bool or floating"),
        ({"key_padding_mask": PADDING[:1]}, ValueError, r"key_padding_mask must be \(2, 7\)"),
        ({"is_causal": True}, ValueError, "attn_mask must be given with is_causal=True"),
    ],
)
def test_errors(arguments: dict, error: type[Exception], message: str) -> None:
    ours = MultiheadAttention(E, H, batch_first=True)
    inputs = {"query": torch.zeros(B, L, E), "key": torch.zeros(B, S, E)}
    inputs["value"] = inputs["key"]
    with pytest.raises(error, match=message):
        ours(**{**inputs, **arguments})
