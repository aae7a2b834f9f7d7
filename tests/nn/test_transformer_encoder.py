"""TransformerEncoder against torch.nn.TransformerEncoder."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ctxfast import explain
from ctxfast import nn as fast
from ctxfast.nn import TransformerEncoder, TransformerEncoderLayer
from tests.nn.comparison import DOUBLE, assert_equal, compare
from tests.nn.transformer_cases import (
    CAUSAL,
    EACH,
    FF,
    PADDING,
    B,
    E,
    H,
    S,
    additive,
    caller,
    encoders,
    ran,
    source,
)
from tests.oracle import CAPS

pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True",
    "ignore:Support for mismatched",
    "ignore:The PyTorch API of nested tensors",
)

ENCODER_MASKS = {
    "padding": {},
    "detected": {"mask": CAUSAL},
    "detected additive": {"mask": additive(CAUSAL)},
    "causal": {"mask": CAUSAL, "is_causal": True},
    "additive": {"mask": torch.linspace(-2, 2, S * S, dtype=DOUBLE).view(S, S)},
    "each head": {"mask": EACH},
}
LEFT_FREE = PADDING & (torch.arange(S) > 0)  # a causal mask leaves every row a key


@pytest.mark.parametrize("case", ENCODER_MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_encoder_on_packed_tokens(norm_first: bool, batch_first: bool, case: str) -> None:
    ours, theirs = encoders(norm=case != "causal", norm_first=norm_first, batch_first=batch_first)
    src, masks = source(batch_first), ENCODER_MASKS[case]
    padding = LEFT_FREE if batch_first else LEFT_FREE.t()
    compare(ours, theirs, caller(padding, src_key_padding_mask=LEFT_FREE, **masks), [src])
    output = ours(src, src_key_padding_mask=LEFT_FREE, **masks)
    assert not output[padding].any() and output.is_contiguous()
    assert ours.last_padding == pytest.approx(LEFT_FREE.double().mean().item())


def test_which_encoders_pack() -> None:
    ours, _ = encoders()
    src, packed = source(), {"attention_varlen"}
    attention = {"attention", "attention_varlen"}
    mask = {"src_key_padding_mask": PADDING}
    assert ran(ours, src, **mask) & attention == packed
    assert ran(ours, src, src_key_padding_mask=additive(PADDING)) & attention == packed
    assert ran(ours, src, mask=CAUSAL, **mask) & attention == packed
    assert ran(ours, src, mask=EACH, **mask) & attention == {"attention"}
    weighted = additive(PADDING) + torch.linspace(0, 1, S, dtype=DOUBLE)
    assert ran(ours, src, src_key_padding_mask=weighted) & attention == {"attention"}
    assert ran(ours, src, src_key_padding_mask=PADDING[2:].expand(B, S)) & attention == {
        "attention"
    }
    assert explain(ours, src, **mask).padding == pytest.approx(PADDING.double().mean().item())
    for change in (
        lambda m: m.layers[1].linear1.register_forward_hook(lambda *_: None),
        lambda m: m.layers[0].register_forward_pre_hook(lambda *_: None),
        lambda m: setattr(m.layers[1], "activation", lambda x: x.relu()),
        lambda m: setattr(m.layers[1], "norm2", nn.Identity()),
    ):
        changed = copy.deepcopy(ours)
        change(changed)
        assert ran(changed, src, **mask) & attention == {"attention"}


@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_on_the_padded_grid(batch_first: bool) -> None:
    """The same results where a layer has a part of the user's own."""
    ours, theirs = encoders(batch_first=batch_first, activation=lambda x: x.relu())
    src = source(batch_first)
    padding = PADDING if batch_first else PADDING.t()
    weighted = additive(PADDING) + torch.linspace(0, 1, S, dtype=DOUBLE)
    for mask in (PADDING, additive(PADDING), weighted):
        compare(ours, theirs, caller(padding, src_key_padding_mask=mask), [src])
        assert not ours(src, src_key_padding_mask=mask)[padding].any()


