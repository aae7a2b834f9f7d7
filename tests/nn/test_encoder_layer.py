"""Encoder layers as one native call: the numbers of their parts, and who gets the parts instead."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctxfast import ops
from ctxfast.bert import BertConfig, BertForSequenceClassification, BertModel
from ctxfast.bert.encoder import BertIntermediate
from ctxfast.nn import refresh, set_packing, set_precision
from ctxfast.ops import _dispatch, _native
from ctxfast.ops._native_encoder_layer import EncoderLayer
from ctxfast.ops.linear_int8 import int8_unavailable_reason

pytestmark = pytest.mark.skipif(
    not _native.available(), reason=f"native module absent: {_native.unavailable_reason()}"
)
SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 50,
    "max_position_embeddings": 60,
    "initializer_range": 0.3,
}


def model(**changes: Any) -> BertModel:
    return BertModel(BertConfig(**{**SMALL, **changes})).eval()


def batch(*lengths: int) -> tuple[Tensor, Tensor]:
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return torch.randint(1, 50, (len(lengths), width)), mask


OPERATORS = {None: "linear", "bfloat16": "linear", "int8": "linear_int8"}


def by_parts(bert: nn.Module, *inputs: Tensor, operator: str = "linear") -> Tensor:
    """`explain` wants to see every operator, so they are called."""
    with torch.no_grad(), _dispatch.record() as verdicts:
        output = bert(*inputs)[0]
    assert {v.operator: v.ran for v in verdicts}[operator] == "native"
    return output


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "tanh"])
@pytest.mark.parametrize("lengths", [(1,), (12,), (7, 0, 20), (33, 48, 5)])
@pytest.mark.parametrize("compute", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gives_the_bits_of_its_parts(
    native_layers: list[EncoderLayer],
    act: str,
    lengths: tuple[int, ...],
    compute: str | None,
    dtype: torch.dtype,
) -> None:
    if compute == "int8" and (reason := int8_unavailable_reason()):
        pytest.skip(reason)
    bert = model(hidden_act=act).to(dtype)
    for parameter in bert.parameters():
        nn.init.normal_(parameter, std=0.3)  # norms and biases too
    set_precision(bert, compute)
    inputs = batch(*lengths)
    with torch.inference_mode():
        whole = bert(*inputs).last_hidden_state
        found = bert(*inputs, output_hidden_states=True)
    assert len(native_layers) == 6
    assert whole.abs().sum() > 0
    assert torch.equal(whole, by_parts(bert, *inputs, operator=OPERATORS[compute]))
    assert torch.equal(found.last_hidden_state, whole)
    assert len(found.hidden_states) == 4
    assert torch.equal(found.hidden_states[-1], found.last_hidden_state)


def test_a_head_needs_the_last_layer_in_parts(native_layers: list[EncoderLayer]) -> None:
    bert = BertForSequenceClassification(BertConfig(**SMALL)).eval()
    inputs = batch(9, 4)
    with torch.no_grad():
        found = bert(*inputs).logits
    assert len(native_layers) == 2
    assert torch.equal(found, by_parts(bert, *inputs))


def hook(bert: BertModel) -> None:
    bert.encoder.layer[1].output.dense.register_forward_hook(lambda m, args, output: output * 2)


def hook_a_layer(bert: BertModel) -> None:
    bert.encoder.layer[2].register_forward_hook(lambda m, args, output: (output[0] + 1, None))


def wrap(bert: BertModel) -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) * 2

    own = bert.encoder.layer[0].attention.self
    own.query = Adapter(own.query)


def patch(bert: BertModel) -> None:
    layer = bert.encoder.layer[0]
    forward = layer.intermediate.forward
    layer.intermediate.forward = lambda hidden: forward(hidden) + 1


def drop(bert: BertModel) -> None:
    bert.encoder.layer[1].attention.output.dropout.train()


def other_class(bert: BertModel) -> None:
    class Louder(BertIntermediate):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) * 2

    bert.encoder.layer[1].intermediate.__class__ = Louder


@pytest.mark.parametrize("change", [hook, hook_a_layer, wrap, patch, drop, other_class])
def test_what_somebody_put_into_a_layer_is_called(
    native_layers: list[EncoderLayer], change: Callable[[BertModel], None]
) -> None:
    bert = model()
    inputs = batch(9, 4)
    with torch.no_grad():
        before = bert(*inputs).last_hidden_state
        assert len(native_layers) == 3
        change(bert)
        after = bert(*inputs).last_hidden_state
    assert len(native_layers) == 3
    assert (after - before).abs().max() > 0.01


def test_who_else_gets_the_parts(native_layers: list[EncoderLayer]) -> None:
    bert = model()
    inputs = batch(9, 4)
    exact = bert(*inputs).last_hidden_state
    with torch.no_grad():
        with ops.use_backend("reference"):
            bert(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            bert(*inputs)
        bert(*inputs, output_attentions=True)
        set_packing(bert, False)
        bert(*inputs)
        assert not native_layers
        set_packing(bert, True)
        assert (bert(*inputs).last_hidden_state - exact).abs().max() < 2e-5
        bert.double()
        bert(*inputs)
    assert len(native_layers) == 3


def test_layers_of_mixed_precision_run_by_their_parts(native_layers: list[EncoderLayer]) -> None:
    bert = model()
    inputs = batch(9, 4)
    with torch.no_grad():
        exact = bert(*inputs).last_hidden_state
        assert len(native_layers) == 3
        set_precision(bert.encoder.layer[1].attention.self, "bfloat16")
        mixed = bert(*inputs).last_hidden_state
        assert len(native_layers) == 3
    assert 0 < (mixed - exact).abs().max() < 0.2


def test_written_weights_are_seen(native_layers: list[EncoderLayer]) -> None:
    bert = model()
    inputs = batch(12)
    with torch.no_grad():
        for _ in range(2):
            for parameter in bert.encoder.parameters():
                parameter.mul_(1.1)
            with ops.use_backend("reference"):
                expected = bert(*inputs).last_hidden_state
            assert (bert(*inputs).last_hidden_state - expected).abs().max() < 1e-4
    assert len(native_layers) == 6


def test_nothing_is_made_again_while_nothing_changes(native_layers: list[EncoderLayer]) -> None:
    bert = model()
    with torch.no_grad():
        for _ in range(3):
            bert(*batch(9, 4))
    assert len(native_layers) == 9 and all(
        native_layers[k] is native_layers[k + 3] for k in range(6)
    )


def other_storage(bert: BertModel) -> None:
    dense = bert.encoder.layer[1].output.dense
    dense.weight.data = dense.weight.data * 2


def other_parameter(bert: BertModel) -> None:
    norm = bert.encoder.layer[2].output.LayerNorm
    norm.weight = nn.Parameter(norm.weight.detach() * 2)


def other_module(bert: BertModel) -> None:
    bert.encoder.layer[0].attention.output = copy.deepcopy(bert.encoder.layer[1].attention.output)


def other_layer(bert: BertModel) -> None:
    bert.encoder.layer[0] = copy.deepcopy(bert.encoder.layer[1])


def other_attribute(bert: BertModel) -> None:
    bert.encoder.layer[1].attention.output.LayerNorm.eps = 0.5


def written_in_place(bert: BertModel) -> None:
    bert.encoder.layer[1].intermediate.dense.bias.mul_(3)


def written_unseen(bert: BertModel) -> None:
    bert.encoder.layer[1].intermediate.dense.weight.data.mul_(3)


def written_between_the_samples(bert: BertModel) -> None:
    bert.encoder.layer[1].intermediate.dense.weight[:, 5].add_(30.0)


def loaded(bert: BertModel) -> None:
    bert.load_state_dict({name: value * 1.5 for name, value in bert.state_dict().items()})


@pytest.mark.parametrize("compute", [None, "bfloat16"])
@pytest.mark.parametrize(
    "change",
    [
        other_storage,
        other_parameter,
        other_module,
        other_layer,
        other_attribute,
        written_in_place,
        written_unseen,
        written_between_the_samples,
        loaded,
    ],
)
def test_a_change_is_seen_by_the_next_call(
    native_layers: list[EncoderLayer], change: Callable[[BertModel], None], compute: str | None
) -> None:
    bert = model()
    for parameter in bert.parameters():
        nn.init.normal_(parameter, std=0.3)
    set_precision(bert, compute)
    inputs = batch(9, 4)
    with torch.no_grad():
        before = bert(*inputs).last_hidden_state
        change(bert)
        after = bert(*inputs).last_hidden_state
        assert len(native_layers) == 6
        assert (after - before).abs().max() > 0.01
        refresh(bert)
        assert torch.equal(bert(*inputs).last_hidden_state, after)


def test_a_weight_turned_where_it_lies_is_seen(native_layers: list[EncoderLayer]) -> None:
    """Its address, shape, version and values in memory stay. What is not contiguous runs by its parts."""
    bert = model()
    inputs = batch(9, 4)
    with torch.no_grad():
        before = bert(*inputs).last_hidden_state
        weight = bert.encoder.layer[1].attention.output.dense.weight
        weight.data = weight.data.t()
        after = bert(*inputs).last_hidden_state
        with ops.use_backend("reference"):
            expected = bert(*inputs).last_hidden_state
    assert len(native_layers) == 3
    assert (after - before).abs().max() > 0.01 and (after - expected).abs().max() < 1e-4


def test_a_bias_cut_where_it_lies_is_not_read_beyond_its_end() -> None:
    bert = model()
    with torch.no_grad():
        bert(*batch(9, 4))
        bias = bert.encoder.layer[1].output.dense.bias
        bias.data = bias.data[:10]
        with pytest.raises(ValueError, match=r"bias must be \[36\], got .*10"):
            bert(*batch(9, 4))


def test_copies_of_the_model_run_their_own_layers(native_layers: list[EncoderLayer]) -> None:
    bert = model()
    inputs = batch(9, 4)
    with torch.no_grad():
        expected = bert(*inputs).last_hidden_state
        twins = copy.deepcopy(bert), pickle.loads(pickle.dumps(bert))
        for twin in twins:
            assert torch.equal(twin(*inputs).last_hidden_state, expected)
    assert len(native_layers) == 9 and len(set(map(id, native_layers))) == 9


@pytest.mark.parametrize(
    "drop",
    [lambda bert: bert.train(), refresh, lambda bert: set_packing(bert, False), BertModel.float],
)
def test_packed_weights_are_given_back(drop: Callable[[BertModel], object]) -> None:
    bert = model()
    with torch.no_grad():
        bert(*batch(9))
    panels = weakref.ref(bert.encoder.layer[0].output.dense._copy.weight)
    assert panels() is not None
    drop(bert)
    assert panels() is None
