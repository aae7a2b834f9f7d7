"""What modules were like when something was concluded or made from them, compared with what they are at every call.

Looking at a hundred modules one by one costs Python as much as a small layer costs to compute. So what has to stay is
written down once, in lists that are compared whole, through loops in C.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any

import numpy as np
from torch import Tensor, nn

from ctxfast.nn.packed_copy import Fingerprint

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_form = attrgetter("dtype", "shape")


class Certificate:
    """What was observed of some modules. Conclusions drawn from it are good for as long as `holds()`.

    That is: the same classes, the same submodules and parameters in the same places, the same hooks, the same forwards
    of instances.
    """

    __slots__ = (
        "_classes",
        "_contents",
        "_dictionaries",
        "_empty",
        "_forwards",
        "_hooks",
        "_modules",
        "_own",
    )

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = tuple(dict.fromkeys(modules))
        self._classes = tuple(map(type, self._modules))
        self._own = tuple(module.__dict__ for module in self._modules)
        self._forwards = tuple(map(dict.get, self._own, repeat("forward")))
        hooks = [getattr(module, kind) for module in self._modules for kind in HOOKS]
        self._empty = tuple(found for found in hooks if not found)
        self._hooks = tuple((found, tuple(found)) for found in hooks if found)
        held = [d for module in self._modules for d in (module._modules, module._parameters)]
        self._dictionaries = tuple(held)
        self._contents = tuple(_values(held))

    def holds(self) -> bool:
        """Whether everything is as it was."""
        contents = tuple(_values(self._dictionaries))
        return (
            not any(self._empty)
            and all(map(is_, map(type, self._modules), self._classes))
            and all(map(is_, map(dict.get, self._own, repeat("forward")), self._forwards))
            and len(contents) == len(self._contents)
            and all(map(is_, contents, self._contents))
            and all(tuple(found) == keys for found, keys in self._hooks)
        )


def _values(dictionaries: Iterable[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, dictionaries))


class Snapshot(Certificate):
    """A certificate of all modules below `roots`, of their attributes, and of what their parameters hold.

    copied: the fingerprints of those parameters whose values were copied. The others are read where they lie.
    """

    __slots__ = (
        "_addresses",
        "_attributes",
        "_forms",
        "_parameters",
        "_roots",
        "_samples",
        "_values",
        "_versioned",
        "_versions",
    )

    def __init__(self, roots: Iterable[nn.Module], copied: Iterable[Fingerprint]) -> None:
        self._roots = list(roots)
        super().__init__(module for root in self._roots for module in root.modules())
        self._attributes = tuple(map(dict, self._own))
        self._parameters = [x for x in self._contents if isinstance(x, Tensor)]
        self._addresses = list(map(Tensor.data_ptr, self._parameters))
        self._forms = list(map(_form, self._parameters))
        self._versioned = [x for x in self._parameters if not x.is_inference()]
        self._versions = [x._version for x in self._versioned]
        self._samples = [fingerprint.sample for fingerprint in copied]
        self._values = self._sampled()

    def _sampled(self) -> bytes:
        return np.concatenate(self._samples).tobytes() if self._samples else b""

    def _same_attributes(self) -> bool:
        try:
            return self._own == self._attributes
        except (RuntimeError, ValueError):  # another array or tensor, which has no truth value
            return False

    def matches(self, roots: Iterable[nn.Module]) -> bool:
        """Whether these are the roots, and everything is as it was."""
        return list(roots) == self._roots and self.holds() and self.contents_hold()

    def contents_hold(self) -> bool:
        """Whether attributes and parameters are as they were, where it is known that the certificate holds."""
        return (
            self._same_attributes()
            # The addresses come before the samples: a storage that was freed since must not be read.
            and list(map(Tensor.data_ptr, self._parameters)) == self._addresses
            and [x._version for x in self._versioned] == self._versions
            and list(map(_form, self._parameters)) == self._forms
            and all(map(Tensor.is_contiguous, self._parameters))
            and self._sampled() == self._values
        )
