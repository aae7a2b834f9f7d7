"""The host execution of CUDA kernels finds what a GPU would only sometimes show."""

from __future__ import annotations

import pytest
import torch

from tests.native import simt


def run(name, data=None, *, blocks=2, threads=64, cluster=1, seed=0):
    data = torch.zeros(1024) if data is None else data
    return simt.self_test(name, data, blocks, threads, cluster, seed)


@pytest.mark.parametrize("seed", range(20))
def test_sound_kernels_pass(seed):
    assert run("message", threads=32, seed=seed) == ""
    assert run("neighbours", seed=seed) == ""
    assert run("remote", cluster=2, seed=seed) == ""
    assert run("message in a cluster", threads=32, cluster=2, seed=seed) == ""


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    "name, found, grid",
    [
        ("message without fence", "race", {"threads": 32}),
        ("message without acquire", "race", {"threads": 32}),
        ("message in a block", "race", {"threads": 32}),
        ("message acquired in a block", "race", {"threads": 32}),
        ("message in a cluster", "race", {"threads": 32}),
        ("neighbours without barrier", "race", {}),
        ("remote without barrier", "race", {"cluster": 2}),
        ("flag nobody sets", "deadlock", {}),
        ("barriers of two kinds", "deadlock", {"cluster": 2}),
        ("half a warp", "mma in a warp of which lanes have ended|ended while its warp", {}),
        ("out of bounds", "out of bounds", {}),
        ("misaligned", "misaligned", {}),
        ("beyond shared memory", "shared memory|out of bounds", {}),
        ("constant that is written", "read as constant", {}),
        ("plain access to a flag", "atomic", {}),
    ],
)
def test_faulty_kernels_are_found(name, found, grid, seed):
    """Whatever the order of the threads: an unordered pair of accesses is seen without a wrong value."""
    verdict = run(name, seed=seed, **grid)
    assert any(part in verdict for part in found.split("|")), f"{name}: {verdict or 'passed'}"


def test_fragments_of_the_tensor_core_product():
    data = torch.zeros(1024)
    a = torch.randint(-8, 9, (16, 16)).float()
    b = torch.randint(-8, 9, (16, 8)).float()
    data[64 : 64 + 256], data[320 : 320 + 128] = a.flatten(), b.t().flatten()
    assert run("product", data, blocks=1, threads=32) == ""
    assert torch.equal(data[448 : 448 + 128].view(16, 8), a @ b)


def test_the_order_of_threads_is_a_function_of_the_seed():
    """The same seed finds the same race between the same two threads; another seed another one."""
    verdicts = [run("neighbours without barrier", seed=seed) for seed in (1, 1, 2, 3, 4)]
    assert verdicts[0] == verdicts[1] and len(set(verdicts)) > 1
