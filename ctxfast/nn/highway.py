"""Highway layers (Srivastava et al., 2015), with AllenNLP's names."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxfast import ops
from ctxfast.nn.packed_linear import PackedLinear, is_fusable


class Highway(nn.Module):
    """num_layers times x = g * x + (1 - g) * activation(t), with t, c = split(linear(x)) and g = sigmoid(c).

    The bias of c starts at 1, which carries the input at first.
    """

    def __init__(
        self,
        input_dim: int,
        num_layers: int = 1,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        super().__init__()
        self._input_dim = input_dim
        self._layers = nn.ModuleList(
            PackedLinear(input_dim, 2 * input_dim) for _ in range(num_layers)
        )
        self._activation = activation
        for layer in self._linears():
            if not layer.bias.is_meta:
                nn.init.ones_(layer.bias.data[input_dim:])

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., input_dim] -> [..., input_dim]."""
        x = inputs
        for layer in self._linears():
            if self._is_relu() and is_fusable(layer) and layer.precision is None:
                copy = layer.packed_weight([layer], x)
                packed = None if copy is None else copy.weight
                x = ops.highway(x, layer.weight, layer.bias, packed=packed)
            else:
                transform, carry = layer(x).chunk(2, -1)
                gate = torch.sigmoid(carry)
                x = gate * x + (1 - gate) * self._activation(transform)
        return x

    def _linears(self) -> list[PackedLinear]:
        return list(self._layers)  # type: ignore[arg-type]

    def _is_relu(self) -> bool:
        activation = self._activation
        return activation in (F.relu, torch.relu) or type(activation) is nn.ReLU
