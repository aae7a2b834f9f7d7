"""Memory for what is read from its first byte to its last in every call; the rules of `_native.py` hold here too.

A stream through small pages waits for their addresses: such tensors lie on large ones, those that fill none beside
each other.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ctxfast.ops._native import _module, available

_LARGE_PAGE = 2 << 20
_SMALLEST = 1 << 16  # bytes of a tensor that is worth it
_LINE = 64


def _map(bytes: int) -> tuple[mmap.mmap, int]:
    """A mapping, and where its first large page begins.

    What of it is not written takes no memory, unlike what an allocator hands out again.
    """
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    mapping = mmap.mmap(-1, bytes + _LARGE_PAGE, private)
    address = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
    first = -address % _LARGE_PAGE
    _module().advise_large_pages(address + first, bytes)
    return mapping, first


class _Shared:
    """Places in mappings of a few large pages, each of which lives as long as a tensor in it."""

    BYTES = 4 * _LARGE_PAGE

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mapping: Callable[[], mmap.mmap | None] = lambda: None
        self._next = self._end = 0

    def place(self, bytes: int) -> tuple[mmap.mmap, int]:
        with self._lock:
            mapping = self._mapping()
            if mapping is None or self._next + bytes > self._end:
                mapping, self._next = _map(self.BYTES)
                self._mapping = weakref.ref(mapping)
                self._end = self._next + self.BYTES
            first = self._next
            self._next += -(-bytes // _LINE) * _LINE
        return mapping, first


_shared = _Shared()


def stream(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on large pages."""
    bytes = math.prod(shape) * dtype.itemsize
    if bytes < _SMALLEST:
        return torch.empty(shape, dtype=dtype)
    mapping, first = _map(bytes) if bytes >= _LARGE_PAGE else _shared.place(bytes)
    return torch.frombuffer(mapping, dtype=dtype, offset=first, count=math.prod(shape)).view(shape)


def streamed(x: Tensor) -> Tensor:
    """x, or a copy of it on large pages where it is read on a CPU and worth it."""
    if not (x.is_cpu and available() and x.nbytes >= _SMALLEST):
        return x
    return stream(x.shape, x.dtype).copy_(x)
