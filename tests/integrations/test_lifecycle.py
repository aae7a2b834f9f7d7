"""What people do to a model, before and after `accelerate`: each row of the table is a test."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ctxfast
from tests.integrations.lifecycle_cases import fused, inputs, notes, valid
from tests.integrations.model_cases import build, close, twin

transformers = pytest.importorskip("transformers")


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    theirs = build("bert")
    return ctxfast.accelerate(twin(theirs)), theirs


def test_nothing_that_people_see_changes_and_restore_is_bitwise() -> None:
    head = build("bert", "ForSequenceClassification")
    before = {
        "names": [name for name, _ in head.named_modules()],
        "keys": list(head.state_dict()),
        "config": head.config.to_dict(),
        "signatures": [inspect.signature(m.forward) for m in (head, head.bert)],
        "classes": [(str(type(m)), type(m).__name__) for m in head.modules()],
        "vars": {name: set(vars(module)) for name, module in head.named_modules()},
    }
    wanted = head(**inputs()).logits
    assert ctxfast.accelerate(head) is head
    assert isinstance(head.bert, transformers.BertModel)
    head(**inputs())
    assert before["names"] == [name for name, _ in head.named_modules()]
    assert before["keys"] == list(head.state_dict())
    assert before["config"] == head.config.to_dict()
    assert before["signatures"] == [inspect.signature(m.forward) for m in (head, head.bert)]
    assert before["classes"] == [(str(type(m)), type(m).__name__) for m in head.modules()]
    assert ctxfast.restore(head) is head
    assert type(head.bert) is transformers.BertModel
    assert before["vars"] == {name: set(vars(module)) for name, module in head.named_modules()}
    assert torch.equal(head(**inputs()).logits, wanted)
    assert ctxfast.restore(head) is head  # nothing to undo


def test_save_pretrained_writes_the_same_files(
    pair: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    ours, theirs = pair
    ours(**inputs())
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / name)
    for file in (tmp_path / "theirs").iterdir():
        assert file.read_bytes() == (tmp_path / "ours" / file.name).read_bytes(), file.name
    loaded = type(theirs).from_pretrained(tmp_path / "ours")
    close(valid(ours), valid(loaded))


def test_accelerate_twice_and_the_context_manager(pair: tuple[nn.Module, nn.Module]) -> None:
    ours, theirs = pair
    cls = type(ours)
    ctxfast.accelerate(ours, unpad=False)
    assert type(ours) is cls and "padded rows are computed" in notes(ours)
    close(ours(**inputs()).last_hidden_state, theirs(**inputs()).last_hidden_state)
    with ctxfast.accelerated(ours) as same:
        assert same is ours and not ours(**inputs()).last_hidden_state[1, 5].any()
    assert ours(**inputs()).last_hidden_state[1, 5].any()
    with ctxfast.accelerated(theirs):
        assert fused(theirs)
    assert type(theirs) is transformers.BertModel


@pytest.mark.parametrize("path", ["encoder.layer.1.output.dense", "encoder.layer.1.attention.self"])
def test_hook_on_one_submodule_sees_the_padded_grid(
    pair: tuple[nn.Module, nn.Module], path: str
) -> None:
    ours, theirs = pair
    wanted = valid(ours)  # accelerated once before the hook comes
    seen = []
    handle = ours.get_submodule(path).register_forward_hook(lambda *call: seen.append(call))
    close(valid(ours), wanted)
    assert len(seen) == 1 and seen[0][1][0].shape[:2] == (4, 9)
    assert "1 of 2 layers fused" in notes(ours) and "has a forward hook" in notes(ours)
    assert path.removeprefix("encoder.layer.1.") in notes(ours)
    handle.remove()
    assert fused(ours)
    close(valid(ours), valid(theirs))


def test_hook_on_the_embeddings_can_change_them(pair: tuple[nn.Module, nn.Module]) -> None:
    results = []
    for model in pair:
        shapes = []

        def double(module: nn.Module, args: Any, output: Tensor, shapes: list = shapes) -> Tensor:
            shapes.append(output.shape)
            return output * 2

        handle = model.embeddings.register_forward_hook(double)
        results.append(valid(model))
        handle.remove()
        assert shapes == [(4, 9, 32)]
    close(*results)
    assert fused(pair[0])


@pytest.mark.parametrize("path", ["encoder.layer.0.intermediate.dense", "embeddings.LayerNorm"])
def test_instance_forward_and_parametrization(pair: tuple[nn.Module, nn.Module], path: str) -> None:
    results = []
    for model in pair:
        module = model.get_submodule(path)
        stock = module.forward
        module.forward = lambda x, stock=stock: stock(x) * 1.5
        results.append(valid(model))
        del module.forward
    close(*results)
    results = []
    for model in pair:
        nn.utils.parametrizations.weight_norm(model.encoder.layer[0].output.dense)
        results.append(valid(model))
    close(*results)
    assert "1 of 2 layers fused" in notes(pair[0])


def test_layer_of_another_class_runs_its_own_code(pair: tuple[nn.Module, nn.Module]) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    for model in pair:
        model.encoder.layer[0].output.dense.__class__ = Doubled
    close(*map(valid, pair))
    assert "output.dense is a" in notes(pair[0])
    for model in pair:
        model.encoder.layer = model.encoder.layer[1:]  # and layers may go
    close(*map(valid, pair))


def test_deepcopy_is_independent_and_accelerated(pair: tuple[nn.Module, nn.Module]) -> None:
    ours, theirs = pair
    with torch.no_grad():
        wanted = valid(ours)
        assert ctxfast.explain(ours).packed_bytes
        other = copy.deepcopy(ours)
        assert fused(other) and not ctxfast.explain(other).packed_bytes
        other.encoder.layer[0].output.dense.weight.zero_()
        assert (valid(other) - wanted).abs().max() > 0.01
        close(valid(ours), valid(theirs))


def test_pickles_load_with_and_without_this_package(
    pair: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    ours, theirs = pair
    with torch.no_grad():
        wanted = valid(ours)
    pickled, saved = tmp_path / "pickled", tmp_path / "saved"
    pickled.write_bytes(pickle.dumps(ours))
    torch.save(ours, saved)
    for loaded in (pickle.loads(pickled.read_bytes()), torch.load(saved, weights_only=False)):
        assert fused(loaded)
        close(valid(loaded), wanted)
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ctxfast":
            raise ModuleNotFoundError("no ctxfast", name=name)
sys.meta_path.insert(0, Blocked())
import pickle, torch, transformers
with open("pickled", "rb") as file:
    models = pickle.load(file), torch.load("saved", weights_only=False)
for model, name in zip(models, ("of pickled", "of saved")):
    assert type(model) is transformers.BertModel, type(model).__mro__
    torch.save(model(**torch.load("inputs")).last_hidden_state.detach(), name)
assert "ctxfast" not in sys.modules
"""
    torch.save(inputs(), tmp_path / "inputs")
    line = [sys.executable, "-c", code]
    run = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    mask = inputs()["attention_mask"].bool()
    for name in ("of pickled", "of saved"):
        close(torch.load(tmp_path / name)[mask], valid(theirs))


