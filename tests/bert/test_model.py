"""BertModel against transformers.BertModel in float32, and against itself in another layout."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from ctxfast import PackedBatch
from ctxfast.bert import BertConfig, BertModel
from ctxfast.nn import set_packing
from ctxfast.ops import _native

transformers = pytest.importorskip("transformers")

from tests.bert.model_cases import SMALL, TOLERANCE, assert_valid_equal, batch, pair  # noqa: E402


def test_initial_values() -> None:
    model = BertModel(BertConfig(**{**SMALL, "vocab_size": 3000, "initializer_range": 0.05}))
    word = model.embeddings.word_embeddings.weight
    assert not word[0].any()
    assert abs(word[1:].std().item() - 0.05) < 0.001
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "LayerNorm" in name:
            assert parameter.eq(1).all(), name
        else:
            assert parameter.isfinite().all() and 0.03 < parameter.std() < 0.07, name


def test_names_and_shapes_are_those_of_transformers() -> None:
    for pooling in (True, False):
        theirs = transformers.BertModel(
            transformers.BertConfig(**SMALL), add_pooling_layer=pooling
        ).state_dict()
        ours = BertModel(BertConfig(**SMALL), add_pooling_layer=pooling).state_dict()
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


@pytest.mark.parametrize("seed", range(8))
def test_random_configurations(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    heads, head_size = rng.choice([1, 2, 3, 5]), rng.choice([8, 10, 16, 33, 64])
    ours, theirs = pair(
        hidden_size=heads * head_size,
        num_attention_heads=heads,
        num_hidden_layers=rng.choice([1, 2, 3]),
        intermediate_size=rng.choice([7, 32, 100]),
        type_vocab_size=rng.choice([1, 2, 3]),
        hidden_act=rng.choice(["gelu", "gelu_new", "gelu_pytorch_tanh", "tanh", "relu", "silu"]),
        layer_norm_eps=rng.choice([1e-12, 1e-5]),
        initializer_range=0.1,
    )
    width = rng.randint(2, 24)
    lengths = [rng.randint(1, width) for _ in range(rng.choice([1, 2, 5, 9]))]
    ids, mask = batch(lengths, width)
    types = torch.randint(ours.config.type_vocab_size, ids.shape)
    with torch.no_grad():
        got = ours(ids, mask, types)
        padded = theirs(ids, mask, types)
        assert_valid_equal(got.last_hidden_state, padded.last_hidden_state, mask)
        assert (got.pooler_output - padded.pooler_output).abs().max() <= TOLERANCE
        for b, length in enumerate(lengths):
            alone = theirs(ids[b : b + 1, :length], token_type_ids=types[b : b + 1, :length])
            row = got.last_hidden_state[b, :length]
            assert (row - alone.last_hidden_state[0]).abs().max() <= TOLERANCE


MASKS = {
    "right": [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0, 1], [0, 1, 1, 0, 0]],
    "ones": [[1] * 5] * 2,
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_padding_anywhere(name: str, dtype: torch.dtype) -> None:
    ours, theirs = pair()
    mask = torch.tensor(MASKS[name])
    ids = torch.randint(1, 60, mask.shape)
    with torch.no_grad():
        got = ours(ids, mask.to(dtype))
        expected = theirs(ids, mask)
    assert_valid_equal(got.last_hidden_state, expected.last_hidden_state, mask)
    first = mask.argmax(1)
    pooled = theirs.pooler(expected.last_hidden_state[torch.arange(2), first][:, None])
    assert (got.pooler_output - pooled).abs().max() <= TOLERANCE


def test_no_mask_and_given_positions() -> None:
    ours, theirs = pair()
    ids, _ = batch([9, 9, 9], 9)
    positions = torch.randint(24, (3, 9))
    with torch.no_grad():
        assert_valid_equal(ours(ids)[0], theirs(ids)[0], torch.ones(3, 9))
        for given in (positions, positions[:1], positions[0]):
            expected = theirs(ids, position_ids=given.view(-1, 9))[0]
            assert_valid_equal(ours(ids, position_ids=given)[0], expected, torch.ones(3, 9))


def test_embeddings_in_place_of_ids() -> None:
    ours, theirs = pair()
    ids, mask = batch([4, 7], 7)
    embeds = torch.randn(2, 7, 32)
    types = torch.randint(2, (2, 7))
    with torch.no_grad():
        expected = theirs(inputs_embeds=embeds, attention_mask=mask, token_type_ids=types)
        embeds[mask == 0] = float("nan")
        got = ours(inputs_embeds=embeds, attention_mask=mask, token_type_ids=types)
        same = ours(inputs_embeds=ours.get_input_embeddings()(ids), attention_mask=mask)
        direct = ours(ids, mask)
    assert_valid_equal(got[0], expected[0], mask)
    assert_valid_equal(same[0], direct[0], mask)


def test_a_row_without_tokens() -> None:
    ours, _ = pair()
    ids, mask = batch([3, 0, 5], 5)
    with torch.no_grad():
        got, rest = ours(ids, mask), ours(ids[::2], mask[::2])
        assert not got.last_hidden_state[1].any()
        assert (got.pooler_output[1] - torch.tanh(ours.pooler.dense.bias)).abs().max() < 1e-6
        assert (got.last_hidden_state[::2] - rest.last_hidden_state).abs().max() <= TOLERANCE
        nothing = ours(ids, torch.zeros_like(mask), output_hidden_states=True)
        assert not nothing.last_hidden_state.any()
        assert nothing.hidden_states[0].shape == (3, 5, 32)
        empty = ours(ids[:0])
        assert empty.last_hidden_state.shape == (0, 5, 32)
        assert empty.pooler_output.shape == (0, 32)


@pytest.mark.parametrize("name", ["right", "holes", "ones", None])
def test_hidden_states_and_attentions(name: str | None) -> None:
    ours, theirs = pair()
    theirs.set_attn_implementation("eager")
    ids = torch.randint(1, 60, (2, 5))
    mask = None if name is None else torch.tensor(MASKS[name])
    with torch.no_grad():
        got = ours(ids, mask, output_hidden_states=True, output_attentions=True)
        expected = theirs(ids, mask, output_hidden_states=True, output_attentions=True)
        plain = ours(ids, mask)
    valid = torch.ones(2, 5) if mask is None else mask
    for mine, other in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert_valid_equal(mine, other, valid)
    for mine, other in zip(got.attentions, expected.attentions, strict=True):
        assert_valid_equal(mine.transpose(1, 2), other.transpose(1, 2), valid)
    assert_valid_equal(plain.last_hidden_state, got.last_hidden_state, valid)
    assert torch.equal(got.last_hidden_state, got.hidden_states[-1])


@pytest.mark.parametrize("shape", [(2, 1, 5, 5), (2, 4, 5, 5), (1, 1, 5, 5), (2, 1, 1, 5)])
def test_four_dimensional_masks(shape: tuple[int, ...]) -> None:
    ours, theirs = pair()
    ids = torch.randint(1, 60, (2, 5))
    allowed = torch.rand(shape) < 0.6
    allowed[..., 0] = True
    full = allowed.expand(2, shape[1], 5, 5).contiguous()
    bias = torch.randn(shape)
    ones = torch.ones(2, 5)
    with torch.no_grad():
        expected = theirs(ids, full)
        assert_valid_equal(ours(ids, allowed)[0], expected[0], ones)
        assert_valid_equal(ours(ids, allowed, output_attentions=True)[0], expected[0], ones)
        expected = theirs(ids, bias.expand(2, shape[1], 5, 5).contiguous())
        assert_valid_equal(ours(ids, bias)[0], expected[0], ones)
        assert_valid_equal(ours(ids, bias, output_attentions=True)[0], expected[0], ones)


def test_packed_tokens() -> None:
    model, _ = pair()
    lengths = [7, 2, 0, 5]
    ids, mask = batch(lengths, 7)
    types, positions = torch.randint(2, ids.shape), torch.randint(24, ids.shape)
    with torch.no_grad():
        padded = model(ids, mask, types, positions, output_hidden_states=True)
        for capacity in (None, 14, 20):
            packed = PackedBatch.from_lengths(lengths, capacity=capacity)
            tokens = [packed.pack(x) for x in (ids[:, :7], types, positions)]
            got = model.forward_packed(tokens[0], packed, *tokens[1:], output_hidden_states=True)
            assert_valid_equal(packed.pad(got.last_hidden_state), padded.last_hidden_state, mask)
            assert len(got.hidden_states) == 3
            assert_valid_equal(packed.pad(got.hidden_states[1]), padded.hidden_states[1], mask)
            assert (got.pooler_output - padded.pooler_output).abs().max() <= TOLERANCE
        default = model.forward_packed(tokens[0], packed)
        assert_valid_equal(packed.pad(default.last_hidden_state), model(ids, mask)[0], mask)
    with pytest.raises(ValueError, match=r"input_ids must be the \[20\] tokens of the batch"):
        model.forward_packed(tokens[0][:5], packed)


@pytest.mark.parametrize("pack", [True, False])
def test_bfloat16(pack: bool) -> None:
    """Against the float32 model, by the error of transformers' own bfloat16."""
    ours, theirs = pair(hidden_size=64, initializer_range=0.1)
    ids, mask = batch([7, 20, 12], 20)
    half = BertModel(ours.config, pack=pack).to(torch.bfloat16).eval()
    half.load_state_dict(ours.state_dict())
    with torch.no_grad():
        exact = theirs.double()(ids, mask)[0]
        eager = theirs.to(torch.bfloat16)(ids, mask)[0]
        got = half(ids, mask)[0]
    assert got.dtype == torch.bfloat16
    valid = mask.bool()
    unit = torch.finfo(torch.bfloat16).eps * exact[valid].abs().max()
    for measure in (torch.amax, lambda x: x.square().mean().sqrt()):
        error = measure((got.double() - exact)[valid].abs())
        assert error <= 2 * (measure((eager.double() - exact)[valid].abs()) + unit)
    assert not got[~valid].any()


