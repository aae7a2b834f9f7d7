"""One layer, computed from its submodules' parameters on packed tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ctxfast import ops
from ctxfast.bert.configuration import FUSED_ACTIVATIONS
from ctxfast.bert.selection import Selection
from ctxfast.integrations._families import Family, LayerTable, submodule
from ctxfast.integrations._plan import Plan
from ctxfast.integrations._stock import (
    NotStock,
    is_adapter,
    require_class,
    require_dropout,
    require_parameters,
    require_plain,
)
from ctxfast.integrations._weights import PackedWeights
from ctxfast.nn.encoder_layer import FusedLayer, fuse_layer
from ctxfast.nn.fusion import parameter_of

# transformers' activation modules, by what they compute.
_EPILOGUES = {
    "GELUActivation": "gelu",
    "NewGELUActivation": FUSED_ACTIVATIONS["gelu_new"],
    "FastGELUActivation": FUSED_ACTIVATIONS["gelu_fast"],
    "GELUTanh": FUSED_ACTIVATIONS["gelu_pytorch_tanh"],
    "PytorchGELUTanh": FUSED_ACTIVATIONS["gelu_pytorch_tanh"],
    "Tanh": "tanh",
}
_APPROXIMATIONS = {"none": "gelu", "tanh": "gelu_tanh"}  # of torch's own GELU
# Modules that act on each element alone: called as they are, behind a plain linear layer.
_ELEMENTWISE = frozenset(
    {
        "ReLU",
        "ReLU6",
        "SiLU",
        "SiLUActivation",
        "Sigmoid",
        "MishActivation",
        "QuickGELUActivation",
        "ClippedGELUActivation",
        "AccurateGELUActivation",
        "LinearActivation",
        "ReLUSquaredActivation",
        "LeakyReLU",
    }
)


@dataclass(frozen=True)
class Layer:
    """The parts of one layer, none of which anybody has tampered with."""

    module: nn.Module
    attention: nn.Module
    sampler: nn.Module
    attention_dropout: nn.Module
    projections: tuple[nn.Module, nn.Module, nn.Module]
    attention_output: nn.Module
    attention_output_dropout: nn.Module | None
    attention_norm: nn.Module
    intermediate: nn.Module
    epilogue: str | None
    activation: nn.Module | None
    output: nn.Module
    output_dropout: nn.Module | None
    output_norm: nn.Module
    heads: str

    @classmethod
    def of(cls, family: Family, layer: nn.Module) -> Layer:
        """Inspects a layer; raises NotStock with the reason why it has to be called."""
        table = family.layer
        for path, name in table.classes.items():
            found = submodule(layer, path)
            require_class(path or "the layer", found, family.stock(name))
            require_plain(path or "the layer", found)  # type: ignore[arg-type]
            if getattr(found, "is_cross_attention", False):
                raise NotStock(f"{path} is cross attention")
        for path in table.linears():
            linear = submodule(layer, path)
            if linear is not None and is_adapter(linear):
                for name, inner in linear.named_modules(prefix=path):
                    require_plain(name, inner)
                continue
            require_class(path, linear, nn.Linear)
            require_plain(path, linear)  # type: ignore[arg-type]
            require_parameters(path, linear, ("weight", "bias"))  # type: ignore[arg-type]
        dropouts = table.attention_dropout, table.attention_output_dropout, table.output_dropout
        for path in filter(None, dropouts):
            require_dropout(path, submodule(layer, path))
        for path in (table.attention_norm, table.output_norm):
            require_norm(path, submodule(layer, path))
        epilogue, activation = _activation(table.activation, submodule(layer, table.activation))
        _require_heads(table, layer)

        def part(path: str | None) -> Any:
            return None if path is None else submodule(layer, path)

        return cls(
            layer,
            part(table.attention),
            part(table.sampler),
            part(table.attention_dropout),
            (part(table.query), part(table.key), part(table.value)),
            part(table.attention_output),
            part(table.attention_output_dropout),
            part(table.attention_norm),
            part(table.intermediate),
            epilogue,
            activation,
            part(table.output),
            part(table.output_dropout),
            part(table.output_norm),
            table.heads,
        )

    def __call__(
        self,
        hidden: Tensor,
        plan: Plan,
        weights: PackedWeights,
        selection: Selection | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[T, H] -> [T, H], and the attention weights where the plan asks for them.

        selection: first tokens that alone are computed, on keys and values of all: [R, H]
        """
        own = self.attention.__dict__
        p = self.attention_dropout.__dict__["p"] if self.sampler.training else 0.0
        shape = (-1, own[self.heads], own["attention_head_size"])
        inner_dtype = weights.inner_dtype(self.attention, hidden)
        projected = self._project(hidden, weights, inner_dtype, selection)
        query, key, value = (x.view(shape) for x in projected)
        queries = None if selection is None else selection.batch
        context, probabilities = plan.attend(query, key, value, p, own.get("scaling"), queries)
        if selection is not None:
            hidden, plan = selection.take(hidden), Plan(selection.batch, len(selection.index))
        context = context.reshape(plan.rows, -1)
        attended = _add_and_normalise(
            self.attention_norm,
            self.attention_output_dropout,
            weights.linear(self.attention_output, context, None, hidden.dtype),
            hidden,
            plan,
        )
        inner = weights.linear(self.intermediate, attended, self.epilogue, inner_dtype)
        if self.activation is not None:
            inner = self.activation(inner)
        output = weights.linear(self.output, inner, None, hidden.dtype)
        return (
            _add_and_normalise(self.output_norm, self.output_dropout, output, attended, plan),
            probabilities,
        )

    def _project(
        self,
        hidden: Tensor,
        weights: PackedWeights,
        dtype: torch.dtype,
        selection: Selection | None,
    ) -> tuple[Tensor, ...]:
        """Query, of the selection where there is one, key and value."""
        if selection is not None and torch.is_grad_enabled():
            chosen = weights.linear(self.projections[0], selection.take(hidden), None, dtype)
            return chosen, *weights.stacked(self.attention, self.projections[1:], hidden, dtype)
        query, key, value = weights.stacked(self.attention, self.projections, hidden, dtype)
        return query if selection is None else selection.take(query), key, value

    @property
    def head_count(self) -> int:
        return int(self.attention.__dict__[self.heads])

    def fused(self, hidden: Tensor, weights: PackedWeights) -> FusedLayer | None:
        """The layer as a native call on states like `hidden`, or None where its parts have to be called."""
        if (
            self.activation is not None
            or (self.sampler.training and self.attention_dropout.__dict__["p"])
            or _drops(self.attention_output_dropout)
            or _drops(self.output_dropout)
        ):
            return None
        own = self.attention.__dict__
        scaling = own.get("scaling")
        single = (self.attention_output, self.intermediate, self.output)
        first, second = self.attention_norm, self.output_norm
        return fuse_layer(
            hidden.shape[1],
            weights.copies(self.attention, self.projections, single, hidden),
            [parameter_of(module, "bias") for module in single],
            (
                (parameter_of(first, "weight"), parameter_of(first, "bias"), first.__dict__["eps"]),
                (
                    parameter_of(second, "weight"),
                    parameter_of(second, "bias"),
                    second.__dict__["eps"],
                ),
            ),
            self.epilogue or "none",
            self.head_count,
            own["attention_head_size"] ** -0.5 if scaling is None else scaling,
            hidden.dtype,
        )


