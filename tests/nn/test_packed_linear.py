"""The packed weight: when it serves, and everything after which it must not."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrize, vector_to_parameters

from ctxfast import ops
from ctxfast.nn import PackedLinear, PackedModule, packed_bytes, refresh, set_packing, set_precision
from ctxfast.nn.packed_copy import pack
from ctxfast.nn.packed_linear import linear, stacked_linear
from ctxfast.ops import _onednn

pytestmark = pytest.mark.skipif(
    _onednn.unavailable_reason() is not None,
    reason="this torch has no oneDNN operators to pack for",
)

BYTES = 48 * 32 * 4


class Three(PackedModule):
    """Three layers that read one input, as the projections of an attention do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PackedLinear(32, 16) for _ in range(3))

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat(stacked_linear(self, tuple(self.layers), input), -1)

    @property
    def weight(self) -> Tensor:
        return torch.cat([layer.weight for layer in self.layers])


def plain(module: nn.Module, input: Tensor) -> Tensor:
    """What torch makes of the parameters as they are now."""
    layers = module.layers if isinstance(module, Three) else [module]
    with torch.no_grad():
        return torch.cat([nn.functional.linear(input, x.weight, x.bias) for x in layers], -1)


def assert_current(module: nn.Module, input: Tensor) -> None:
    with torch.no_grad():
        assert (module(input) - plain(module, input)).abs().max() < 1e-5


@pytest.fixture(params=[lambda: PackedLinear(32, 48), Three], ids=["one", "three"])
def module(request: pytest.FixtureRequest) -> PackedModule:
    return request.param().eval()


@pytest.fixture
def input() -> Tensor:
    return torch.randn(16, 32)


def packed(module: PackedModule, input: Tensor) -> PackedModule:
    """The module after an inference that has made it a packed copy."""
    assert_current(module, input)
    assert module.packed_bytes >= BYTES
    return module


def test_inference_keeps_one_copy(module: PackedModule, input: Tensor) -> None:
    assert module.packed_bytes == 0
    with torch.inference_mode():
        module(input)
    first = module._copy
    assert first is not None and not first.weight.is_inference()
    assert module.packed_bytes == packed_bytes(module) >= BYTES
    with torch.no_grad():  # a copy made under inference_mode serves here too
        module(input[:5])
    assert module._copy is first
    assert isinstance(module.state_dict()[next(iter(module.state_dict()))], Tensor)
    assert len(module.state_dict()) == (6 if isinstance(module, Three) else 2)


def test_the_copy_is_what_runs(module: PackedModule, input: Tensor) -> None:
    """Otherwise every test below would pass on the plain weights."""
    packed(module, input)
    assert module._copy is not None
    module._copy.weight = pack(torch.zeros(48, 32), torch.float32)
    with torch.no_grad():
        assert (module(input) - module(torch.zeros_like(input))).abs().max() == 0


def in_place(module: PackedModule) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2.0)


def through_data(module: PackedModule) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(2.0)


def new_data(module: PackedModule) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data * 2.0


def through_numpy(module: PackedModule) -> None:
    for parameter in module.parameters():
        parameter.detach().numpy()[...] *= 2.0


def new_parameters(module: PackedModule) -> None:
    for layer in module.layers if isinstance(module, Three) else [module]:
        layer.weight = nn.Parameter(layer.weight.detach() * 2.0)
        layer.bias = nn.Parameter(layer.bias.detach() * 2.0)


def from_vector(module: PackedModule) -> None:
    vector_to_parameters(
        parameters_to_vector(module.parameters()).detach() * 2.0, module.parameters()
    )


def from_state_dict(module: PackedModule) -> None:
    module.load_state_dict({name: tensor * 2.0 for name, tensor in module.state_dict().items()})


def assigned_state_dict(module: PackedModule) -> None:
    values = {name: tensor * 2.0 for name, tensor in module.state_dict().items()}
    module.load_state_dict(values, assign=True)


