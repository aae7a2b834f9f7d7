"""Registration of the operators in torch's dispatcher, namespace `ctxfast::`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree

from ctxfast.ops._dispatch import Operator

_library = torch.library.Library("ctxfast", "DEF")


def define(
    schema: str,
    operator: Operator,
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    also: tuple[str, ...] = (),
) -> Callable[..., Any]:
    """Register one operator and return the function that calls it.

    The operator itself is the implementation on CPU and CUDA, and on the dispatch keys in `also`. vmap runs it sample
    by sample: correct for every argument, at the price of one call a sample.
    """
    name = operator.name
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA", *also):
        _library.impl(name, operator, key)
    qualified = f"ctxfast::{name}"
    torch.library.register_fake(qualified, fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            qualified, backward, setup_context=setup_context, lib=_library
        )
    overload = getattr(torch.ops.ctxfast, name).default
    rule = _sample_by_sample(overload)
    torch.library.register_vmap(qualified, rule, lib=_library)
    if backward is None or setup_context is None:
        return overload
    return _with_transforms(operator, overload, setup_context, backward, rule)


def _with_transforms(
    operator: Operator,
    overload: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    rule: Callable[..., Any],
) -> Callable[..., Any]:
    """The overload; under `torch.func` transforms, which registered gradients do not serve, an autograd function; and
    the operator itself where that is all that would run."""
    members = {
        "forward": staticmethod(lambda *args: overload(*args)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "vmap": staticmethod(rule),
    }
    function: Any = type("Transformed", (torch.autograd.Function,), members)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return overload(*args)
        if torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        return operator(*args) if _needs_no_dispatcher(args) else overload(*args)

    return call


_PLAIN = (Tensor, torch.nn.Parameter)


def _needs_no_dispatcher(args: tuple[Any, ...]) -> bool:
    """Whether the dispatcher would do nothing but call the operator, at the price of a third of a small call."""
    if (
        torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        or forward_ad._current_level >= 0
    ):
        return False
    return all(
        type(x) in _PLAIN and (x.is_cpu or x.is_cuda)
        if isinstance(x, Tensor)
        else type(x) not in (list, tuple)
        for x in args
    )


def _sample_by_sample(overload: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        def sample(index: int) -> list[Any]:
            return [
                arg.select(dim, index) if isinstance(arg, Tensor) and dim is not None else arg
                for arg, dim in zip(args, in_dims, strict=True)
            ]

        results = [overload(*sample(index)) for index in range(info.batch_size)]
        leaves = [_pytree.tree_leaves(result) for result in results]
        stacked = [torch.stack(group) for group in zip(*leaves, strict=True)]
        spec = _pytree.tree_structure(results[0])
        return _pytree.tree_unflatten(stacked, spec), _pytree.tree_unflatten(
            [0] * len(stacked), spec
        )

    return rule


def gradients_through_reference(
    function: Callable[..., Any],
    inputs: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """Vector-Jacobian product of `function(*inputs)`: one result for each floating input, None for the others.

    For double backward, below `torch.func` transforms as well. It records a graph, so it works above the dispatcher's
    autograd layer only.
    """
    floating = {i: x for i, x in enumerate(inputs) if x is not None and x.is_floating_point()}
    results: list[Tensor | None] = [None] * len(inputs)
    if all(g is None for g in grads):
        for place, x in floating.items():
            results[place] = torch.zeros_like(x)
        return tuple(results)

    def compact(*tensors: Tensor) -> tuple[Tensor, ...]:
        arguments = list(inputs)
        for place, x in zip(floating, tensors, strict=True):
            arguments[place] = x
        outputs = function(*arguments)
        return tuple(
            o for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None
        )

    pullback = torch.func.vjp(compact, *floating.values())[1]
    found = pullback(tuple(g for g in grads if g is not None))
    for place, grad in zip(floating, found, strict=True):
        results[place] = grad
    return tuple(results)