def _require_heads(table: LayerTable, layer: nn.Module) -> None:
    """Raises NotStock unless the heads of a layer share the width of its queries, and attend as they should."""
    own, path = submodule(layer, table.attention).__dict__, table.attention  # type: ignore[union-attr]
    if own.get("is_causal", False):
        raise NotStock(f"{path} is causal")
    query: Any = submodule(layer, table.query)
    query = query._modules.get("base_layer", query)  # an adapter's
    width = parameter_of(query, "weight").shape[0]
    heads: Any = own.get(table.heads)
    size: Any = own.get("attention_head_size")
    scaling = own.get("scaling")
    whole = isinstance(heads, int) and isinstance(size, int)
    if not (whole and heads * size == own.get("all_head_size", width) == width):
        raise NotStock(f"{path} has {heads} heads of {size} for a width of {width}")
    if scaling is not None and not isinstance(scaling, int | float):
        raise NotStock(f"{path}.scaling is a {type(scaling).__name__}")


def _drops(dropout: nn.Module | None) -> bool:
    return dropout is not None and dropout.training and dropout.__dict__["p"] > 0.0


def require_norm(name: str, norm: nn.Module | None) -> None:
    """Raises NotStock unless this is a LayerNorm over the last dimension with weight and bias."""
    require_class(name, norm, nn.LayerNorm)
    assert isinstance(norm, nn.LayerNorm)
    require_plain(name, norm)
    require_parameters(name, norm, ("weight", "bias"))
    weight, bias = parameter_of(norm, "weight"), parameter_of(norm, "bias")
    if weight is None or bias is None or weight.dim() != 1:
        raise NotStock(f"{name} is no affine norm over one dimension")
    shape, eps = map(norm.__dict__.get, ("normalized_shape", "eps"))
    if shape != tuple(weight.shape):
        raise NotStock(f"{name}.normalized_shape is {shape}")
    if not isinstance(eps, int | float):
        raise NotStock(f"{name}.eps is {eps!r}")