def test_state_dicts_and_types_and_devices(pair: tuple[nn.Module, nn.Module]) -> None:
    ours, theirs = pair
    other = build("bert", initializer_range=0.1)
    with torch.no_grad():
        valid(ours)
        ours.load_state_dict(other.state_dict())
        assert not ctxfast.explain(ours).packed_bytes
        close(valid(ours), valid(other))
        ours.to(torch.bfloat16)
        result = valid(ours)
        assert result.dtype == torch.bfloat16 == ours.dtype
        close(result.float(), valid(other.to(torch.bfloat16)).float(), 0.1)
        ours.float(), ours.to("cpu")
        valid(ours)
        assert ours.to("meta")(input_ids=torch.ones(1, 3, dtype=torch.long, device="meta"))[
            0
        ].is_meta
    theirs.half()
    ctxfast.accelerate(theirs)
    close(valid(theirs).float(), valid(ctxfast.restore(theirs)).float(), 0.02)


def test_compile_ends_the_graph_and_goes_on(pair: tuple[nn.Module, nn.Module]) -> None:
    ours, theirs = pair
    head = build("bert", "ForSequenceClassification")
    for model, other in ((ours, theirs), (ctxfast.accelerate(twin(head)), head)):
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            close(valid(compiled), valid(other))
    torch.compiler.reset()


