"""What modules were like when something was made of them, compared with what they are like at every call.

Looking at a hundred modules one by one costs Python as much as a small layer costs to compute. So what has to stay is
written down once, in lists that are compared whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter, is_

import numpy as np
from torch import Tensor, nn

from ctxfast.nn.packed_copy import Fingerprint

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_address = Tensor.data_ptr
_form = attrgetter("dtype", "shape")


class Snapshot:
    """The modules below `roots` without hooks, their attributes and submodules, and their parameters.

    copied: the fingerprints of those parameters whose values were copied. The others are read where they lie.
    """

    def __init__(self, roots: Sequence[nn.Module], copied: Iterable[Fingerprint]) -> None:
        self.roots = list(roots)
        self._modules = [module for root in roots for module in root.modules()]
        self._classes = [type(module) for module in self._modules]
        self._attributes = [module.__dict__ for module in self._modules]
        self._attributes_then = [dict(own) for own in self._attributes]
        self._children = [module._modules for module in self._modules]
        self._children_then = [dict(own) for own in self._children]
        self._hooks = [own[name] for own in self._attributes for name in _HOOKS]
        self._parameters = [module._parameters for module in self._modules if module._parameters]
        self._parameters_then = list(self._given())
        self._addresses = list(map(_address, self._parameters_then))
        self._forms = list(map(_form, self._parameters_then))
        self._versioned = [x for x in self._parameters_then if not x.is_inference()]
        self._versions = [x._version for x in self._versioned]
        self._samples = [fingerprint.sample for fingerprint in copied]
        self._values = self._sampled()

    def _given(self) -> Iterable[Tensor]:
        owned = chain.from_iterable(map(dict.values, self._parameters))
        return (parameter for parameter in owned if parameter is not None)

    def _sampled(self) -> bytes:
        return np.concatenate(self._samples).tobytes() if self._samples else b""

    def _same_attributes(self) -> bool:
        try:
            return self._attributes == self._attributes_then
        except (RuntimeError, ValueError):  # another array or tensor, which has no truth value
            return False

    def matches(self, roots: Iterable[nn.Module]) -> bool:
        """Whether these are the modules, and all is as it was."""
        parameters = list(self._given())
        return (
            list(roots) == self.roots
            and not any(self._hooks)
            and list(map(type, self._modules)) == self._classes
            and self._children == self._children_then
            and self._same_attributes()
            and len(parameters) == len(self._parameters_then)
            and all(map(is_, parameters, self._parameters_then))
            # The addresses come before the samples: a storage that was freed since must not be read.
            and list(map(_address, parameters)) == self._addresses
            and [x._version for x in self._versioned] == self._versions
            and list(map(_form, parameters)) == self._forms
            and self._sampled() == self._values
        )
