"""How an existing module gets another forward: its class becomes a subclass of the same name.

The object, its modules, parameters, state_dict, configuration and signature stay what they are. What an instance
attribute would break works: replicas of DataParallel, deepcopy, hooks that wrap `forward`. A pickle names the stock
class, and ours as a wish: it loads as a plain model where this package is missing.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import pydoc
import weakref
from dataclasses import dataclass, fields
from types import MethodType
from typing import Any

import torch
from torch import nn

from ctxfast.integrations._families import family_of
from ctxfast.integrations._weights import PackedWeights
from ctxfast.nn.certificate import Certificate
from ctxfast.nn.encoder_layer import EncoderStack

STATE = "_ctxfast"


@dataclass(frozen=True)
class Options:
    """The arguments of `ctxfast.accelerate`."""

    dtype: torch.dtype | None = None
    quantization: str | None = None
    unpad: bool = True
    cuda_graphs: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class State:
    """What an accelerated module holds beside its own state: options, and what is known of it now."""

    def __init__(self, owner: nn.Module, options: Options) -> None:
        self.owner = weakref.ref(owner)
        self.options = options
        self.weights = PackedWeights(options.quantization)
        self.certificate: Certificate | None = None
        self.inspection: Any = None
        self.stack: EncoderStack | None = None  # of what the inspection found
        self.graphs: Any = None
        self.last_padding: float | None = None
        self.last_reason: str | None = None

    def drop(self) -> None:
        """Forgets packed weights and everything concluded from earlier calls."""
        self.drop_weights()
        self.certificate = self.inspection = None

    def drop_weights(self) -> None:
        """Forgets packed weights, and what holds their addresses."""
        self.weights.drop()
        self.stack = self.graphs = None


def state_of(module: nn.Module) -> State:
    """The state of an accelerated module: a fresh one for copies, replicas and unpickled modules."""
    held = module.__dict__[STATE]
    if isinstance(held, State):
        if held.owner() is module:
            return held
        held = held.options.as_dict()
    state = State(module, Options(**held))
    if not module.__dict__.get("_is_replica"):  # a replica of DataParallel lives for one call
        module.__dict__[STATE] = state
    return state


class _Accelerated:
    """What every accelerated class has before its stock class."""

    _ctxfast_stock: type[nn.Module]
    _ctxfast_encodes: bool

    @property
    def packed_bytes(self: Any) -> int:
        """Bytes that packed weights hold now."""
        return state_of(self).weights.nbytes

    @property
    def last_padding(self: Any) -> float | None:
        """The share of padding in the last call, None before the first."""
        return state_of(self).last_padding

    def ctxfast_notes(self: Any, name: str) -> list[str]:
        """What `ctxfast.explain` says of this module, which has this name in its model."""
        if not self._ctxfast_encodes:
            return []
        from ctxfast.integrations._notes import encoder_notes

        return encoder_notes(self, name)

    def train(self: Any, mode: bool = True) -> Any:
        if mode:
            state_of(self).drop_weights()
        return super().train(mode)  # type: ignore[misc]

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        state_of(self).drop()
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self: Any, *args: Any, **kwargs: Any) -> None:
        state_of(self).drop()
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        state = {**self.__dict__, STATE: state_of(self).options.as_dict()}
        cls = _PreferredClass(self._ctxfast_stock)
        return copyreg._reconstructor, (cls, object, None), state  # type: ignore[attr-defined]


class _PreferredClass:
    """Unpickles as the accelerated class where this package is installed, as the stock class elsewhere."""

    def __init__(self, stock: type[nn.Module]) -> None:
        self.stock = stock

    def __reduce__(self) -> Any:
        name = f"{self.stock.__module__}:{self.stock.__qualname__}"
        return getattr, (_Located("ctxfast.integrations.pickled"), name, self.stock)


class _Located:
    """Unpickles as the module of this name, or as None where there is none."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> Any:
        return pydoc.locate, (self.name,)


@functools.cache
def accelerated_class(stock: type[nn.Module], forward: Any) -> type[nn.Module]:
    """The subclass of `stock` that runs `forward(self, *args, **kwargs)`, of the same name and signature."""

    @functools.wraps(stock.forward)
    def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    namespace = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "forward": replaced,
        "_ctxfast_stock": stock,
        "_ctxfast_encodes": family_of(stock) is not None,
        "_ctxfast_parameters": _names(stock.forward),
    }
    return type(stock.__name__, (_Accelerated, stock), namespace)


def _names(forward: Any) -> tuple[str, ...]:
    """The arguments that may be given by position, `self` left out."""
    parameters = inspect.signature(forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)[1:]


def is_accelerated(module: nn.Module) -> bool:
    return isinstance(module, _Accelerated)


def swap(module: nn.Module, forward: Any, options: Options) -> None:
    """Gives `module` the accelerated class that runs `forward`, or new options where it has it."""
    if not is_accelerated(module):
        stock = type(module)
        module.__class__ = accelerated_class(stock, forward)  # type: ignore[assignment, arg-type]
        _rebind(module, stock.forward)
    else:
        state_of(module).drop()
    module.__dict__[STATE] = State(module, options)


def swap_back(module: nn.Module) -> None:
    """Gives `module` its stock class back."""
    state_of(module).drop()  # it refers to itself
    del module.__dict__[STATE]
    ours = type(module).forward
    module.__class__ = _without(type(module))
    _rebind(module, ours)


def _rebind(module: nn.Module, forward: Any) -> None:
    """Points methods that an offload hook keeps on the instance from `forward` to the class's present one."""
    for name in ("forward", "_old_forward"):
        held: Any = module.__dict__.get(name)
        if getattr(held, "__self__", None) is module and held.__func__ is forward:
            module.__dict__[name] = MethodType(type(module).forward, module)


def _without(cls: type) -> type:
    """`cls` without the accelerated class in it; others, such as FSDP's, may have put theirs on top."""
    if cls.__dict__.get("_ctxfast_stock") is not None:
        return cls._ctxfast_stock  # type: ignore[attr-defined, no-any-return]
    bases = tuple(
        _without(base) if issubclass(base, _Accelerated) else base for base in cls.__bases__
    )
    namespace = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, namespace)


def call_arguments(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """The arguments of a call by name, or None where they are too many or given twice."""
    names = module._ctxfast_parameters
    if len(args) > len(names):
        return None
    call = dict(zip(names, args, strict=False))
    if kwargs.keys() & call.keys():
        return None
    call.update(kwargs)
    return call


def stock_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward that the module had before."""
    return module._ctxfast_stock.forward(module, *args, **kwargs)
