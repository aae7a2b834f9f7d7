"""A weight as the products of one compute type read it, and what must stay as it is for the copy to be believed."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctxfast import ops
from ctxfast.ops import _native_linear, _onednn

# The layout that oneDNN chooses for this many rows was within 5 % of the best one for every count from 16 to 2,048.
_EXPECTED_ROWS = 256
_SAMPLES = 4


class Fingerprint:
    """What must stay as it is for a copy of a parameter to be believed."""

    __slots__ = ("address", "dtype", "parameter", "sample", "shape", "values", "version")

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = weakref.ref(parameter)
        self.address = parameter.data_ptr()
        self.shape = parameter.shape
        self.dtype = parameter.dtype
        self.version = None if parameter.is_inference() else parameter._version
        flat = parameter.detach().view(-1)
        if flat.dtype == torch.bfloat16:  # NumPy has no such type
            flat = flat.view(torch.int16)
        step = max(1, (flat.numel() - 1) // (_SAMPLES - 1))
        # A view: it reads what is there now. DLPack, unlike Tensor.numpy, leaves the storage resizable, as FSDP needs.
        self.sample = np.from_dlpack(flat)[::step]
        self.values = self.sample.tobytes()

    def matches(self, parameter: Tensor) -> bool:
        # The address comes before the sample: a storage that was freed since must not be read.
        return (
            self.parameter() is parameter
            and self.address == parameter.data_ptr()
            and (self.version is None or self.version == parameter._version)
            and self.values == self.sample.tobytes()
            and self.dtype == parameter.dtype
            and self.shape == parameter.shape
            and parameter.is_contiguous()
        )


Weights = Sequence[Tensor]
Biases = Sequence[Tensor | None]


def _sources(weights: Weights, biases: Biases, held: torch.dtype) -> list[Tensor]:
    """The parameters that a copy is made from: weights, and biases where they are stacked too or have to be cast."""
    if len(weights) == 1 and (biases[0] is None or biases[0].dtype == held):
        return [*weights]
    return [*weights, *(bias for bias in biases if bias is not None)]


class PackedCopy:
    """A packed weight, and the fingerprints of what it was made from.

    bias: [N], of stacked layers, or of one whose own has another dtype than `held`; otherwise None
    held: the dtype of what is not packed

    compute: the dtype of the products, which decides the form of weight: the panels of csrc for float32 and bfloat16
        (the layout of oneDNN for what csrc does not take), an `ops.QuantizedWeight` for int8
    plain: what `ops.linear` takes as weight [N, K] where nobody holds the plain one. It has the shape; whoever read
        its values instead of the packed ones would get NaN.
    """

    __slots__ = ("bias", "compute", "fingerprints", "held", "plain", "weight")

    def __init__(self, weights: Weights, biases: Biases, compute: torch.dtype) -> None:
        self.compute = compute
        self.held = held = torch.float32 if compute == torch.int8 else compute
        sources = _sources(weights, biases, held)
        count = len(weights)
        self.weight: Any
        # Outside inference mode, so that the copy also serves calls under no_grad.
        with torch.inference_mode(False), torch.no_grad():
            weight = sources[0] if count == 1 else torch.cat(sources[:count])
            self.bias = torch.cat(sources[count:]).to(held) if len(sources) > count else None
            self.weight = pack(weight, compute)
            self.plain = torch.full((1, 1), torch.nan, dtype=held).expand(weight.shape)
            self.fingerprints = [Fingerprint(source) for source in sources]

    def matches(self, weights: Weights, biases: Biases) -> bool:
        """Whether it is still a copy of these."""
        sources = _sources(weights, biases, self.held)
        return len(sources) == len(self.fingerprints) and all(
            map(Fingerprint.matches, self.fingerprints, sources)
        )

    @property
    def in_panels(self) -> bool:
        """Whether it has the floating layout of csrc."""
        return self.compute != torch.int8 and self.weight.layout is torch.strided

    @property
    def nbytes(self) -> int:
        tensors = (self.weight, self.bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def linear(
        self,
        input: Tensor,
        bias: Tensor | None,
        activation: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """activation(input @ weight^T + bias), returned in `dtype`, by default that of input.

        bias: of the layer, for which the bias of the copy stands where there is one
        """
        dtype, compute, weight = dtype or input.dtype, self.compute, self.weight
        bias = bias if self.bias is None else self.bias
        if compute == torch.int8:
            return ops.linear_int8(input, weight, bias, activation=activation, dtype=dtype)
        input = input.to(compute)
        return ops.linear(input, self.plain, bias, activation=activation, packed=weight).to(dtype)


def pack(weight: Tensor, compute: torch.dtype) -> Any:
    """A copy of a weight [N, K] in the form in which products of that dtype are fast."""
    if compute == torch.int8:
        return ops.quantize_weight(weight)
    if _native_linear.pack_refuses(compute, weight.shape[1]) is None:
        return _native_linear.pack(weight.to(compute))
    return _onednn.pack(weight.to(compute), _EXPECTED_ROWS)
