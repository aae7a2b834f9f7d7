"""What Python objects and tensors hold, for checks at every call; through csrc a tenth of what it costs in Python.

Whatever a function gives is equal as long as nothing has changed, and means nothing beyond that.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import numpy as np
from torch import Tensor

from ctxfast.ops._native import _TABLE, _load

_version = attrgetter("_version")


def object_states(objects: tuple[object, ...], dictionaries: tuple[dict[str, Any], ...]) -> Any:
    """The classes of objects, and versions of dictionaries; None where these are not to be had.

    What differs may still be the same objects in the same places.
    """
    module = _load()[0]
    return None if module is None else module.states(objects, dictionaries)


def items_of(dictionaries: Iterable[dict[str, Any]]) -> tuple[Any, ...]:
    """What dictionaries hold: keys and values in turn, dictionary after dictionary."""
    return tuple(chain.from_iterable(chain.from_iterable(map(dict.items, dictionaries))))


def same_items(dictionaries: tuple[dict[str, Any], ...], items: tuple[Any, ...]) -> bool:
    """Whether `items_of(dictionaries)` are these very objects."""
    module = _load()[0]
    if module is not None:
        return bool(module.same_items(dictionaries, items))
    found = items_of(dictionaries)
    return len(found) == len(items) and all(map(is_, found, items))


def tensor_states(tensors: tuple[Tensor, ...], versioned: tuple[Tensor, ...]) -> Any:
    """Address, device, dtype, shape and strides of tensors, and the versions of some."""
    module, states = _load()[0], None
    if module is not None and _TABLE is not None:
        states = module.tensor_states(tensors, versioned, _TABLE)
    if states is not None:
        return states
    forms = [(x.data_ptr(), x.device, x.dtype, x.shape, x.stride()) for x in tensors]
    return forms, list(map(_version, versioned))


class Samples:
    """Single values of arrays, read where they lie: somebody else keeps their memory."""

    __slots__ = ("_addresses", "_arrays")

    def __init__(self, arrays: Iterable[np.ndarray]) -> None:
        """arrays: one-dimensional"""
        self._arrays = list(arrays)
        places: dict[int, list[int]] = {}
        for array in self._arrays:
            first, step = array.__array_interface__["data"][0], array.strides[0]
            places.setdefault(array.itemsize, []).extend(
                range(first, first + step * len(array), step) if len(array) else ()
            )
        self._addresses = [
            (size, np.array(found, np.uintp).tobytes()) for size, found in places.items()
        ]

    def values(self) -> list[bytes]:
        """What they are now."""
        module = _load()[0]
        if module is None:
            return [array.tobytes() for array in self._arrays]
        return [module.values_at(addresses, size) for size, addresses in self._addresses]
