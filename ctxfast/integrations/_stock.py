"""Whether a module may be computed without being called: it does what its stock class does and no more.

What a thorough inspection finds is kept with a `Certificate` of everything it looked at, which is compared at every
call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ctxfast.nn.certificate import HOOKS

_TORCH_CLASSES = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Dropout, nn.ModuleList)
# Adapters that act on each token alone: they are called, on packed tokens, inside a fused layer.
_ADAPTERS = (("peft.tuners.lora.layer", "Linear"),)
# transformers' own observers; they stand still outside the forward that they belong to.
_OBSERVERS = ("transformers.utils.output_capturing", "transformers.utils.generic")


class NotStock(Exception):
    """Why a module has to be called."""


def is_adapter(module: nn.Module) -> bool:
    """Whether `module` is an adapter around a linear layer that treats each token alone."""
    cls = type(module)
    return (cls.__module__, cls.__qualname__) in _ADAPTERS


def global_hooks() -> bool:
    """Whether hooks are set on every module there is."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def own_forward(module: nn.Module) -> Any:
    """The forward that an instance has in place of its class's, or None."""
    return _own_method(module, "forward")


def _own_method(module: nn.Module, name: str) -> Any:
    """The method that an instance has in place of its class's, or None.

    Whoever wraps a method and undoes it, as offload hooks do, leaves the class's own behind: no change.
    """
    found: Any = module.__dict__.get(name)
    its_own = getattr(found, "__self__", None) is module
    function = getattr(found, "__func__", None)
    return None if its_own and function is getattr(type(module), name) else found


def _observes(hook: Any) -> bool:
    return getattr(hook, "__module__", None) in _OBSERVERS


def require_plain(name: str, module: nn.Module) -> None:
    """Raises NotStock unless a call of `module` runs the forward of its class and nothing else."""
    for kind in HOOKS:
        for hook in getattr(module, kind).values():
            if not (kind == "_forward_hooks" and _observes(hook)):
                raise NotStock(
                    f"{name} has a {kind.strip('_').removesuffix('s').replace('_', ' ')}"
                )
    if own_forward(module) is not None:
        offload = " (an offload hook)" if hasattr(module, "_hf_hook") else ""
        raise NotStock(f"{name} has a forward of its own instance{offload}")
    for method in module.__dict__:
        called = callable(getattr(type(module), method, None)) and not hasattr(nn.Module, method)
        if called and _own_method(module, method) is not None:
            raise NotStock(f"{name} has a {method} of its own instance")


def require_class(name: str, module: nn.Module | None, *classes: type[nn.Module] | None) -> None:
    """Raises NotStock unless `module` is exactly of one of the classes."""
    if module is None:
        raise NotStock(f"{name} is missing")
    if type(module) not in classes:
        cls = type(module)
        raise NotStock(f"{name} is a {cls.__module__}.{cls.__qualname__}")


def require_dropout(name: str, module: nn.Module | None) -> None:
    """Raises NotStock unless `module` is torch's dropout with a probability."""
    require_class(name, module, nn.Dropout)
    require_plain(name, module)  # type: ignore[arg-type]
    p = module.__dict__.get("p")  # type: ignore[union-attr]
    if not (isinstance(p, int | float) and 0.0 <= p <= 1.0):
        raise NotStock(f"{name}.p is {p!r}")


def require_parameters(name: str, module: nn.Module, names: Iterable[str]) -> None:
    """Raises NotStock unless the named parameters are plain tensors with values, or None."""
    replica = getattr(module, "_is_replica", False)
    for parameter_name in names:
        parameter = module._parameters.get(parameter_name)
        if replica:
            parameter = getattr(module, parameter_name, None)
        elif parameter_name not in module._parameters:
            raise NotStock(f"{name}.{parameter_name} is computed")
        if parameter is None:
            continue
        if type(parameter) not in ((nn.Parameter, Tensor) if replica else (nn.Parameter,)):
            raise NotStock(f"{name}.{parameter_name} is a {type(parameter).__name__}")
        if parameter.is_meta:
            raise NotStock(f"{name}.{parameter_name} is on the meta device")
        if not parameter.is_floating_point():
            raise NotStock(f"{name}.{parameter_name} is {parameter.dtype}")


def untraceable() -> str | None:
    """Why Python may not look at the values of tensors now, or None."""
    if torch.jit.is_tracing() or torch.jit.is_scripting():
        return "torch.jit is tracing"
    if torch.compiler.is_exporting():
        return "torch.export is tracing"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    return None