def test_float64_runs_on_the_reference() -> None:
    ours, theirs = pair()
    ids, mask = batch([7, 3], 7)
    with torch.no_grad():
        got, expected = ours.double()(ids, mask)[0], theirs.double()(ids, mask)[0]
    assert_valid_equal(got, expected, mask, 1e-12)


def test_autocast() -> None:
    ours, theirs = pair(hidden_size=64, initializer_range=0.1)
    ids, mask = batch([7, 3], 7)
    with torch.no_grad():
        ours(ids, mask)
        with torch.autocast("cpu", torch.bfloat16):
            got = ours(ids, mask)[0].float()
        expected = theirs(ids, mask)[0]
    assert 1e-5 < (got - expected)[mask.bool()].abs().max() < 0.2


def test_outputs_are_read_in_every_way() -> None:
    model, _ = pair()
    ids, _ = batch([3], 3)
    output = model(ids, output_hidden_states=True)
    assert list(output) == ["last_hidden_state", "pooler_output", "hidden_states"]
    assert output[0] is output.last_hidden_state is output["last_hidden_state"]
    assert output[1:][0] is output.pooler_output
    assert output.attentions is None
    assert len(output.to_tuple()) == 3
    with pytest.raises(AttributeError, match="no field 'logits'"):
        _ = output.logits
    for copied in (
        copy.deepcopy(output.__class__(last_hidden_state=ids)),
        pickle.loads(pickle.dumps(output)),
    ):
        assert copied.last_hidden_state is not None
    assert [type(x) for x in model(ids, return_dict=False)] == [Tensor, Tensor]
    model.config.output_hidden_states = True
    model.config.output_attentions = True
    assert len(model(ids)) == 4
    assert len(BertModel(model.config, add_pooling_layer=False)(ids, output_attentions=False)) == 2


