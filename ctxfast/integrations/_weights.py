"""Packed weights of linear layers that belong to somebody else's modules: held beside them, outside their state.

As `ctxfast.nn.PackedLinear`: only calls without gradients in evaluation mode use a copy, a fingerprint says whether it
still stands for its parameters, and whatever may change them unseen drops it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ctxfast import ops
from ctxfast.nn import packed_linear
from ctxfast.nn.fusion import parameter_of
from ctxfast.nn.packed_copy import PackedCopy
from ctxfast.nn.packed_linear import PackedModule


class PackedWeights:
    """The copies of one encoder, by the module that they stand for.

    precision: None, or "int8", what the products compute in wherever a copy serves
    """

    def __init__(self, precision: str | None = None) -> None:
        self.precision = precision
        self._holders: dict[nn.Module, PackedModule] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that the copies hold now."""
        return sum(holder.packed_bytes for holder in list(self._holders.values()))

    def drop(self) -> None:
        """Forgets every copy."""
        for holder in list(self._holders.values()):
            holder.drop_packed()

    def keep(self, modules: Iterable[nn.Module]) -> None:
        """Forgets the copies of modules that are not among these."""
        present = set(modules)
        for module in [module for module in list(self._holders) if module not in present]:
            self._holders.pop(module, None)

    def _holder(self, module: nn.Module) -> PackedModule:
        holder = self._holders.get(module)
        if holder is None:
            holder = PackedModule().eval()
            holder.cast, holder.precision = True, self.precision
            self._holders[module] = holder
        return holder

    def copies(
        self,
        owner: nn.Module,
        stacked: Sequence[nn.Module],
        single: Sequence[nn.Module],
        input: Tensor,
    ) -> list[PackedCopy | None]:
        """The valid copies of layers stacked by `owner`, and of others; None for one that runs on something else.

        input: stands for the input of all of them, as to dtype and device
        """
        groups = ((owner, stacked), *((module, (module,)) for module in single))
        return [self._copy(holder, modules, input) for holder, modules in groups]

    def _copy(
        self, owner: nn.Module, modules: Sequence[nn.Module], input: Tensor
    ) -> PackedCopy | None:
        if owner.training or any(type(module) is not nn.Linear for module in modules):
            return None
        weights = [parameter_of(module, "weight") for module in modules]
        biases = [parameter_of(module, "bias") for module in modules]
        return self._holder(owner).packed_parameters(weights, biases, input)

    def inner_dtype(self, owner: nn.Module, input: Tensor) -> torch.dtype:
        """The type of what is only multiplied again in a layer: bfloat16 beside 8-bit products, else that of input."""
        if self.precision is None or owner.training:
            return input.dtype
        return packed_linear.inner_dtype(self._holder(owner), input) or input.dtype

    def linear(
        self,
        module: nn.Module,
        input: Tensor,
        activation: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """activation(module(input)): fused for torch's own Linear; an adapter around one is called.

        dtype: of the result, by default that of input
        """
        dtype = dtype or input.dtype
        if type(module) is not nn.Linear:
            return packed_linear.linear(module, input, activation, dtype).to(dtype)
        weight, bias = parameter_of(module, "weight"), parameter_of(module, "bias")
        copy = None
        if not module.training or torch.is_grad_enabled():
            copy = self._holder(module).packed_parameters((weight,), (bias,), input)
        if copy is not None:
            return copy.linear(input, bias, activation, dtype)
        if not torch.is_autocast_enabled(input.device.type):
            weight = weight.to(input.dtype)
            bias = None if bias is None else bias.to(input.dtype)
        output = ops.linear(input, weight, bias, activation=activation)
        return output if self.precision is None else output.to(dtype)

    def stacked(
        self, owner: nn.Module, modules: Sequence[nn.Module], input: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """module(input) for layers of one input and one output size, in one product where a copy serves; in dtype."""
        if all(type(module) is nn.Linear for module in modules) and (
            not owner.training or torch.is_grad_enabled()
        ):
            weights = [parameter_of(module, "weight") for module in modules]
            biases = [parameter_of(module, "bias") for module in modules]
            copy = self._holder(owner).packed_parameters(weights, biases, input)
            if copy is not None:
                output = copy.linear(input, None, None, dtype)
                return output.view(*output.shape[:-1], len(modules), -1).unbind(-2)
        return tuple(self.linear(module, input, None, dtype) for module in modules)
