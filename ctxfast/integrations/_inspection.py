"""What of a model runs how, concluded once and believed for as long as nobody changes the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ctxfast.integrations._embeddings import Embeddings
from ctxfast.integrations._families import Family, family_of, submodule
from ctxfast.integrations._layer import Layer
from ctxfast.integrations._stock import (
    NotStock,
    is_adapter,
    require_class,
    require_parameters,
    require_plain,
)
from ctxfast.integrations._swap import State
from ctxfast.nn.certificate import Certificate


@dataclass(frozen=True)
class Inspection:
    """What runs how: a part, or the reason why its module is called.

    spine:    why the whole model is
    settings: what else it was concluded from
    """

    family: Family
    embeddings: Embeddings | str
    projection: nn.Module | None
    layers: tuple[tuple[nn.Module, Layer | str], ...]
    spine: str | None
    settings: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, model: nn.Module) -> Inspection:
        family = family_of(type(model))
        assert family is not None
        settings = _settings(family, model)
        try:
            layers, projection = _spine(family, model)
        except NotStock as reason:
            return cls(family, str(reason), None, (), str(reason), settings)
        found = _verdict(Embeddings.of, family, submodule(model, "embeddings"))
        verdicts = {layer: _verdict(Layer.of, family, layer) for layer in dict.fromkeys(layers)}
        runs = tuple((layer, verdicts[layer]) for layer in layers)
        return cls(family, found, projection, runs, None, settings)

    @property
    def fused(self) -> bool:
        """Whether every layer is."""
        return all(isinstance(found, Layer) for _, found in self.layers)


def _verdict(of: Any, family: Family, module: nn.Module | None) -> Any:
    try:
        return of(family, module)
    except NotStock as reason:
        return str(reason)


def _settings(family: Family, model: nn.Module) -> tuple[dict[str, Any], ...]:
    """The configuration where it is what says how often layers run."""
    encoder = submodule(model, family.encoder_path)
    config = getattr(encoder, "config", None)
    return (vars(config),) if family.name == "albert" and config is not None else ()


def _spine(family: Family, model: nn.Module) -> tuple[list[nn.Module], nn.Module | None]:
    """The layers in the order in which they run, and the projection in front of them."""
    encoder = submodule(model, family.encoder_path)
    require_class(family.encoder_path, encoder, family.stock(family.encoder))
    stack = submodule(model, family.layers_path)
    require_class(family.layers_path, stack, nn.ModuleList)
    for name, module in ((family.encoder_path, encoder), (family.layers_path, stack)):
        require_plain(name, module)  # type: ignore[arg-type]
    projection = submodule(model, family.projection) if family.projection else None
    if projection is not None and not is_adapter(projection):
        require_class(str(family.projection), projection, nn.Linear)
        require_plain(str(family.projection), projection)
        require_parameters(str(family.projection), projection, ("weight", "bias"))
    if family.relative_bias:
        table = submodule(model, "encoder.relative_attention_bias")
        require_class("relative_attention_bias", table, nn.Embedding)
        require_plain("relative_attention_bias", table)  # type: ignore[arg-type]
    assert stack is not None and encoder is not None
    children = list(stack._modules.values())
    if family.name != "albert":
        return children, projection  # type: ignore[return-value]
    config: Any = encoder.config
    layers: list[nn.Module] = []
    for index in range(config.num_hidden_layers):
        group = children[int(index / (config.num_hidden_layers / config.num_hidden_groups))]
        require_class("a layer group", group, family.stock("AlbertLayerGroup"))
        require_plain("a layer group", group)  # type: ignore[arg-type]
        layers += group.albert_layers  # type: ignore[union-attr,arg-type]
    return layers, projection


def inspection_of(model: nn.Module, state: State) -> Inspection:
    """The inspection that still holds, or a new one."""
    certificate, found = state.certificate, state.inspection
    if certificate is None or found is None or not certificate.holds():
        found = Inspection.of(model)
        certificate = Certificate(model.modules(), *found.settings)
        state.weights.keep(model.modules())
        state.inspection, state.certificate, state.stack = found, certificate, None
    return found
