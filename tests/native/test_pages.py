"""Tensors on large pages: what they hold is theirs, and a mapping goes with the last of them."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ctxfast.ops import _native, _native_pages
from ctxfast.ops._native_pages import stream, streamed

pytestmark = pytest.mark.skipif(
    not _native.available(), reason=f"native module absent: {_native.unavailable_reason()}"
)
MIB = 1 << 20


def mapped(monkeypatch):
    """Weak references to the mappings that are made from now on."""
    found = []
    make = _native_pages._map

    def remember(bytes):
        mapping, first = make(bytes)
        found.append(weakref.ref(mapping))
        return mapping, first

    monkeypatch.setattr(_native_pages, "_map", remember)
    monkeypatch.setattr(_native_pages, "_shared", _native_pages._Shared())
    return found


@pytest.mark.parametrize("shape", [(0,), (7,), (3, 5, 1 << 14), (1 << 20,), (3, 1 << 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_shape_dtype_and_alignment(shape, dtype):
    x = stream(shape, dtype)
    assert x.shape == shape and x.dtype == dtype and x.is_contiguous()
    assert x.data_ptr() % 64 == 0 or x.nbytes < 1 << 16
    if x.nbytes >= 2 * MIB:
        assert x.data_ptr() % (2 * MIB) == 0


def test_neighbours_do_not_overlap():
    tensors = [stream((100_003 + i,), torch.int8) for i in range(120)]
    for i, x in enumerate(tensors):
        x.fill_(i)
    assert all(bool((x == i).all()) for i, x in enumerate(tensors))


def test_small_ones_share_mappings_that_go_with_them(monkeypatch):
    mappings = mapped(monkeypatch)
    tensors = [stream((MIB,), torch.int8) for _ in range(8)]
    assert len(mappings) == 1
    tensors.append(stream((MIB,), torch.int8))
    assert len(mappings) == 2
    last = tensors[7]
    del tensors[:8]
    gc.collect()
    assert mappings[0]() is not None
    del last
    gc.collect()
    assert mappings[0]() is None and mappings[1]() is not None
    del tensors
    gc.collect()
    assert mappings[1]() is None
    stream((MIB,), torch.int8)
    assert len(mappings) == 3


def test_large_ones_have_mappings_of_their_own(monkeypatch):
    mappings = mapped(monkeypatch)
    kept = [stream((2 * MIB,), torch.int8) for _ in range(2)]
    assert len(mappings) == 2
    del kept
    gc.collect()
    assert [mapping() for mapping in mappings] == [None, None]


def test_threads_get_places_of_their_own():
    def fill(i):
        x = stream((70_000,), torch.int8)
        return i, x.fill_(i % 100)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(fill, range(400)))
    assert all(bool((x == i % 100).all()) for i, x in results)


def test_a_copy_only_where_it_is_worth_it():
    small, large = torch.randn(10), torch.randn(300_000)
    assert streamed(small) is small
    copy = streamed(large)
    assert copy is not large and torch.equal(copy, large)
