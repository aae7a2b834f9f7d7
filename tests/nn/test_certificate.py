"""Whether what was observed of modules still holds: no change goes unseen, and nothing else counts as one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ctxfast.nn import certificate
from ctxfast.nn.certificate import Certificate, Snapshot
from ctxfast.nn.packed_copy import Fingerprint
from ctxfast.ops import _native, _native_certificate


@pytest.fixture(params=["versions", "items", "Python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How modules are looked at: by versions of dictionaries, by their items, or without csrc."""
    if request.param != "Python" and not _native.available():
        pytest.skip(f"native module absent: {_native.unavailable_reason()}")
    if request.param == "versions" and _native._module().states((), ()) is None:
        pytest.skip("this Python keeps no versions of dictionaries")
    if request.param == "items":
        monkeypatch.setattr(certificate, "object_states", lambda *objects: None)
    if request.param == "Python":
        monkeypatch.setattr(_native_certificate, "_load", lambda: (None, "blocked"))
    return request.param


def build() -> Any:
    model = nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Dropout(0.1)), nn.BatchNorm1d(4)
    )
    model[0][1].register_forward_hook(print)
    return model.eval()


def observe(*call: Any) -> None: ...


def other_buffer(model: Any) -> None:
    model[1].running_mean = torch.zeros(4)


def other_class(model: Any) -> None:
    model[0][0].__class__ = type("Louder", (nn.Linear,), {})


def other_hooks(model: Any) -> None:
    model[0][2]._forward_hooks = copy.copy(model[0][2]._forward_hooks)


def no_hook(model: Any) -> None:
    model[0][1]._forward_hooks.popitem()


def another_name(model: Any) -> None:
    """The value stays where it is."""
    own = vars(model[0][2])
    own["rate"] = own.pop(list(own)[-1])


CHANGES: dict[str, Callable[[Any], object]] = {
    "attribute": lambda model: setattr(model[0][1], "eps", 0.5),
    "new attribute": lambda model: setattr(model[0][1], "is_causal", True),
    "no attribute": lambda model: delattr(model[0][2], "p"),
    "another name": another_name,
    "mode": lambda model: model[0][2].train(),
    "parameter": lambda model: setattr(model[0][0], "bias", nn.Parameter(torch.ones(4))),
    "no parameter": lambda model: setattr(model[0][0], "bias", None),
    "child": lambda model: model[0].__setitem__(2, nn.Dropout(0.1)),
    "new child": lambda model: model[0][0].add_module("adapter", nn.Linear(4, 4)),
    "order": lambda model: model[0]._modules.update({"0": model[0][1], "1": model[0][0]}),
    "buffer": other_buffer,
    "class": other_class,
    "forward": lambda model: setattr(model[0][0], "forward", model[0][0].forward),
    "hook": lambda model: model[0][0].register_forward_hook(observe),
    "pre-hook": lambda model: model[0][0].register_forward_pre_hook(observe),
    "backward hook": lambda model: model[0][0].register_full_backward_hook(observe),
    "second hook": lambda model: model[0][1].register_forward_hook(observe),
    "no hook": no_hook,
    "other hooks": other_hooks,
    "settings": lambda model: SETTINGS.update(layers=3),
}
SETTINGS: dict[str, int] = {}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(way: str, change: str) -> None:
    SETTINGS["layers"] = 2
    model = build()
    found = Certificate(model.modules(), SETTINGS)
    assert found.holds() and found.holds()
    CHANGES[change](model)
    assert not found.holds() and not found.holds()


def test_what_replaces_itself_is_no_change(way: str) -> None:
    model = build()
    found = Certificate(model.modules())
    for _ in range(2):
        model.eval()
        vars(model[0][1])["eps"] = vars(model[0][1])["eps"]
        model[0][0].weight = model[0][0].weight
        handle = model[0][0].register_forward_hook(observe)
        assert not found.holds()
        handle.remove()
        vars(model[0])["note"] = 1
        del model[0].note
        assert found.holds()
    model[0].weight_of_nobody = None
    assert not found.holds()


def test_other_modules_do_not_count(way: str) -> None:
    model = build()
    found = Certificate(model[0].modules())
    model[1].eps = 0.5
    model[1].register_forward_hook(observe)
    assert found.holds()


def snapshot(model: Any) -> Snapshot:
    return Snapshot([model], [Fingerprint(model[0][0].weight)])


def transpose(model: Any) -> None:
    model[0][0].weight.data = model[0][0].weight.data.t()


def cut(model: Any) -> None:
    model[0][0].bias.data = model[0][0].bias.data[:2]


def reinterpret(model: Any) -> None:
    model[0][0].bias.data = model[0][0].bias.data.view(torch.bfloat16)[:4]


def reshape(model: Any) -> None:
    model[0][0].weight.data = model[0][0].weight.data.view(2, 8)


def move(model: Any) -> None:
    model[0][1].weight.data = model[0][1].weight.data.clone()


def write(model: Any) -> None:
    with torch.no_grad():
        model[0][0].weight[1, 1] = 3.0  # between the samples


def write_unseen(model: Any) -> None:
    model[0][0].weight.data.mul_(3)


@pytest.mark.parametrize(
    "change", [transpose, cut, reinterpret, reshape, move, write, write_unseen]
)
def test_what_parameters_hold(way: str, change: Callable[[Any], None]) -> None:
    model = build()
    found = snapshot(model)
    assert found.matches([model]) and not found.matches([model, model])
    change(model)
    assert found.holds() and not found.parameters_hold() and not found.matches([model])


def test_what_is_read_where_it_lies_may_be_written(way: str) -> None:
    model = build()
    found = snapshot(model)
    with torch.no_grad():
        model[0][1].weight.mul_(2)
    assert found.parameters_hold()


def test_tensors_of_every_kind(way: str) -> None:
    """Without a version, on the meta device, of more dimensions than are written down in csrc; samples of each size."""
    with torch.inference_mode():
        model = build()
        found = snapshot(model)
        assert found.parameters_hold()
        write_unseen(model)
        assert not found.parameters_hold()
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        model = build().to(dtype)
        found = snapshot(model)
        assert found.parameters_hold()
        write_unseen(model)
        assert not found.parameters_hold()
    model[0][0].bias = nn.Parameter(torch.ones(1, 1, 2, 1, 2))
    model[0][1].bias = nn.Parameter(torch.ones(4, device="meta"))
    found = Snapshot([model], [])
    assert found.parameters_hold()
    model[0][0].bias.data = model[0][0].bias.data.view(1, 1, 1, 2, 2)
    assert not found.parameters_hold()


def test_a_storage_that_was_freed_is_not_read(way: str) -> None:
    model = build()
    found = snapshot(model)
    model[0][0].weight.untyped_storage().resize_(0)
    assert not found.parameters_hold()