def test_export_runs_the_stock_forward(pair: tuple[nn.Module, nn.Module]) -> None:
    ours, theirs = pair
    call = {"input_ids": torch.arange(2, 10).view(1, 8)}
    close(
        torch.jit.trace(ours, call["input_ids"], strict=False)(call["input_ids"])[
            "last_hidden_state"
        ],
        theirs(**call).last_hidden_state,
    )


def test_functional_call_and_transforms(pair: tuple[nn.Module, nn.Module]) -> None:
    results = []
    for model in pair:
        values = {name: 0.5 * p.detach() for name, p in model.named_parameters()}

        def loss(values: dict[str, Tensor], model: nn.Module = model) -> Tensor:
            output = torch.func.functional_call(model, values, kwargs=inputs())
            return output.last_hidden_state[inputs()["attention_mask"].bool()].square().sum()

        results.append(
            (loss(values), torch.func.grad(loss)(values)["encoder.layer.0.output.dense.bias"])
        )
    close(results[0][0], results[1][0])
    close(results[0][1], results[1][1], 1e-4)


def test_replicas_of_data_parallel(pair: tuple[nn.Module, nn.Module]) -> None:
    ours, theirs = pair
    valid(ours)
    replicas = _replicate(ours)
    for replica in replicas:
        close(valid(replica), valid(theirs))
        assert replica.__dict__["_ctxfast"] is ours.__dict__["_ctxfast"]
    valid(replicas[0]).square().sum().backward()
    assert ours.encoder.layer[0].output.dense.weight.grad.any()
    close(valid(nn.DataParallel(ours)), valid(theirs))


def _replicate(model: nn.Module) -> list[nn.Module]:
    """What torch.nn.parallel.replicate does for two devices, on one."""
    modules = list(model.modules())
    places = {module: index for index, module in enumerate(modules)}
    result = []
    for _ in range(2):
        copies = [module._replicate_for_data_parallel() for module in modules]
        for module, replica in zip(modules, copies, strict=True):
            for name, child in module._modules.items():
                replica._modules[name] = None if child is None else copies[places[child]]
            for name, parameter in module._parameters.items():
                setattr(replica, name, None if parameter is None else parameter.view_as(parameter))
        result.append(copies[0])
    return result


def test_resized_token_embeddings(pair: tuple[nn.Module, nn.Module]) -> None:
    call = inputs()
    for model in pair:
        valid(model)
        torch.manual_seed(1)
        model.resize_token_embeddings(60, mean_resizing=False)
    call["input_ids"] = call["input_ids"].clone().masked_fill_(call["input_ids"] == 7, 55)
    ours, theirs = pair
    theirs.load_state_dict(ours.state_dict())
    close(valid(ours, call), valid(theirs, call))


def test_writes_that_bypass_autograd_and_refresh(pair: tuple[nn.Module, nn.Module]) -> None:
    ours, theirs = pair
    with torch.no_grad():
        valid(ours)
        for model in pair:
            model.encoder.layer[1].intermediate.dense.weight.data.mul_(0.5)
        close(valid(ours), valid(theirs))
        for model in pair:
            model.encoder.layer[1].intermediate.dense.weight.data[1, 1] = 3.0
        assert ctxfast.refresh(ours) is ours
        assert not ctxfast.explain(ours).packed_bytes
        close(valid(ours), valid(theirs))


def test_four_threads_at_once(pair: tuple[nn.Module, nn.Module]) -> None:
    ours, theirs = pair
    with torch.no_grad():
        wanted = valid(theirs)
    failures: list[Any] = []

    def work() -> None:
        try:
            with torch.no_grad():
                for _ in range(10):
                    close(valid(ours), wanted)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_global_hooks_and_packed_arguments_run_the_stock_forward(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    ours, theirs = pair
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda *call: seen.append(call[0]))
    close(valid(ours), valid(theirs))
    handle.remove()
    assert any(isinstance(module, nn.LayerNorm) for module in seen)
    call = {**inputs(), "past_key_values": None, "num_items_in_batch": torch.tensor(3)}
    close(valid(ours, call), valid(theirs))
    bytes_before = io.BytesIO()
    torch.save(ours.state_dict(), bytes_before)
    theirs.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="only one|exactly one|at the same time"):
        ours(input_ids=inputs()["input_ids"], inputs_embeds=torch.zeros(4, 9, 32))
