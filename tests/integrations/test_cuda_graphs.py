"""CUDA graphs of an accelerated encoder: the results of its launches, and no change of the model or the batch unseen.

Without a device a recorder stands in for CUDA's: it runs what was captured again, on the same buffers.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ctxfast
from ctxfast.integrations import _accelerate, _graphs
from ctxfast.integrations._swap import state_of
from ctxfast.ops import _dispatch
from tests.integrations.lifecycle_cases import inputs, notes, valid
from tests.integrations.model_cases import FAMILIES, batch, build, close, padding_mask

transformers = pytest.importorskip("transformers")

Captures = list[tuple[int, ...]]


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    """The shapes of the results of all captures made so far."""
    shapes: Captures = []

    class HostRecorder:
        busy = False

        def capture(self, body: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
            assert self.busy
            body()
            output = body()
            shapes.append(tuple(output.shape))
            return lambda: output.copy_(body()), output

        @contextlib.contextmanager
        def turn(self) -> Any:
            assert not self.busy
            self.busy = True
            yield
            self.busy = False

        def wait(self) -> None:
            pass

    monkeypatch.setattr(_graphs, "Recorder", HostRecorder)
    monkeypatch.setattr(_graphs, "_capturable", lambda hidden: True)
    monkeypatch.setattr(_accelerate, "_require_cuda", lambda encoders: None)
    return shapes


def pair(family: str = "bert", **options: Any) -> tuple[nn.Module, nn.Module]:
    """The same model, accelerated with graphs and without."""
    model = build(family)
    plain = ctxfast.accelerate(copy.deepcopy(model), **options)
    return ctxfast.accelerate(model, cuda_graphs=True, **options), plain


@pytest.mark.parametrize("layout", ["right", "left", "holes", "ones"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gives_what_the_launches_give(captures: Captures, family: str, layout: str) -> None:
    graphed, plain = pair(family)
    call = batch(padding_mask(layout))
    with torch.inference_mode():
        found, expected = [graphed(**call) for _ in range(2)], plain(**call)
    for output in found:
        close(output.last_hidden_state, expected.last_hidden_state)
        if expected.get("pooler_output") is not None:
            close(output.pooler_output, expected.pooler_output)
    on_the_grid = family == "mpnet" and layout == "holes"
    assert len(captures) == (0 if on_the_grid else 1)


def test_computes_in_the_type_that_was_asked_for(captures: Captures) -> None:
    graphed, plain = pair(dtype=torch.bfloat16)
    exact = ctxfast.restore(copy.deepcopy(plain)).double()
    with torch.no_grad():
        truth = valid(exact)
        error, allowed = ((valid(model) - truth).abs().max() for model in (graphed, plain))
    assert len(captures) == 1 and 0 < error <= 2 * allowed


def test_one_graph_serves_a_bucket(captures: Captures) -> None:
    graphed, plain = pair()
    lengths = [[9, 3, 1, 6], [9, 9, 1], [2, 2, 9, 9], [9, 9, 9, 9], [9] * 8, [9] * 5, [5]]
    with torch.no_grad():
        for found in lengths:
            call = batch(torch.arange(9) < torch.tensor(found)[:, None])
            close(valid(graphed, call), valid(plain, call))
    # 19, 19 and 22 tokens of up to 4 sequences; 36; 72 of 8, 45 of 5; 5 of one
    assert captures == [(24, 32), (48, 32), (96, 32), (48, 32), (16, 32)]
    assert "5 CUDA graphs" in notes(graphed) and "CUDA graphs" not in notes(plain)


def test_what_lies_beyond_the_last_token_does_not_matter(captures: Captures) -> None:
    graphed, plain = pair()
    width = graphed.config.hidden_size
    poison = torch.full((2, 9, width), torch.nan)
    with torch.no_grad():
        graphed(inputs_embeds=poison)  # 18 rows
        call = batch(torch.arange(9) < torch.tensor([[9], [8]]))
        close(valid(graphed, call), valid(plain, call))
    assert len(captures) == 1


def test_a_result_outlives_the_next_call(captures: Captures) -> None:
    graphed, _ = pair()
    call = batch(padding_mask("ones"))
    with torch.no_grad():
        first = graphed(**call).last_hidden_state
        kept = first.clone()
        graphed(**{**call, "input_ids": call["input_ids"].flip(0)})
    assert torch.equal(first, kept)


def scale(model: nn.Module) -> None:
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(1.5)


def replace(model: nn.Module) -> None:
    dense = model.encoder.layer[0].output.dense
    dense.weight = nn.Parameter(dense.weight.detach() * 1.5)


def point_elsewhere(model: nn.Module) -> None:
    dense = model.encoder.layer[0].output.dense
    dense.weight.data = dense.weight.detach() * 1.5


def change_eps(model: nn.Module) -> None:
    model.encoder.layer[1].output.LayerNorm.eps = 0.5


def hook(model: nn.Module) -> None:
    model.encoder.layer[1].output.dense.register_forward_hook(lambda m, args, output: output * 2)


@pytest.mark.parametrize(
    ("change", "count"),
    [(scale, 1), (replace, 2), (point_elsewhere, 2), (change_eps, 2), (hook, 1)],
)
def test_sees_a_change(captures: Captures, change: Callable[[nn.Module], None], count: int) -> None:
    graphed, plain = pair()
    with torch.no_grad():
        before = valid(graphed)
        for model in (graphed, plain):
            change(model)
        close(valid(graphed), valid(plain))
        assert not torch.allclose(valid(graphed), before, atol=1e-3)
    assert len(captures) == count


def test_training_between_calls(captures: Captures) -> None:
    graphed, plain = pair()
    with torch.no_grad():
        valid(graphed)
    for model in (graphed, plain):
        model.train()
        valid(model).square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.01).step()
        model.eval()
    with torch.no_grad():
        close(valid(graphed), valid(plain))
    assert len(captures) == 2


CALLS: dict[str, dict[str, Any]] = {
    "hidden states": {"output_hidden_states": True},
    "attention weights": {"output_attentions": True},
    "4-dimensional mask": {"attention_mask": torch.ones(4, 1, 9, 9, dtype=torch.bool)},
}


@pytest.mark.parametrize("name", CALLS)
def test_other_calls_launch_their_kernels(captures: Captures, name: str) -> None:
    graphed, plain = pair()
    with torch.no_grad():
        found, expected = (m(**{**inputs(), **CALLS[name]}) for m in (graphed, plain))
    close(found.last_hidden_state, expected.last_hidden_state)
    assert captures == []


def adapt(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"])).eval()
    return contextlib.nullcontext()


def drop_out(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    model.encoder.layer[0].output.dropout.train()
    return contextlib.nullcontext()


OBSERVERS: dict[str, Callable[[nn.Module], contextlib.AbstractContextManager[Any]]] = {
    "gradients": lambda model: torch.enable_grad(),
    "autocast": lambda model: torch.autocast("cpu", torch.bfloat16),
    "a reference backend": lambda model: _dispatch.use_backend("reference"),
    "an adapter": adapt,
    "dropout": drop_out,
}


@pytest.mark.parametrize("name", OBSERVERS)
def test_whoever_looks_at_the_parts_gets_launches(captures: Captures, name: str) -> None:
    graphed, plain = pair()
    with torch.no_grad():
        observers = [OBSERVERS[name](model) for model in (graphed, plain)]
        with observers[0]:
            close(valid(graphed), valid(plain))
    assert captures == []


def test_explain_sees_every_operator(captures: Captures) -> None:
    graphed, _ = pair()
    with torch.no_grad():
        valid(graphed)
        assert "attention_varlen" in str(ctxfast.explain(graphed, **inputs()))


def test_long_calls_launch_their_kernels(
    captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_graphs, "_MOST_ROWS", 18)
    graphed, plain = pair()
    with torch.no_grad():
        close(valid(graphed), valid(plain))
    assert captures == []


def test_the_graph_that_served_longest_ago_goes_first(
    captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_graphs, "_MOST_GRAPHS", 2)
    graphed, _ = pair()
    one, two, four = (batch(torch.ones(rows, 9, dtype=torch.bool)) for rows in (1, 2, 4))
    with torch.no_grad():
        for call in (one, two, one, four, one, two):
            graphed(**call)
    assert [rows for rows, _ in captures] == [16, 24, 48, 24]
    assert len(state_of(graphed).graphs) == 2


def test_four_threads_at_once(captures: Captures) -> None:
    graphed, plain = pair()
    calls = [
        {k: v.roll(shift, 0) for k, v in batch(padding_mask("right")).items()} for shift in range(4)
    ]
    failures: list[BaseException] = []

    def work(call: dict[str, Tensor], expected: Tensor) -> None:
        try:
            with torch.no_grad():
                for _ in range(10):
                    close(valid(graphed, call), expected)
        except BaseException as error:
            failures.append(error)

    with torch.no_grad():
        expected = [valid(plain, call) for call in calls]
    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(calls, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_copies_capture_their_own(captures: Captures) -> None:
    graphed, plain = pair()
    with torch.no_grad():
        valid(graphed)
        twin = copy.deepcopy(graphed)
        scale(twin)
        assert not torch.allclose(valid(twin), valid(graphed), atol=1e-3)
        close(valid(graphed), valid(plain))
    assert len(captures) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["bert", "mpnet", "albert"])
def test_on_a_device(family: str, dtype: torch.dtype | None) -> None:
    model = build(family).cuda()
    exact = copy.deepcopy(model).double()
    plain = ctxfast.accelerate(copy.deepcopy(model), dtype=dtype)
    graphed = ctxfast.accelerate(model, dtype=dtype, cuda_graphs=True)

    def check(call: dict[str, Tensor]) -> Tensor:
        truth, found, launched = (valid(m, call) for m in (exact, graphed, plain))
        if dtype is None:
            close(found, launched)
        error, allowed = ((x - truth).abs().max() for x in (found, launched))
        assert dtype is None or error <= 2 * allowed
        return found

    with torch.no_grad():
        for lengths in ([9, 3, 1, 6], [9, 9], [2, 7, 9], [9, 3, 1, 6]):
            call = batch(torch.arange(9) < torch.tensor(lengths)[:, None])
            call = {name: value.cuda() for name, value in call.items()}
            found = check(call)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            assert torch.equal(valid(graphed, call), found)
        torch.cuda.current_stream().wait_stream(side)
        graphs = state_of(graphed).graphs
        assert len(graphs) == 2
        for m in (exact, graphed, plain):
            for parameter in m.parameters():
                parameter.mul_(1.25)
        check(call)
        assert state_of(graphed).graphs is graphs  # which read parameters where they lie
