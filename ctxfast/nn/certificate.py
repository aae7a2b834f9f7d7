"""What modules were like when something was concluded or made from them, compared with what they are at every call.

Looking at a hundred modules one by one costs Python as much as a small layer costs to compute. So what has to stay is
written down once, in lists that are compared whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ctxfast.nn.packed_copy import Fingerprint
from ctxfast.ops._native_certificate import (
    Samples,
    items_of,
    object_states,
    same_items,
    tensor_states,
)

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PARTS = ("_modules", "_parameters", "_buffers", *HOOKS)


class Certificate:
    """What was observed of some modules. Conclusions drawn from it are good for as long as `holds()`.

    That is: the same classes, the same attributes, whatever their names, and the same submodules, parameters, buffers
    and hooks in the same places. An attribute is the same if it is the same object.

    more: dictionaries whose contents have to stay, too
    """

    __slots__ = ("_classes", "_dictionaries", "_items", "_modules", "_states")

    def __init__(self, modules: Iterable[nn.Module], *more: dict[str, Any]) -> None:
        self._modules = tuple(dict.fromkeys(modules))
        self._classes = list(map(type, self._modules))
        own = [module.__dict__ for module in self._modules]
        self._dictionaries = (*own, *(held[part] for part in _PARTS for held in own), *more)
        self._states = object_states(self._modules, self._dictionaries)
        self._items = items_of(self._dictionaries)

    def holds(self) -> bool:
        """Whether everything is as it was."""
        states = object_states(self._modules, self._dictionaries)
        if states is not None and states == self._states:
            return True
        same = list(map(type, self._modules)) == self._classes and same_items(
            self._dictionaries, self._items
        )
        if same:  # something was replaced by itself
            self._states = states
        return same


class Snapshot(Certificate):
    """A certificate of all modules below `roots`, and of what their parameters hold.

    copied: the fingerprints of those parameters whose values were copied. The others are read where they lie.
    """

    __slots__ = ("_parameters", "_roots", "_samples", "_tensors", "_values", "_versioned")

    def __init__(self, roots: Iterable[nn.Module], copied: Iterable[Fingerprint]) -> None:
        self._roots = list(roots)
        super().__init__(module for root in self._roots for module in root.modules())
        held = [x for module in self._modules for x in module._parameters.values()]
        self._parameters = tuple(x for x in held if x is not None)
        copied = list(copied)
        originals = (fingerprint.parameter() for fingerprint in copied)
        self._versioned = tuple(x for x in originals if x is not None and not x.is_inference())
        self._tensors = tensor_states(self._parameters, self._versioned)
        self._samples = Samples(fingerprint.sample for fingerprint in copied)
        self._values = self._samples.values()

    def matches(self, roots: Iterable[nn.Module]) -> bool:
        """Whether these are the roots, and everything is as it was."""
        return list(roots) == self._roots and self.holds() and self.parameters_hold()

    def parameters_hold(self) -> bool:
        """Whether the parameters are as they were, where it is known that the certificate holds."""
        return (
            # Addresses come before samples: a storage that was freed since must not be read.
            tensor_states(self._parameters, self._versioned) == self._tensors
            and self._samples.values() == self._values
        )
