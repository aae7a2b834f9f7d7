"""Settings of every test: two threads, interpreted Triton, and memory that is never zero by luck."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when a kernel is decorated
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# Spinning threads starve each other on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

if TYPE_CHECKING:
    from ctxfast.nn.encoder_layer import EncoderLayer

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = str(Path(__file__).resolve().parent.parent / "ctxfast") + os.sep


def pytest_configure(config: pytest.Config) -> None:
    """Tests can be interrupted, and those that were asked for a GPU compile their kernels."""
    # A shell's background job ignores interrupts, and so would every process that a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.option.markexpr == "gpu":
        os.environ["TRITON_INTERPRET"] = "0"


def _patched_once_a_launch(patch: Callable) -> Callable:
    """What Triton's interpreter does to its language before a function runs, done once for each module of a launch.

    The interpreter repeats it at every call that a kernel makes to another function, which finds everything patched
    already: half of the time of a test of kernels.
    """
    patched: set[int] = set()

    def patch_once(function: Callable) -> object:
        module = id(function.__globals__)
        if module in patched:
            return None
        scope = patch(function)
        if not patched:  # the launch itself, which restores the language when it ends
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        patched.add(module)
        return scope

    return patch_once


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    if hasattr(interpreter, "_patch_lang"):  # of no public interface
        interpreter._patch_lang = _patched_once_a_launch(interpreter._patch_lang)


_EMPTY = ("empty", "empty_like", "empty_strided", "frombuffer")  # the last of a fresh mapping
_NEW_EMPTY = ("new_empty", "new_empty_strided")


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if (
        tensor.is_floating_point()
        and tensor.device.type in ("cpu", "cuda")
        and not torch.compiler.is_compiling()
    ):
        tensor.detach().fill_(float("nan"))
    return tensor


def _called_from_package() -> bool:
    import ctxfast

    return sys._getframe(2).f_code.co_filename.startswith(str(Path(ctxfast.__file__).parent))


def _poisoned(function):
    def allocate(*args, **kwargs):
        tensor = function(*args, **kwargs)
        if type(tensor) is torch.Tensor and _called_from_package():
            return _poison(tensor)
        return tensor

    return allocate


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Uninitialised floating memory that the package asks for holds NaN: a value nobody wrote is seen."""
    if request.node.get_closest_marker("unpoisoned"):
        return
    for name in _EMPTY:
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in _NEW_EMPTY:
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real text; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("CTXFAST_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder} (set CTXFAST_TEST_DATA)")
    return folder


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512_bf16", "amx"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set of the native module, in use."""
    from ctxfast.ops import _native

    if not _native.available():
        pytest.skip(f"native module absent: {_native.unavailable_reason()}")
    if request.param not in _native.available_isas():
        pytest.skip(f"this processor does not run {request.param}")
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


@pytest.fixture
def native_layers(monkeypatch: pytest.MonkeyPatch) -> list[EncoderLayer]:
    """The encoder layers that have run as native calls."""
    from ctxfast.nn.encoder_layer import EncoderRun

    seen: list[EncoderLayer] = []
    run = EncoderRun.stack

    def spy(self: EncoderRun, layers: Sequence[EncoderLayer], hidden: torch.Tensor) -> torch.Tensor:
        seen.extend(layers)
        return run(self, layers, hidden)

    monkeypatch.setattr(EncoderRun, "stack", spy)
    return seen


@pytest.fixture(params=["bfloat16", "int8"])
def precision(request: pytest.FixtureRequest) -> str:
    """A compute type that `ctxfast.nn.set_precision` can set here."""
    from ctxfast.ops import _onednn
    from ctxfast.ops.linear_int8 import int8_unavailable_reason

    if request.param == "int8" and int8_unavailable_reason() is not None:
        pytest.skip(str(int8_unavailable_reason()))
    row = torch.ones(1, 1, dtype=torch.bfloat16)
    reason = _onednn.linear_refuses(row, row, None, "none", None, None)
    if request.param == "bfloat16" and reason is not None:
        pytest.skip(reason)
    return request.param
