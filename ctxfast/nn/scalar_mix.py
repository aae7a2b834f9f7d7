"""A learned mix of the layers of a model (Peters et al., 2018), with AllenNLP's names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ctxfast import ops


class ConfigurationError(ValueError):
    """Options or arguments that cannot belong together; AllenNLP's name for it."""

    @property
    def message(self) -> str:
        return str(self)


class ScalarParameters(nn.Module):
    """Numbers [1] under the names "0", "1", ...: what nn.ParameterList holds, but present on replicas too."""

    def __init__(self, values: Sequence[float], trainable: bool) -> None:
        super().__init__()
        self._count = len(values)
        for index, value in enumerate(values):
            number = torch.tensor([float(value)])
            self.register_parameter(str(index), nn.Parameter(number, requires_grad=trainable))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        return getattr(self, str(range(self._count)[index]))

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(self._count))


class ScalarMix(nn.Module):
    """gamma * sum over layers k of softmax(s)_k * layer_k, with learned s and gamma.

    mixture_size:  how many layers
    do_layer_norm: normalise each layer first, by one mean and one variance over all tokens of the batch
    initial_scalar_parameters: s before the softmax, by default 0
    trainable:     whether s and gamma are learned
    layer_norm_eps: under the root; AllenNLP 0.9 had 1e-12, later versions 1e-13

    Raises ConfigurationError where initial_scalar_parameters are not mixture_size numbers.
    """

    def __init__(
        self,
        mixture_size: int,
        do_layer_norm: bool = False,
        initial_scalar_parameters: Sequence[float] | None = None,
        trainable: bool = True,
        *,
        layer_norm_eps: float = 1e-13,
    ) -> None:
        super().__init__()
        self.mixture_size = mixture_size
        self.do_layer_norm = do_layer_norm
        self.layer_norm_eps = layer_norm_eps
        if initial_scalar_parameters is None:
            initial_scalar_parameters = [0.0] * mixture_size
        elif len(initial_scalar_parameters) != mixture_size:
            raise ConfigurationError(
                f"ScalarMix: initial_scalar_parameters must be {mixture_size} numbers, "
                f"got {len(initial_scalar_parameters)}"
            )
        self.scalar_parameters = ScalarParameters(initial_scalar_parameters, trainable)
        self.gamma = nn.Parameter(torch.tensor([1.0]), requires_grad=trainable)

    def forward(self, tensors: Tensor | Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """tensors: mixture_size layers [..., D] or one tensor [mixture_size, ..., D];  mask: [...], for layer norm.

        Returns [..., D]. Raises ConfigurationError for another number of layers.
        """
        if len(tensors) != self.mixture_size:
            raise ConfigurationError(
                f"ScalarMix: tensors must be {self.mixture_size} layers, got {len(tensors)}"
            )
        if self.do_layer_norm and mask is None:
            raise ValueError("ScalarMix: mask must be given with do_layer_norm, got None")
        weights = torch.cat(list(self.scalar_parameters))
        return ops.scalar_mix(
            tensors,
            weights,
            self.gamma,
            mask.bool() if self.do_layer_norm and mask is not None else None,
            eps=self.layer_norm_eps,
        )

    def layers_needed(self) -> int:
        """How many layers from the bottom matter: all while trainable, else up to the last weight that is not zero."""
        if any(p.requires_grad for p in self.scalar_parameters) or self.do_layer_norm:
            return self.mixture_size
        weights = torch.softmax(torch.cat(list(self.scalar_parameters)).detach().double(), 0)
        return int(weights.to(torch.float32).nonzero().max()) + 1
