"""Threads, processes and tensors at the raw-pointer boundary, and builds without a compiler."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ctxfast import ops, reference
from ctxfast.ops import _native, _native_attention

ROOT = Path(__file__).resolve().parent.parent.parent
needs_native = pytest.mark.skipif(
    not _native.available(), reason=f"native module absent: {_native.unavailable_reason()}"
)


def run_python(code: str, **variables: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_the_number_of_threads(threads):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(3, 4, 70, 32, generator=generator, requires_grad=True)
    before = torch.get_num_threads()

    def run(count):
        torch.set_num_threads(count)
        output = ops.attention(q, q, q, is_causal=True)
        return output, torch.autograd.grad(output.square().sum(), q)[0]

    try:
        expected, found = run(1), run(threads)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


@needs_native
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_one_openmp_runtime_in_the_process():
    code = """
import torch, re
from ctxfast import ops
x = torch.randn(2, 2, 64, 16)
ops.attention(x, x, x)
text = open("/proc/self/maps").read()
print(len(set(re.findall(r"\\S*lib(?:g|i)omp\\S*", text))))
"""
    assert run_python(code).strip() == "1"


@needs_native
def test_a_forked_child_runs_with_one_thread():
    code = """
import os, torch
from ctxfast import ops
torch.set_num_threads(2)
x = torch.randn(4, 4, 64, 16)
expected = ops.attention(x, x, x)
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(ops.attention(x, x, x), expected) else 1)
print(os.waitpid(pid, 0)[1])
"""
    assert run_python(code).strip() == "0"


@needs_native
def test_tensors_that_raw_pointers_cannot_describe_are_refused():
    class Tagged(torch.Tensor):
        pass

    x = torch.randn(1, 1, 4, 4)
    refuses = _native_attention.attention_refuses
    assert "Tagged" in refuses(x.as_subclass(Tagged), x, x)
    assert "device meta" in refuses(x.to("meta"), x, x)
    assert "negated" in refuses(torch.view_as_complex(torch.randn(1, 1, 4, 4, 2)).conj().imag, x, x)
    assert "float16" in refuses(x.half(), x.half(), x.half())
    assert refuses(torch.nn.Parameter(x), x, x) is None


@needs_native
def test_unaligned_and_overlapping_inputs_are_read_correctly():
    raw = torch.zeros(4 * 64 + 4, dtype=torch.uint8)
    unaligned = raw[1 : 1 + 4 * 64].view(torch.uint8)
    unaligned.copy_(torch.randn(64).view(torch.uint8))
    x = torch.frombuffer(
        bytearray(b"\0" + bytes(unaligned.tolist())), dtype=torch.float32, offset=1
    )
    x = x.view(1, 1, 16, 4)
    windows = torch.randn(40).as_strided((1, 1, 16, 4), (0, 0, 2, 1))  # rows overlap
    for tensor in (x, windows):
        expected = reference.attention(*(tensor.clone() for _ in range(3)))
        torch.testing.assert_close(ops.attention(tensor, tensor, tensor), expected)


@needs_native
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 5, 3, 9], "cu_seqlens_q must rise from 0 to at most 9 .* got 5 and 3 for sequence 1"),
        (
            [0, 5, 9, 12],
            "cu_seqlens_q must rise from 0 to at most 9 .* got 9 and 12 for sequence 2",
        ),
        ([1, 5, 6, 9], "cu_seqlens_q must rise from 0"),
        ([0, 1, 9, 9], "max_seqlen 6, got 1 and 9 for sequence 1"),
    ],
)
def test_offsets_are_checked_before_they_become_addresses(offsets, message):
    x = torch.randn(9, 2, 4)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    call = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    with ops.use_backend("native"), pytest.raises(ValueError, match=message):
        ops.attention_varlen(x, x, x, max_seqlen_q=6, max_seqlen_k=6, **call)


@pytest.fixture
def checkout(tmp_path):
    for name in ("csrc", "kernels", "benchmarks", "ctxfast"):
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
            ignore=shutil.ignore_patterns("*.so", "__pycache__", "results", "_build_log*"),
            symlinks=True,
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def build(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, "CTXFAST_CUDA": "0", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_a_compiler_the_reference_runs_and_the_reason_is_kept(checkout):
    run = build(checkout, CXX="no-such-compiler")
    assert run.returncode == 0, run.stderr
    log = json.loads((checkout / "ctxfast" / "_build_log.json").read_text())
    assert log["cpu"]["status"] == "failed" and "no-such-compiler" in json.dumps(log["cpu"])
    code = """
import sys
# The finder of an editable install would find the module of the tree that the tests belong to.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import torch
from ctxfast import ops
from ctxfast.ops import _native
x = torch.randn(1, 1, 4, 4)
expected = torch.nn.functional.scaled_dot_product_attention(x, x, x)
torch.testing.assert_close(ops.attention(x, x, x), expected)
print(_native.unavailable_reason())
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0 and "no-such-compiler" in result.stdout, result.stderr
    assert re.search("attention runs on the eager reference", result.stderr)


def test_a_required_native_build_fails_loudly(checkout):
    run = build(checkout, CXX="no-such-compiler", CTXFAST_REQUIRE_NATIVE="1")
    assert run.returncode != 0 and "no-such-compiler" in run.stderr