def swapped(module: PackedModule) -> None:
    """LoRA's merge: W + B A, in place and without a word to autograd."""
    for layer in module.layers if isinstance(module, Three) else [module]:
        layer.weight.data += torch.randn(layer.out_features, 4) @ torch.randn(4, 32)


WRITES = [in_place, through_data, new_data, through_numpy, new_parameters, from_vector,
          from_state_dict, assigned_state_dict, swapped]  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_writes_are_seen(
    module: PackedModule, input: Tensor, write: Callable, mode: Callable
) -> None:
    packed(module, input)
    before = plain(module, input)
    write(module)
    with mode():
        after = module(input)
    assert (after - plain(module, input)).abs().max() < 1e-4
    assert (after - before).abs().max() > 0.1


def test_a_single_element_through_numpy_needs_refresh(input: Tensor) -> None:
    layer = packed(PackedLinear(32, 48).eval(), input)
    layer.weight.detach().numpy()[7, 5] += 10.0
    refresh(layer)
    assert layer.packed_bytes == 0
    assert_current(layer, input)


@pytest.mark.parametrize("fused", [True, False])
def test_train_and_evaluate_alternately(module: PackedModule, input: Tensor, fused: bool) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=fused, foreach=not fused)
    for _ in range(4):
        module.train()
        optimizer.zero_grad()
        module(input).square().mean().backward()
        optimizer.step()
        module.eval()
        packed(module, input)


