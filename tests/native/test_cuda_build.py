"""The CUDA sources without a GPU: they compile, do not spill, and keep their rules."""

from __future__ import annotations

import importlib
import re

import pytest

from ctxfast.benchmarks import resources

CUDA = resources.CSRC / "cuda"
needs_nvcc = pytest.mark.skipif(resources.nvcc() is None, reason="needs nvcc")


def test_instructions_of_the_gpu_are_in_one_file():
    """Assembly, and what differs between device and host, is in device.cuh; the rest runs as it is on the host."""
    for path in sorted(CUDA.iterdir()):
        if path.name == "device.cuh":
            continue
        text = re.sub(r"//.*", "", path.read_text())
        assert not re.search(r"\basm\b", text), path
        assert not re.search(r"#\s*(if|ifdef|ifndef|elif)\b", text), path
        if path.suffix == ".cuh" and not path.name.endswith(("_table.cuh", "_launch.cuh")):
            builtins = r"threadIdx|blockIdx|__shared__|__syncthreads|__shfl|__ldg|atomic[A-Z]"
            assert not re.search(builtins, text), path


def check(found):
    assert found
    wrong = [x for x in found if x.stack or x.spills]
    assert not wrong, "\n".join(map(str, wrong))


@needs_nvcc
@pytest.mark.parametrize(
    "source, architecture",
    [("lstm_persistent_bfloat16.cu", "90a"), ("lstm_stepwise_float32.cu", "80")],
)
def test_no_spills(source, architecture):
    found = resources.compile_source(source, (architecture,))
    check(found)
    if "persistent" in source:  # all weights that were meant for registers are there
        assert all(x.registers > 150 for x in found if "/512" in x.kernel)


@pytest.mark.full
@needs_nvcc
@pytest.mark.parametrize("source", resources.SOURCES)
def test_no_spills_anywhere(source):
    found = resources.compile_source(source, resources.ARCHITECTURES)
    check(found)
    committed = resources.RESULT.read_text()
    missing = [x.kernel for x in found if f"| {x.kernel} |" not in committed]
    assert not missing, f"run python -m ctxfast.benchmarks.resources: {missing}"


def test_the_module_loads_without_a_driver():
    try:
        module = importlib.import_module("ctxfast._C_cuda")
    except ModuleNotFoundError:
        pytest.skip("the CUDA module is not built")
    kernels = module.lstm_kernels()
    sizes = {(hidden, features) for _, hidden, features, *_ in kernels}
    assert sizes == {(4096, 512), (2048, 256), (1024, 128)}
    assert all(max(forward, backward) <= 227 << 10 for *_, forward, backward in kernels)