def _activation(path: str, module: Any) -> tuple[str | None, nn.Module | None]:
    """(name of the epilogue, None) or (None, the module to call)."""
    if not isinstance(module, nn.Module):
        raise NotStock(f"{path} is no module")
    require_plain(path, module)
    cls = type(module)
    known = cls.__module__ == "transformers.activations" or cls.__module__.startswith("torch.nn.")
    act = vars(module).get("act")
    if known and act is not None and not any(_same(act, stock) for stock in _own_functions(cls)):
        raise NotStock(f"{path}.act is not that of its class")
    if known and cls.__name__ in _EPILOGUES:
        return _EPILOGUES[cls.__name__], None
    if known and cls is nn.GELU:
        approximate = vars(module).get("approximate")
        if approximate not in _APPROXIMATIONS:
            raise NotStock(f"{path}.approximate is {approximate!r}")
        return _APPROXIMATIONS[approximate], None
    if known and cls.__name__ in _ELEMENTWISE:
        return None, module
    raise NotStock(f"{path} is a {cls.__module__}.{cls.__qualname__}")


def _own_functions(cls: Any) -> Iterator[Any]:
    """What instances of an activation of transformers can be born with as `act`."""
    for arguments in ((), (True,)) if cls.__name__ in _EPILOGUES else ((),):
        yield cls(*arguments).act


def _same(function: Any, other: Any) -> bool:
    """Whether two functions are one, methods of whichever instance and partial functions included."""
    if isinstance(function, functools.partial) and isinstance(other, functools.partial):
        return (function.func, function.args, function.keywords) == (
            other.func,
            other.args,
            other.keywords,
        )
    return getattr(function, "__func__", function) is getattr(other, "__func__", other)


def _add_and_normalise(
    norm: nn.Module, dropout: nn.Module | None, input: Tensor, residual: Tensor, plan: Plan
) -> Tensor:
    """norm(dropout(input) + residual)"""
    weight, bias = parameter_of(norm, "weight"), parameter_of(norm, "bias")
    eps = norm.__dict__["eps"]
    p = dropout.__dict__["p"] if dropout is not None and dropout.training else 0.0
    if p == 0.0:
        return ops.add_layer_norm(input, residual, weight, bias, eps)
    sequence_ids, positions = plan.coordinates()
    return ops.add_layer_norm(
        input,
        residual,
        weight,
        bias,
        eps,
        dropout_p=p,
        sequence_ids=sequence_ids,
        positions=positions,
    )