def test_a_step_in_evaluation_mode(module: PackedModule, input: Tensor) -> None:
    """Gradients without train(): what counts is that a forward recorded them."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        packed(module, input)
        module(input).square().mean().backward()
        assert module.packed_bytes == 0
        optimizer.step()


def test_gradients_are_those_of_torch(module: PackedModule, input: Tensor) -> None:
    packed(module, input)
    leaf = input.clone().requires_grad_()
    module(leaf).sin().sum().backward()
    got = [parameter.grad for parameter in module.parameters()]
    module.zero_grad()
    other = input.clone().requires_grad_()
    layers = module.layers if isinstance(module, Three) else [module]
    torch.cat(
        [nn.functional.linear(other, x.weight, x.bias) for x in layers], -1
    ).sin().sum().backward()
    for mine, parameter in zip(got, module.parameters(), strict=True):
        assert (mine - parameter.grad).abs().max() < 1e-4
    assert (leaf.grad - other.grad).abs().max() < 1e-4


def test_what_drops_it(module: PackedModule, input: Tensor) -> None:
    for drop in (
        lambda: module.train() and module.eval(),
        lambda: module.to(torch.float32),
        lambda: module.float(),
        lambda: module.load_state_dict(module.state_dict()),
        lambda: refresh(nn.Sequential(module)),
    ):
        packed(module, input)
        drop()
        assert packed_bytes(module) == 0
    packed(module, input)
    module.eval()
    assert module.packed_bytes, "eval() before every batch must not cost a packing"


def test_copies_of_the_module_hold_none(module: PackedModule, input: Tensor) -> None:
    packed(module, input)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(stream, weights_only=False),
    ):
        assert packed_bytes(other) == 0
        in_place(other)
        assert_current(other, input)
    assert module.packed_bytes
    assert_current(module, input)


def test_a_moving_average_of_weights(module: PackedModule, input: Tensor) -> None:
    average = torch.optim.swa_utils.AveragedModel(module)
    for _ in range(3):
        packed(average.module.eval(), input)
        in_place(module)
        average.update_parameters(module)


def test_pack_can_be_refused(module: PackedModule, input: Tensor) -> None:
    packed(module, input)
    set_packing(module, False)
    assert_current(module, input)
    assert packed_bytes(module) == 0
    set_packing(module, True)
    packed(module, input)


def test_backends_and_other_inputs(
    module: PackedModule, input: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed(module, input)
    with ops.use_backend("reference"):
        assert_current(module, input)
    with monkeypatch.context() as context:
        context.setattr(torch.backends.mkldnn, "enabled", False)
        assert_current(module, input)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert module(input).dtype == torch.bfloat16
    assert_current(module, input[:0].new_zeros(1, 32))
    with torch.no_grad():
        assert module(input[:0]).shape == (0, 48)
        assert module(input.view(2, 8, 32)).shape == (2, 8, 48)
    double = copy.deepcopy(module).double()
    assert_current(double, input.double())
    assert double.packed_bytes == 0


def test_bfloat16(module: PackedModule, input: Tensor) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16 instructions that oneDNN uses")
    module.to(torch.bfloat16)
    rows = input.bfloat16()
    with torch.no_grad():
        error = (module(rows).float() - plain(module, rows).float()).abs().max()
        assert error < 0.05 and module.packed_bytes >= BYTES // 2
        through_data(module)
        assert (module(rows).float() - plain(module, rows).float()).abs().max() < 0.1


def test_parameters_made_in_inference_mode(input: Tensor) -> None:
    with torch.inference_mode():
        layer = PackedLinear(32, 48).eval()
        layer(input)
        assert layer.packed_bytes
        layer.weight.mul_(2.0)
        assert (
            layer(input) - nn.functional.linear(input, layer.weight, layer.bias)
        ).abs().max() < 1e-5


def test_parametrised_and_functional_weights_stay_plain(input: Tensor) -> None:
    layer = PackedLinear(32, 48).eval()
    expected = plain(layer, input)

    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(layer, "weight", Double())
    with torch.no_grad():
        doubled = layer(input) - layer.bias
    assert (doubled - 2 * (expected - layer.bias)).abs().max() < 1e-4
    assert layer.packed_bytes == 0
    other = packed(PackedLinear(32, 48).eval(), input)
    values = {name: torch.zeros_like(tensor) for name, tensor in other.state_dict().items()}
    with torch.no_grad():
        assert not torch.func.functional_call(other, values, input).any()
    assert_current(other, input)


def test_layers_without_a_bias(input: Tensor) -> None:
    module = Three().eval()
    for layer in module.layers:
        layer.register_parameter("bias", None)
    packed(module, input)
    module.layers[1].bias = nn.Parameter(torch.ones(16))
    assert_current(module, input)
    packed(PackedLinear(32, 48, bias=False).eval(), input)


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "tanh"])
def test_hooks_and_wrappers_see_the_layer_alone(input: Tensor, activation: str | None) -> None:
    layer = packed(PackedLinear(32, 48).eval(), input)
    seen: list[Tensor] = []
    with torch.no_grad():
        expected = linear(layer, input, activation)
        handle = layer.register_forward_hook(lambda m, args, output: seen.append(output))
        assert (linear(layer, input, activation) - expected).abs().max() < 1e-6
        assert (seen[0] - plain(layer, input)).abs().max() < 1e-5
        handle.remove()

        class Adapter(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.base = layer

            def forward(self, x: Tensor) -> Tensor:
                return self.base(x) + 1.0

        got = linear(Adapter(), input, activation)
        assert (
            got - ops.linear(input, layer.weight, layer.bias + 1, activation=activation)
        ).abs().max() < 1e-5


def test_an_adapter_around_one_of_three(input: Tensor) -> None:
    module = packed(Three().eval(), input)
    handle = module.layers[1].register_forward_hook(lambda m, args, output: output + 1.0)
    with torch.no_grad():
        difference = module(input) - plain(module, input)
    assert (difference - torch.tensor([0.0, 1.0, 0.0]).repeat_interleave(16)).abs().max() < 1e-5
    handle.remove()
    assert_current(module, input)


def test_exact_calls_without_a_copy(input: Tensor) -> None:
    layer = PackedLinear(32, 48).eval()
    layer.pack_exact = False
    with torch.inference_mode():
        assert_current(layer, input)
        assert layer.packed_bytes == 0
        set_precision(layer, "bfloat16")
        layer(input)
        assert 0 < layer.packed_bytes < BYTES
