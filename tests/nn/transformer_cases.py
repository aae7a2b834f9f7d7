"""Encoder layers and encoders of torch.nn and ours, their inputs and masks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ctxfast.nn import TransformerEncoder, TransformerEncoderLayer
from ctxfast.ops import _dispatch
from tests.nn.comparison import DOUBLE, twin

# Features, heads, hidden features, batch, sequence.
E, H, FF, B, S = 16, 2, 24, 3, 6
PADDING = torch.tensor(
    [[False] * 4 + [True] * 2, [True, False, False, True, False, False], [False] * S]
)
CAUSAL = torch.ones(S, S, dtype=torch.bool).triu(1)
EACH = torch.rand(B * H, S, S, generator=torch.Generator().manual_seed(3)) < 0.3
EACH[..., 2] = False


def additive(mask: Tensor, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -torch.inf)


def layers(dropout: float = 0.0, **arguments) -> tuple[nn.Module, nn.Module]:
    arguments = {"batch_first": True, "dtype": DOUBLE, **arguments}
    return twin(
        TransformerEncoderLayer(E, H, FF, dropout, **arguments),
        nn.TransformerEncoderLayer(E, H, FF, dropout, **arguments),
    )


def encoders(norm: bool = True, dropout: float = 0.0, **arguments) -> tuple[nn.Module, nn.Module]:
    ours, theirs = layers(dropout, **arguments)
    ours = TransformerEncoder(ours, 2, nn.LayerNorm(E, dtype=DOUBLE) if norm else None)
    theirs = nn.TransformerEncoder(theirs, 2, nn.LayerNorm(E, dtype=DOUBLE) if norm else None)
    return twin(ours, theirs)


def source(batch_first: bool = True) -> Tensor:
    shape = (B, S, E) if batch_first else (S, B, E)
    return torch.randn(shape, dtype=DOUBLE)


def caller(padding: Tensor | None = None, **arguments) -> Callable[..., tuple[Tensor, ...]]:
    """A call with these arguments whose result is zero where `padding`, in the layout of the input, is True."""

    def call(module: nn.Module, src: Tensor) -> tuple[Tensor, ...]:
        cast = {
            k: v.to(src.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in arguments.items()
        }
        output = module(src, **cast)
        return (output if padding is None else output.masked_fill(padding[..., None], 0.0),)

    return call


def ran(module: nn.Module, *args, **kwargs) -> set[str]:
    """The operators that a call runs."""
    with _dispatch.record() as verdicts, torch.no_grad():
        module(*args, **kwargs)
    return {v.operator for v in verdicts}


class Twice(nn.Module):
    """A parametrisation."""

    def forward(self, parameter: Tensor) -> Tensor:
        return 2 * parameter