def test_a_transformers_configuration_is_accepted() -> None:
    model = BertModel(transformers.BertConfig(**SMALL))
    assert model.config == BertConfig(**{**vars(model.config)})
    assert model.config.hidden_size == 32
    with pytest.raises(TypeError, match="config must be a BertConfig, got dict"):
        BertModel(SMALL)


def _ids(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "exactly one of input_ids and inputs_embeds"),
        (
            {"input_ids": _ids(1, 3), "inputs_embeds": torch.zeros(1, 3, 32)},
            ValueError,
            "exactly one of input_ids and inputs_embeds",
        ),
        (
            {"input_ids": _ids(3)},
            ValueError,
            r"input_ids must be \[batch, sequence\], got shape \(3,\)",
        ),
        ({"inputs_embeds": torch.zeros(1, 3, 31)}, ValueError, "inputs_embeds must be .*32"),
        (
            {"input_ids": torch.zeros(1, 3)},
            TypeError,
            "input_ids must be int64 or int32, got torch.float32",
        ),
        (
            {"input_ids": _ids(1, 25)},
            ValueError,
            "no longer than max_position_embeddings 24, got 25",
        ),
        ({"input_ids": _ids(1, 3) * 60}, ValueError, r"input_ids must be in \[0, 60\), got 60"),
        ({"input_ids": _ids(1, 3) * -1}, ValueError, r"input_ids must be in \[0, 60\), got -1"),
        (
            {"input_ids": _ids(1, 3), "token_type_ids": _ids(1, 3) * 2},
            ValueError,
            r"token_type_ids must be in \[0, 2\), got 2",
        ),
        (
            {"inputs_embeds": torch.zeros(1, 3, 32), "position_ids": _ids(1, 3) * 24},
            ValueError,
            r"position_ids must be in \[0, 24\), got 24",
        ),
        (
            {"inputs_embeds": torch.zeros(1, 3, 32), "token_type_ids": _ids(1, 3) * -1},
            ValueError,
            r"token_type_ids must be in \[0, 2\), got -1",
        ),
        (
            {"input_ids": _ids(2, 3), "attention_mask": _ids(2, 4)},
            ValueError,
            r"attention_mask must be \[2, 3\] or 4-dimensional, got shape \(2, 4\)",
        ),
        (
            {"input_ids": _ids(2, 3), "attention_mask": _ids(2, 3, 3)},
            ValueError,
            "attention_mask must be",
        ),
        (
            {"input_ids": _ids(2, 3), "attention_mask": _ids(6)},
            ValueError,
            "attention_mask must be",
        ),
        (
            {"input_ids": _ids(2, 3), "attention_mask": torch.ones(2, 3, 3, 3)},
            ValueError,
            r"must broadcast to \(2, 4, 3, 3\)",
        ),
        ({"input_ids": _ids(2, 3), "attention_mask": _ids(2, 1, 3, 3)}, TypeError, "must be bool"),
        (
            {"input_ids": _ids(2, 3), "token_type_ids": _ids(2, 4)},
            ValueError,
            r"token_type_ids must be \[2, 3\]",
        ),
        (
            {"input_ids": _ids(2, 3), "position_ids": _ids(3, 3)},
            ValueError,
            r"position_ids must be \[2, 3\]",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model, _ = pair()
    with pytest.raises(error, match=message) as raised, torch.no_grad():
        model(**arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("lengths", [[0], [1], [9, 7], [9, 8], [11, 3, 4]])
def test_rows_are_rounded_up(lengths: list[int]) -> None:
    """Each new row count costs oneDNN about a millisecond a layer shape; weights in panels serve every one."""
    model, _ = pair()
    set_packing(model, False)
    rows: list[int] = []
    model.encoder.layer[0].register_forward_hook(lambda m, args, output: rows.append(len(args[0])))
    ids, mask = batch(lengths, 11)
    with torch.no_grad():
        output = model(ids, mask, output_hidden_states=True)
        set_packing(model, True)
        model(ids, mask)
    rounded = max(16, -(-sum(lengths) // 16) * 16)
    assert rows == [rounded, sum(lengths) or 16 if _native.available() else rounded]
    assert {state.shape for state in output.hidden_states} == {(len(lengths), 11, 32)}


def test_what_lies_in_padding_is_never_read() -> None:
    model, _ = pair()
    ids, mask = batch([3, 5], 5)
    with torch.no_grad():
        expected = model(ids, mask)[0]
        ids[mask == 0] = 10**6
        assert torch.equal(model(ids, mask)[0], expected)
        assert model.last_padding == pytest.approx(0.2)
