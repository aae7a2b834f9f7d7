"""Which submodules may be computed without being called, their fused forms, and how torch's modules become ours.

Fusing reads the parameters of a submodule and computes its result in another way. That is right only where a call would
do nothing else: no subclass with a forward of its own, no hook, no patched forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ctxfast import ops
from ctxfast.nn.packed_linear import PackedLinear, PackedModule

M = TypeVar("M", bound=nn.Module)

# What acts on each element alone gives the same on packed tokens.
_ELEMENTWISE: tuple[Callable[..., Tensor], ...] = (
    F.relu,
    F.gelu,
    F.silu,
    F.mish,
    F.elu,
    F.selu,
    F.leaky_relu,
    F.relu6,
    F.hardswish,
    F.softplus,
    F.tanh,
    F.sigmoid,
    torch.relu,
    torch.tanh,
    torch.sigmoid,
)
_ELEMENTWISE_MODULES = (
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.ELU,
    nn.SELU,
    nn.LeakyReLU,
    nn.ReLU6,
    nn.Hardswish,
    nn.Softplus,
    nn.Tanh,
    nn.Sigmoid,
)


def is_stock(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether calling `module` does what the forward of one of `classes` does and nothing else.

    A parametrised module is stock: its forward is the one of its class, and its parameters read as usual.
    """
    return (
        any(type(module).forward is cls.forward for cls in classes)
        and "forward" not in module.__dict__
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        )
    )


def submodules(module: nn.Module) -> dict[str, Any]:
    """The submodules by name; as attributes of a module they cost ten times as much, twenty times a layer."""
    return module._modules


def parameter_of(module: nn.Module, name: str) -> Any:
    """module.weight or module.bias, at a tenth of the time where it is a plain parameter."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def is_ordinary(tensor: Tensor | None) -> bool:
    """Whether a parameter is a plain tensor (or absent): not quantised, distributed or otherwise a subclass."""
    return tensor is None or type(tensor) in (Tensor, nn.Parameter)


def values_readable(tensor: Tensor) -> bool:
    """Whether Python may look at the values of a tensor: not while a graph is traced or a transform is active."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) is Tensor
        and not torch._C._are_functorch_transforms_active()
    )


def recast(module: nn.Module, cls: type[M]) -> M:
    """A module of class `cls` with the state of `module`: its parameters and submodules themselves, and its hooks."""
    new = cls.__new__(cls)
    containers = (dict, set)
    state = {
        name: copy.copy(value) if isinstance(value, containers) else value
        for name, value in module.__dict__.items()
    }
    new.__dict__.update(state)
    if isinstance(new, PackedModule):
        new.__dict__.update(pack=True, _copy=None)
    return new


def as_packed_linear(module: nn.Module) -> nn.Module:
    """torch's own Linear as a PackedLinear of the same parameters; anything else as it is."""
    if type(module) not in (nn.Linear, NonDynamicallyQuantizableLinear):
        return module
    if type(module.weight) is not nn.Parameter:
        return module
    return recast(module, PackedLinear)


def is_elementwise(activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether an activation is known to act on each element alone."""
    if isinstance(activation, nn.Module):
        return is_stock(activation, *_ELEMENTWISE_MODULES)
    return any(activation is function for function in _ELEMENTWISE)


def is_tokenwise(norm: nn.Module) -> bool:
    """Whether a norm is known to act on the last dimension alone."""
    return is_stock(norm, nn.LayerNorm) and len(norm.normalized_shape) == 1  # type: ignore[arg-type]


def epilogue(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The name under which `ops.linear` fuses an activation, or None."""
    if activation is F.gelu:
        return "gelu"
    if activation is torch.tanh or activation is F.tanh:
        return "tanh"
    if isinstance(activation, nn.GELU) and is_stock(activation, nn.GELU):
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    return None


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """weight, bias (zero where there is none) and eps of a norm that `ops.add_layer_norm` computes, or None."""
    if not is_tokenwise(norm):
        return None
    stock = cast("nn.LayerNorm", norm)
    weight, bias = stock.weight, stock.bias
    if weight is None or not is_ordinary(weight) or not is_ordinary(bias):
        return None
    return weight, torch.zeros_like(weight) if bias is None else bias, stock.eps


def normalise(norm: nn.Module, input: Tensor) -> Tensor:
    """norm(input)"""
    affine = _affine(norm)
    return norm(input) if affine is None else ops.add_layer_norm(input, None, *affine)


def add_and_normalise(
    norm: nn.Module,
    dropout: nn.Module,
    input: Tensor,
    residual: Tensor,
    coordinates: Callable[[Tensor], tuple[Tensor | None, Tensor | None]],
) -> Tensor:
    """norm(residual + dropout(input)), in one pass where both are plain.

    coordinates: gives sequence_ids and positions of the rows of input, as `ops.add_layer_norm` takes them
    """
    affine = _affine(norm)
    if affine is None or not is_stock(dropout, nn.Dropout):
        return norm(residual + dropout(input))
    p = cast("nn.Dropout", dropout).p if dropout.training else 0.0
    sequence_ids, positions = coordinates(input) if p > 0.0 else (None, None)
    return ops.add_layer_norm(
        input, residual, *affine, dropout_p=p, sequence_ids=sequence_ids, positions=positions
    )
