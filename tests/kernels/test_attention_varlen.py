"""The packed attention kernels, interpreted: against the reference, and against the padded kernels bit by bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import ctxfast
from ctxfast import bert, nn, ops
from ctxfast.ops import _triton, _triton_attention, use_backend
from tests.kernels.cases import FLOATS, Case, offsets, padding

RAGGED = [30, 0, 100, 17, 0]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_self_attention(path: str, dtype: torch.dtype) -> None:
    Case(2, 16, RAGGED, RAGGED, dtype, packed=True, tail=5).check()


def test_cross_attention(path: str) -> None:
    options = dict(dropout_p=0.15, is_causal=True)
    Case(2, 16, RAGGED, [10, 20, 0, 60, 0], packed=True, tail=70, options=options).check()


@pytest.mark.parametrize("shape", [(5, 1, 100, 100), (1, 2, 1, 100)], ids=str)
def test_bias(path: str, shape: tuple[int, ...]) -> None:
    options = dict(bias=torch.randn(shape), window_size=(40, 20))
    Case(2, 16, RAGGED, RAGGED, packed=True, tail=3, options=options).check()


def test_nothing_but_empty_sequences(path: str) -> None:
    Case(2, 16, [0, 0], [0, 0], packed=True, tail=9).check()


def test_long_sequences_and_a_long_tail() -> None:
    options = dict(dropout_p=0.1)
    Case(1, 16, [200, 0, 150], [200, 0, 150], packed=True, tail=150, options=options).check()


def test_packed_equals_padded_bit_by_bit() -> None:
    """The same rows in both layouts, dropout included."""
    lengths = [70, 33, 100]
    options = dict(dropout_p=0.2)
    packed = Case(2, 16, lengths, lengths, packed=True, options=options)
    mask = padding(lengths, 100)
    padded = Case(2, 16, [100] * 3, [100] * 3, options=dict(options, key_padding_mask=mask))
    for name in ("query", "key", "value"):
        rows = getattr(padded, name).new_zeros(3, 100, 2, 16)
        rows[mask] = getattr(packed, name)
        setattr(padded, name, rows.transpose(1, 2))
    output, lse = packed.forward()
    output_padded, lse_padded = padded.forward()
    assert torch.equal(output_padded.transpose(1, 2)[mask], output)
    assert torch.equal(lse_padded.transpose(1, 2)[mask], lse.T)


def test_tile_map() -> None:
    """Longest sequences first, every block of 128 rows once, the rows past the end as sequence B."""
    tiles = _triton.build_tile_map(offsets([300, 0, 200, 140]), 1000).tolist()
    assert len(tiles) == 1000 // 128 + 5
    expected = [[4, 0], [4, 1], [4, 2], [0, 0], [0, 1], [0, 2], [2, 0], [2, 1], [3, 0], [3, 1]]
    assert tiles == expected + [[-1, 0]] * 2


def test_tile_map_of_many_sequences() -> None:
    lengths = torch.randint(0, 400, (140,)).tolist()
    tiles = _triton.build_tile_map(offsets(lengths), sum(lengths)).tolist()
    used = [tile for tile in tiles if tile[0] >= 0]
    assert sorted(used) == [[b, k] for b, n in enumerate(lengths) for k in range(-(-n // 128))]
    sizes = [lengths[b] for b, _ in used]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("lengths", [[300, 0, 200, 140], [0, 0], [128, 256, 1], []], ids=str)
@pytest.mark.parametrize("tail", [0, 3, 360])
def test_tile_map_without_a_kernel(lengths: list[int], tail: int) -> None:
    arguments = offsets(lengths), sum(lengths) + tail
    with use_backend("triton"):
        tiles = ops.attention_tile_map(*arguments)
    with use_backend("reference"):
        expected = torch.ops.ctxfast.attention_tile_map(*arguments)
        assert ops.attention_tile_map(*arguments) is None
    assert tiles is not None and torch.equal(tiles, expected)


def test_tile_map_is_a_registered_operator() -> None:
    with use_backend("reference"):
        torch.library.opcheck(
            torch.ops.ctxfast.attention_tile_map.default, (offsets([300, 0, 20]), 330)
        )


def packed_transformer() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    layer = nn.TransformerEncoderLayer(32, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    return lambda x, mask: encoder(x, src_key_padding_mask=~mask)


SIZES = dict(
    vocab_size=9,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def own_bert() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    model = bert.BertModel(bert.BertConfig(**SIZES)).train()
    return lambda x, mask: model(inputs_embeds=x, attention_mask=mask).last_hidden_state


def accelerated_bert() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    transformers = pytest.importorskip("transformers")
    model = ctxfast.accelerate(transformers.BertModel(transformers.BertConfig(**SIZES))).train()
    return lambda x, mask: model(inputs_embeds=x, attention_mask=mask.long()).last_hidden_state


@pytest.mark.parametrize("build_model", [packed_transformer, own_bert, accelerated_bert])
def test_layers_and_their_backward_build_one_tile_map(
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    build_model: Callable[[], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]],
) -> None:
    """Of a batch that is packed once, whether its backward is one kernel or three."""
    built = []
    build = _triton_attention.build_tile_map

    def counted(cu_seqlens: torch.Tensor, rows: int) -> torch.Tensor:
        built.append(rows)
        return build(cu_seqlens, rows)

    monkeypatch.setattr(_triton_attention, "build_tile_map", counted)
    model = build_model()
    x = torch.randn(2, 8, 32, requires_grad=True)
    mask = padding([8, 5], 8)
    with use_backend("triton"):
        model(x, mask).square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert len(built) == 1


def test_one_tile_map_serves_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1, 16, [150, 20], [150, 20], packed=True, tail=4)
    tiles = _triton.build_tile_map(case.arguments["cu_seqlens_q"], 174)
    expected, lse = case.forward()
    gradients = case.backward(expected, lse)
    monkeypatch.setattr("ctxfast.ops._triton_attention.build_tile_map", None)
    case.tile_map = tiles
    output, lse = case.forward()
    again = case.backward(output, lse)
    assert torch.equal(output, expected)
    assert all(torch.equal(a, b) for a, b in zip(again, gradients, strict=True))
