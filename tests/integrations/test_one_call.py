"""An accelerated encoder as one native call: the bits of its parts, and no change of the model unseen."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ctxfast
from ctxfast import ops
from ctxfast.ops import _dispatch, _native
from ctxfast.ops._native_encoder_layer import EncoderLayer
from ctxfast.ops.linear_int8 import int8_unavailable_reason
from tests.integrations.lifecycle_cases import inputs, valid
from tests.integrations.model_cases import FAMILIES, build, close, twin

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    not _native.available(), reason=f"native module absent: {_native.unavailable_reason()}"
)
OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"quantization": "int8"},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gives_the_bits_of_its_parts(
    native_layers: list[EncoderLayer], family: str, options: str
) -> None:
    if options == "int8" and (reason := int8_unavailable_reason()):
        pytest.skip(reason)
    model = ctxfast.accelerate(build(family), **OPTIONS[options])
    layers = 4 if family == "albert" else 2
    with torch.no_grad():
        whole = [valid(model) for _ in range(3)]
        states = model(**inputs(), output_hidden_states=True).hidden_states
        with _dispatch.record():  # which wants to see every operator
            parts = model(**inputs(), output_hidden_states=True).hidden_states
    assert len(native_layers) == (
        0 if family == "mpnet" else 4 * layers
    )  # csrc adds no relative bias
    assert all(
        native_layers[k] is native_layers[k % layers] for k in range(len(native_layers))
    )  # made once
    assert len(states) == len(parts) == layers + 1
    assert all(map(torch.equal, states, parts))
    assert all(torch.equal(x, valid_rows(states[-1])) for x in whole)


def valid_rows(grid: Tensor) -> Tensor:
    return grid[inputs()["attention_mask"].bool()]


# What somebody puts into a layer, which has to be called from then on.


def hook(model: nn.Module) -> None:
    model.encoder.layer[1].output.dense.register_forward_hook(lambda m, args, output: output * 2)


def hook_a_layer(model: nn.Module) -> None:
    model.encoder.layer[1].register_forward_hook(lambda m, args, output: output * 2)


def hook_the_encoder(model: nn.Module) -> None:
    def double(module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * 2
        return output

    model.encoder.register_forward_hook(double)


def hook_beside_an_observer(model: nn.Module) -> None:
    hook_a_layer(model)


def parametrize(model: nn.Module) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    dense = model.encoder.layer[1].output.dense
    nn.utils.parametrize.register_parametrization(dense, "weight", Doubled())


def wrap(model: nn.Module) -> None:
    own = model.encoder.layer[0].attention.self
    own.value = nn.Sequential(own.value, nn.Tanh())


def patch(model: nn.Module) -> None:
    part = model.encoder.layer[0].intermediate
    forward = part.forward
    part.forward = lambda hidden: forward(hidden) + 1


def patch_the_encoder(model: nn.Module) -> None:
    forward = model.encoder.forward

    def double(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 2
        return output

    model.encoder.forward = double


def other_class(model: nn.Module) -> None:
    class Louder(type(model.encoder.layer[1].intermediate)):  # type: ignore[misc]
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) * 2

    model.encoder.layer[1].intermediate.__class__ = Louder


def offload(model: nn.Module) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubling(ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output * 2

    add_hook_to_module(model.encoder.layer[1].output.dense, Doubling())


@pytest.mark.parametrize(
    "change",
    [
        hook,
        hook_a_layer,
        hook_the_encoder,
        hook_beside_an_observer,
        parametrize,
        wrap,
        patch,
        patch_the_encoder,
        other_class,
        offload,
    ],
)
def test_what_somebody_put_into_a_layer_is_called(
    native_layers: list[EncoderLayer], change: Callable[[nn.Module], None]
) -> None:
    if change is offload:
        pytest.importorskip("accelerate")
    theirs = build("bert")
    ours = ctxfast.accelerate(twin(theirs))
    if change is hook_beside_an_observer:

        def observe(*call: Any) -> None: ...

        observe.__module__ = "transformers.utils.output_capturing"
        ours.encoder.layer[1].register_forward_hook(observe)
    with torch.no_grad():
        before = valid(ours)
        assert len(native_layers) == 2
        for model in (ours, theirs):
            change(model)
        close(valid(ours), valid(theirs))
    assert len(native_layers) == 2
    assert (before - valid(theirs)).abs().max() > 0.01


# Changes after which the layers are one call again, made anew.


def other_storage(model: nn.Module) -> None:
    dense = model.encoder.layer[1].output.dense
    dense.weight.data = dense.weight.data * 2


def other_parameter(model: nn.Module) -> None:
    norm = model.encoder.layer[1].output.LayerNorm
    norm.weight = nn.Parameter(norm.weight.detach() * 2)


def other_module(model: nn.Module) -> None:
    layers = model.encoder.layer
    layers[0].attention.output = copy.deepcopy(layers[1].attention.output)


def other_layer(model: nn.Module) -> None:
    model.encoder.layer[0] = copy.deepcopy(model.encoder.layer[1])


def layers_in_another_order(model: nn.Module) -> None:
    model.encoder.layer = nn.ModuleList(reversed(model.encoder.layer))


def other_attribute(model: nn.Module) -> None:
    model.encoder.layer[1].attention.output.LayerNorm.eps = 0.5


def written_in_place(model: nn.Module) -> None:
    model.encoder.layer[1].intermediate.dense.bias.mul_(3)


def written_unseen(model: nn.Module) -> None:
    model.encoder.layer[1].intermediate.dense.weight.data.mul_(3)


def written_between_the_samples(model: nn.Module) -> None:
    model.encoder.layer[1].intermediate.dense.weight[:, 5].add_(30.0)


def loaded(model: nn.Module) -> None:
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})


@pytest.mark.parametrize("options", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "change",
    [
        other_storage,
        other_parameter,
        other_module,
        other_layer,
        layers_in_another_order,
        other_attribute,
        written_in_place,
        written_unseen,
        written_between_the_samples,
        loaded,
    ],
)
def test_a_change_is_seen_by_the_next_call(
    native_layers: list[EncoderLayer], change: Callable[[nn.Module], None], options: str
) -> None:
    model = ctxfast.accelerate(build("bert"), **OPTIONS[options])
    with torch.no_grad():
        before = valid(model)
        change(model)
        after = valid(model)
        assert len(native_layers) == 4
        assert (after - before).abs().max() > 0.01
        assert torch.equal(valid(ctxfast.accelerate(twin(model), **OPTIONS[options])), after)


@pytest.mark.parametrize("path", ["attention.self", "attention.output", ""])
def test_dropout_that_is_switched_on_drops(native_layers: list[EncoderLayer], path: str) -> None:
    model = ctxfast.accelerate(build("bert", dropout=0.5))
    with torch.no_grad():
        before = valid(model)
        model.encoder.layer[1].get_submodule(path).train()  # the model itself is not told
        assert (valid(model) - before).abs().max() > 0.01
        assert len(native_layers) == 2
        model.eval()
        assert torch.equal(valid(model), before)
    assert len(native_layers) == 4


def test_a_weight_turned_where_it_lies_is_seen(native_layers: list[EncoderLayer]) -> None:
    """Its address, shape, version and values in memory stay. What is not contiguous runs by its parts."""
    model = ctxfast.accelerate(build("bert"))
    with torch.no_grad():
        before = valid(model)
        weight = model.encoder.layer[1].attention.output.dense.weight
        weight.data = weight.data.t()
        after = valid(model)
        close(after, valid(ctxfast.restore(model)))
    assert len(native_layers) == 2
    assert (after - before).abs().max() > 0.01


def test_a_bias_cut_where_it_lies_is_not_read_beyond_its_end() -> None:
    model = ctxfast.accelerate(build("bert"))
    with torch.no_grad():
        valid(model)
        bias = model.encoder.layer[1].output.dense.bias
        bias.data = bias.data[:10]
        with pytest.raises(ValueError, match=r"bias must be \[32\], got .*10"):
            valid(model)


def test_a_parameter_that_goes_is_missed(native_layers: list[EncoderLayer]) -> None:
    """The last one of the last module, behind which nothing else could be out of place."""
    model = ctxfast.accelerate(build("distilbert"))
    with torch.no_grad():
        valid(model)
        norm = list(model.modules())[-1]
        assert list(norm._parameters) == ["weight", "bias"]
        del norm.bias
        with pytest.raises(AttributeError, match="bias"):
            valid(model)


def test_states_of_another_type_get_layers_of_theirs(native_layers: list[EncoderLayer]) -> None:
    model = ctxfast.accelerate(build("bert"))
    model.pooler = None
    dtype = torch.float32
    model.embeddings.register_forward_hook(lambda module, args, output: output.to(dtype))
    with torch.no_grad():
        exact = valid(model)
        dtype = torch.bfloat16
        rounded = valid(model)
    assert len(native_layers) == 4 and rounded.dtype == torch.bfloat16
    error = (rounded.float() - exact).abs().max()
    assert 0 < error < 0.1 * exact.abs().max()


def test_layers_of_several_kinds_run_by_their_parts(native_layers: list[EncoderLayer]) -> None:
    theirs = build("bert")
    prune(theirs.encoder.layer[1])
    ours = ctxfast.accelerate(twin(theirs))
    with torch.no_grad():
        close(valid(ours), valid(theirs))
    assert not native_layers


def prune(layer: nn.Module) -> None:
    """Leaves 20 of the units of the feed-forward block."""
    up, down = layer.intermediate.dense, layer.output.dense
    up.weight, up.bias = nn.Parameter(up.weight[:20]), nn.Parameter(up.bias[:20])
    down.weight = nn.Parameter(down.weight[:, :20].contiguous())


def test_who_else_gets_the_parts(native_layers: list[EncoderLayer]) -> None:
    theirs = build("bert")
    ours = ctxfast.accelerate(twin(theirs))
    exact = valid(ours)  # with gradients
    four = {**inputs(), "attention_mask": inputs()["attention_mask"].bool()[:, None, None, :]}
    with torch.no_grad():
        with ops.use_backend("reference"):
            close(valid(ours), exact)
        with torch.autocast("cpu", torch.bfloat16):
            valid(ours)
        ours(**inputs(), output_attentions=True)
        close(valid_rows(ours(**four)[0]), exact)
        ctxfast.accelerate(ours, unpad=False)
        close(ours(**inputs())[0], theirs(**inputs())[0])
        ctxfast.accelerate(ours)
        assert not native_layers
        close(valid(ours), exact)
        assert len(native_layers) == 2
        with torch.backends.mkldnn.flags(enabled=False):  # type: ignore[no-untyped-call]
            close(valid(ours), exact)
        ours.encoder.layer = nn.ModuleList()
        theirs.encoder.layer = nn.ModuleList()
        close(valid(ours), valid(theirs))
        assert len(native_layers) == 2


def write_unseen(model: nn.Module) -> None:
    """One value between the samples, through a view that autograd knows nothing of."""
    model.encoder.layer[1].intermediate.dense.weight.data[1, 1] = 30.0


@pytest.mark.parametrize(
    "announce",
    [
        lambda model: model.train() and model.eval(),
        lambda model: ctxfast.refresh(model),
        lambda model: model.float(),
        lambda model: model.load_state_dict(model.state_dict()),
        lambda model: torch.enable_grad()(model)(**inputs()),
        lambda model: ctxfast.accelerate(model),
    ],
)
def test_packed_weights_are_given_back(announce: Callable[[nn.Module], object]) -> None:
    model = ctxfast.accelerate(build("bert"))
    with torch.no_grad():
        before = valid(model)
        panels = weakref.ref(vars(model)["_ctxfast"].stack.layers[1].tensors[0])
        assert panels() is not None
        write_unseen(model)
        announce(model)
        assert panels() is None
        assert (valid(model) - before).abs().max() > 0.01


def test_copies_and_restored_models_hold_nothing(native_layers: list[EncoderLayer]) -> None:
    theirs = build("bert")
    ours = ctxfast.accelerate(twin(theirs))
    with torch.no_grad():
        expected = valid(ours)
        other = copy.deepcopy(ours)
        assert torch.equal(valid(other), expected)
        assert len(set(map(id, native_layers))) == 4
        panels = weakref.ref(native_layers[0].tensors[0])
        native_layers.clear()
        ctxfast.restore(ours)
        assert panels() is None
        assert torch.equal(valid(ours), valid(theirs))
    assert not native_layers