def test_encoder_without_unpadding_is_torch_s_everywhere() -> None:
    ours, theirs = encoders(activation="gelu")
    ours.use_nested_tensor = theirs.use_nested_tensor = False
    compare(ours, theirs, caller(src_key_padding_mask=PADDING), [source()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = TransformerEncoderLayer(E, H, FF, norm_first=True)
        assert TransformerEncoder(layer, 1).use_nested_tensor
        assert not TransformerEncoder(layer, 1, enable_nested_tensor=False).use_nested_tensor


def test_encoder_unbatched_and_without_padding() -> None:
    ours, theirs = encoders()
    src = source()
    compare(ours, theirs, caller(PADDING[0], src_key_padding_mask=PADDING[0]), [src[0]])
    compare(ours, theirs, caller(src_key_padding_mask=torch.zeros(B, S).bool()), [src])
    compare(ours, theirs, caller(mask=CAUSAL), [src])


@pytest.mark.parametrize("packs", [True, False])
def test_nothing_in_padding_has_influence(packs: bool) -> None:
    """Not even NaN; and a sequence of padding alone is zero and has no gradient."""
    ours, _ = encoders(activation="relu" if packs else lambda x: x.relu())
    src, padding = source(), PADDING.clone()
    padding[2] = True
    found = []
    for value in (0.0, torch.nan):
        x = src.masked_fill(padding[..., None], value).requires_grad_()
        output = ours(x, src_key_padding_mask=padding)
        found.append((output, *torch.autograd.grad(output.square().sum(), [x, *ours.parameters()])))
    for zero, nan in zip(*found, strict=True):
        assert torch.equal(zero, nan)
    assert not found[0][0][padding].any() and not found[0][1][padding].any()
    everything = torch.ones(B, S, dtype=torch.bool)
    assert not ours(src, src_key_padding_mask=everything).any()


def test_layers_of_torch_are_converted() -> None:
    _, theirs = encoders(dropout=0.1)
    theirs.eval()
    src, arguments = source(), {"src_key_padding_mask": PADDING}
    valid = ~PADDING
    expected = theirs(src, **arguments)
    ours = TransformerEncoder.from_torch(theirs)
    assert all(a is b for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not ours.training and type(ours.layers[0].self_attn) is fast.MultiheadAttention
    assert "attention_varlen" in ran(ours, src, **arguments)
    assert_equal(ours(src, **arguments)[valid], expected[valid])
    layer = TransformerEncoderLayer.from_torch(theirs.layers[0])
    assert_equal(layer(src), theirs.layers[0](src))
    copied = TransformerEncoder(theirs.layers[0], 2, theirs.norm)
    assert type(copied.layers[1]) is TransformerEncoderLayer
    assert copied.layers[0].linear1.weight is not theirs.layers[0].linear1.weight
    copied.load_state_dict(theirs.state_dict())
    assert_equal(copied.eval()(src, **arguments)[valid], expected[valid])


class OwnLayer(nn.TransformerEncoderLayer):
    """A user's layer, which counts on additive masks, as torch's encoder passes them."""

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        assert src_key_padding_mask.is_floating_point() and src_mask.is_floating_point()
        return super().forward(src, src_mask, src_key_padding_mask, is_causal) + 1


class OwnBlock(TransformerEncoderLayer):
    def _ff_block(self, x: Tensor) -> Tensor:
        return super()._ff_block(x) * 2


def test_own_layers_stay() -> None:
    torch.manual_seed(1)
    arguments = {"batch_first": True, "dtype": DOUBLE, "dropout": 0.0}
    src, valid = source(), ~PADDING
    own = OwnLayer(E, H, FF, **arguments)
    ours, theirs = TransformerEncoder(own, 2), nn.TransformerEncoder(own, 2)
    assert type(ours.layers[0]) is OwnLayer
    results = [m(src, mask=EACH, src_key_padding_mask=PADDING) for m in (ours, theirs)]
    assert_equal(results[0][valid], results[1][valid])
    block = OwnBlock(E, H, FF, **arguments)
    plain = TransformerEncoderLayer(E, H, FF, **arguments)
    plain.load_state_dict(block.state_dict())
    doubled = copy.deepcopy(plain)
    doubled.linear2.weight.data *= 2
    doubled.linear2.bias.data *= 2
    assert_equal(block(src), doubled(src))
    results = [
        TransformerEncoder(m, 2)(src, src_key_padding_mask=PADDING) for m in (block, doubled)
    ]
    assert_equal(*results)


def test_parameters_and_state_are_torch_s() -> None:
    for norm_first in (False, True):
        found = []
        for encoder, layer in (
            (TransformerEncoder, TransformerEncoderLayer),
            (nn.TransformerEncoder, nn.TransformerEncoderLayer),
        ):
            torch.manual_seed(7)
            found.append(encoder(layer(E, H, FF, norm_first=norm_first), 2, nn.LayerNorm(E)))
        ours, theirs = found
        assert isinstance(ours, nn.TransformerEncoder)
        assert isinstance(ours.layers[0], nn.TransformerEncoderLayer)
        pairs = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
        assert all(n == m and torch.equal(a, b) for (n, a), (m, b) in pairs)
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
    nn.Transformer(E, H, 1, 1, custom_encoder=ours)(torch.randn(4, B, E), torch.randn(5, B, E))


def test_deepcopy_and_pickle() -> None:
    ours = encoders()[0].float().eval()
    src = source().float()
    with torch.no_grad():
        expected = ours(src, src_key_padding_mask=PADDING)
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert fast.packed_bytes(other) == 0
            assert torch.equal(other(src, src_key_padding_mask=PADDING), expected)


def test_training_with_dropout_and_checkpointing() -> None:
    ours, _ = encoders(dropout=0.2)
    src = source()
    found = []
    for run in (ours, lambda *args: checkpoint(ours, *args, use_reentrant=False)):
        torch.manual_seed(4)
        ours.zero_grad()
        output = run(src, None, PADDING)
        output.square().sum().backward()
        found.append([output, *(p.grad.clone() for p in ours.parameters())])
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def test_functional_gradients() -> None:
    ours, _ = encoders()
    src = source()
    parameters = dict(ours.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        arguments = (src, None, PADDING)
        return torch.func.functional_call(ours, parameters, arguments).square().sum()

    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    found = torch.func.grad(loss)({n: p.detach() for n, p in parameters.items()})
    for name, value in zip(parameters, expected, strict=True):
        assert_equal(found[name], value, name)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_autocast(norm_first: bool) -> None:
    ours, theirs = encoders(norm_first=norm_first)
    src = source().float()
    exact = theirs(src.double(), src_key_padding_mask=PADDING)[~PADDING]
    with torch.autocast("cpu", torch.bfloat16):
        output, eager = (
            m.float()(src, src_key_padding_mask=PADDING)[~PADDING] for m in (ours, theirs)
        )
    assert output.dtype == eager.dtype
    error, allowed = ((o.double() - exact).abs().max() for o in (output, eager))
    assert error <= 2 * (allowed + torch.finfo(torch.bfloat16).eps * exact.abs().max())


@pytest.mark.unpoisoned
@pytest.mark.parametrize("training", [True, False])
def test_one_graph(training: bool) -> None:
    dtype = DOUBLE if training else torch.float32
    ours = encoders(dropout=0.2)[0].to(dtype).train(training)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=backend)
    with torch.set_grad_enabled(training):
        for size in (3, 5, 8):
            src = torch.randn(size, 2 * size, E, dtype=dtype)
            padding = torch.rand(size, 2 * size) < 0.3
            padding[:, 0] = False
            output = compiled(src, src_key_padding_mask=padding)
            assert not output[padding].any() and output[~padding].all()
            if not training:
                expected = ours(src, src_key_padding_mask=padding)
                assert (output - expected).abs().max() <= CAPS[dtype] * expected.abs().max()
    assert len(graphs) == 1


def test_nested_tensors_run_in_torch() -> None:
    ours, theirs = (m.eval() for m in encoders())
    src = torch.nested.nested_tensor(
        [torch.randn(3, E, dtype=DOUBLE), torch.randn(5, E, dtype=DOUBLE)]
    )
    with torch.no_grad():
        for a, b in zip(ours(src).unbind(), theirs(src).unbind(), strict=True):
            assert torch.equal(a, b)


def test_errors() -> None:
    ours, _ = encoders()
    src = source()
    with pytest.raises(ValueError, match=r"src_key_padding_mask must be .*\(3, 6\).*, got"):
        ours(src, src_key_padding_mask=PADDING[:, 1:])
    with pytest.raises(TypeError, match="src_key_padding_mask must be bool or floating"):
        ours(src, src_key_padding_mask=PADDING.int())
    for padding in (PADDING, None):
        with pytest.raises(ValueError, match="must be given with is_causal=True"):
            ours(src, src_key_padding_mask=padding, is_causal=True)
    with pytest.raises(ValueError, match="attn_mask must be"):
        ours(src, mask=CAUSAL[1:])
