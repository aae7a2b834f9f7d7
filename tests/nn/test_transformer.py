"""TransformerEncoderLayer against torch.nn.TransformerEncoderLayer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from ctxfast import reference
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
    Twice,
    additive,
    caller,
    encoders,
    layers,
    ran,
    source,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True", "ignore:Support for mismatched"
)

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "GELU": nn.GELU(),
    "tanh GELU": nn.GELU("tanh"),
    "tanh": torch.tanh,
    "SiLU": nn.SiLU(),
    "own": lambda x: x.clamp(-1, 1) * 0.5,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_layer_activations(norm_first: bool, activation: str) -> None:
    bias = activation != "tanh"
    ours, theirs = layers(norm_first=norm_first, activation=ACTIVATIONS[activation], bias=bias)
    compare(ours, theirs, caller(src_key_padding_mask=PADDING), [source()])


LAYER_MASKS = {
    "none": {},
    "bool": {"src_mask": CAUSAL, "src_key_padding_mask": PADDING & (torch.arange(S) > 1)},
    "causal": {"src_mask": CAUSAL, "is_causal": True},
    "additive": {"src_mask": additive(CAUSAL)},
    "each head": {"src_mask": EACH, "src_key_padding_mask": PADDING},
}


@pytest.mark.parametrize("case", LAYER_MASKS)
@pytest.mark.parametrize("layout", ["batch first", "sequence first", "unbatched"])
def test_layer_masks(layout: str, case: str) -> None:
    """Padded positions too are what torch computes there."""
    batch_first = layout != "sequence first"
    ours, theirs = layers(batch_first=batch_first, norm_first=case == "bool")
    masks = dict(LAYER_MASKS[case])
    src = source(batch_first)
    if layout == "unbatched":
        src = src[0]
        masks = {k: v[:H] if k == "src_mask" and v is EACH else v for k, v in masks.items()}
        if "src_key_padding_mask" in masks:
            masks["src_key_padding_mask"] = masks["src_key_padding_mask"][0]
    compare(ours, theirs, caller(**masks), [src])


def test_own_submodules_hooks_and_parametrisations_count() -> None:
    src = source()
    for name in ("linear1", "linear2", "norm1", "norm2", "dropout", "dropout1", "dropout2"):
        ours, theirs = layers()
        for module in (ours, theirs):
            getattr(module, name).register_forward_hook(lambda m, args, output: output * 1.5)
        assert_equal(ours(src), theirs(src), name)
    for name in ("linear1", "norm2"):
        ours, theirs = encoders()
        for layer in ours.layers:
            parametrize.register_parametrization(getattr(layer, name), "weight", Twice())
        for layer in theirs.layers:
            getattr(layer, name).weight.data *= 2
        assert "attention_varlen" in ran(ours, src, src_key_padding_mask=PADDING)
        results = [m(src, src_key_padding_mask=PADDING)[~PADDING] for m in (ours, theirs)]
        assert_equal(*results, name)
    ours, theirs = layers()
    for module in (ours, theirs):
        module.linear1 = nn.Sequential(
            nn.Linear(E, 4, dtype=DOUBLE), nn.Linear(4, FF, dtype=DOUBLE)
        )
        module.norm1 = nn.LayerNorm(E, elementwise_affine=False)
    theirs.load_state_dict(ours.state_dict())
    assert_equal(ours(src), theirs(src))


@pytest.mark.parametrize("layout", ["batch first", "sequence first", "packed"])
def test_hidden_dropout_is_the_specified_one(layout: str) -> None:
    """Before a norm the mask is that of the reference at the coordinates of each token, in every layout."""
    batch_first = layout != "sequence first"
    ours, _ = layers(batch_first=batch_first)
    encoder = TransformerEncoder(ours, 1)
    layer = encoder.layers[0]
    layer.dropout1.p = 0.5
    src = source()
    given = src if batch_first else src.transpose(0, 1)
    padding = PADDING if layout == "packed" else torch.zeros_like(PADDING)
    torch.manual_seed(5)
    output = encoder(given, src_key_padding_mask=padding)
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, (1,))
    grid = src if batch_first else src.transpose(0, 1)
    attended = layer.self_attn(grid, grid, grid, key_padding_mask=padding)[0]
    attended = attended if batch_first else attended.transpose(0, 1)
    sequences = torch.arange(B)[:, None].expand(B, S)
    positions = ((~padding).cumsum(1) - 1).clamp(min=0)  # inside the sequence, padding not counted
    if not batch_first:
        attended = layer.self_attn(given, given, given)[0].transpose(0, 1)
    dropped = reference.dropout.hidden_dropout(attended, 0.5, seed, sequences, positions)
    x = layer.norm1(src + dropped)
    expected = layer.norm2(x + layer.linear2(F.relu(layer.linear1(x))))
    output = output if batch_first else output.transpose(0, 1)
    assert_equal(output[~padding], expected[~padding])
    assert not torch.equal(dropped, attended)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("name", ["dropout", "dropout1", "dropout2"])
def test_dropout_statistics(name: str, norm_first: bool) -> None:
    """What one dropout drops, seen alone: the share of zeros is binomial, the rest is rescaled."""
    p, size = 0.3, 64
    layer = TransformerEncoderLayer(size, 2, size, 0.0, norm_first=norm_first, dtype=DOUBLE)
    getattr(layer, name).p = p
    # Constant branches, and norms that show what they are given: only dropout makes a difference.
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        if name == "dropout1":
            layer.self_attn.out_proj.bias.fill_(1.0)
        elif name == "dropout2":
            layer.linear2.bias.fill_(1.0)
        else:
            layer.linear1.bias.fill_(1.0)
            layer.linear2.weight.copy_(torch.eye(size))
        layer.norm1.weight.fill_(1.0), layer.norm2.weight.fill_(1.0)
    x = torch.zeros(32, 16, size, dtype=DOUBLE)
    output = layer(x)
    kept = output > 0
    sigma = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.double().mean() - (1 - p)) < 5 * sigma
    if norm_first:
        assert_equal(output, kept.double() / (1 - p))
    assert not torch.equal(layer(x), output)
    assert torch.equal(layer.eval()(x) > 0, torch.full_like(kept, norm_first))
