"""One attention call through the Triton launchers, and the same call through the reference, also in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ctxfast import reference
from ctxfast.ops import _triton
from tests.oracle import assert_matches

SEED = torch.tensor([0x1234_5678_9ABC_DEF0])
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Case:
    """Tensors of one call. lengths_k None: padded [B, H, S, D]; otherwise packed, B sequences of these lengths."""

    heads: int
    head_dim: int
    lengths_q: list[int]
    lengths_k: list[int]
    dtype: torch.dtype = torch.float32
    packed: bool = False
    tail: int = 0
    fused_layout: bool = True
    needs_lse_grad: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    tile_map: Tensor | None = None

    def __post_init__(self) -> None:
        self.arguments = dict(
            bias=None,
            is_causal=False,
            window_size=(-1, -1),
            dropout_p=0.0,
            scale=self.head_dim**-0.5,
            seed=SEED,
        )
        if self.packed:
            self.arguments["cu_seqlens_q"] = offsets(self.lengths_q)
            self.arguments["cu_seqlens_k"] = (
                self.arguments["cu_seqlens_q"]
                if self.lengths_k == self.lengths_q
                else offsets(self.lengths_k)
            )
        else:
            self.arguments.update(attn_mask=None, key_padding_mask=None)
        self.arguments.update(self.options)
        rows_q, rows_k = self._rows(self.lengths_q), self._rows(self.lengths_k)
        self.query = self._tensor(rows_q)
        self.grad_output = self._tensor(rows_q)
        if self.fused_layout:  # slices of one projection [..., 2, H, D]
            both = torch.randn(*rows_k, 2, self.heads, self.head_dim).to(self.dtype)
            self.key, self.value = (self._heads_first(x) for x in both.unbind(-3))
        else:
            self.key, self.value = self._tensor(rows_k), self._tensor(rows_k)
        if self.packed:  # what lies past the last offset must not matter
            for x, lengths in (
                (self.query, self.lengths_q),
                (self.grad_output, self.lengths_q),
                (self.key, self.lengths_k),
                (self.value, self.lengths_k),
            ):
                x[sum(lengths) :] = torch.nan
        elif self.arguments["key_padding_mask"] is not None:
            hidden = ~self.arguments["key_padding_mask"][:, None, :, None]
            self.key.masked_fill_(hidden, torch.nan)
            self.value.masked_fill_(hidden, torch.nan)
        lse_shape = (self.heads, rows_q[0]) if self.packed else (len(rows_q), self.heads, 1)
        if not self.packed:
            lse_shape = (rows_q[0], self.heads, rows_q[1])
        self.grad_lse = torch.randn(lse_shape) if self.needs_lse_grad else None

    def _rows(self, lengths: list[int]) -> tuple[int, ...]:
        return (sum(lengths) + self.tail,) if self.packed else (len(lengths), max(lengths))

    def _heads_first(self, x: Tensor) -> Tensor:
        return x if self.packed else x.transpose(1, 2)

    def _tensor(self, rows: tuple[int, ...]) -> Tensor:
        return self._heads_first(torch.randn(*rows, self.heads, self.head_dim).to(self.dtype))

    @property
    def _positional(self) -> tuple[Any, ...]:
        a = self.arguments
        masks = (
            (
                a["cu_seqlens_q"],
                a["cu_seqlens_k"],
                max(self.lengths_q),
                max(self.lengths_k),
                self.tile_map,
                self.tile_map,
            )
            if self.packed
            else (a["attn_mask"], a["key_padding_mask"])
        )
        seed = a["seed"] if a["dropout_p"] > 0 else None
        rest = (a["is_causal"], *a["window_size"], a["dropout_p"], a["scale"])
        return (*masks, a["bias"], seed, *rest)

    def forward(self) -> tuple[Tensor, Tensor]:
        run = _triton.attention_varlen_forward if self.packed else _triton.attention_forward
        return run(self.query, self.key, self.value, *self._positional)

    def backward(self, output: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        run = _triton.attention_varlen_backward if self.packed else _triton.attention_backward
        inputs = (self.grad_output, self.grad_lse, self.query, self.key, self.value, output, lse)
        return run(*inputs, *self._positional, self.arguments["bias"] is not None)

    def exact(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Output, lse and all gradients by the reference and autograd, computed in dtype."""

        def leaf(x: Tensor) -> Tensor:
            return x.nan_to_num().to(dtype).detach().requires_grad_()

        inputs = [leaf(x) for x in (self.query, self.key, self.value)]
        arguments = dict(self.arguments)
        if arguments["bias"] is not None:
            arguments["bias"] = leaf(arguments["bias"])
            inputs.append(arguments["bias"])
        run = reference.attention_varlen if self.packed else reference.attention_with_lse
        output, lse = run(*inputs[:3], **arguments)
        finite = torch.isfinite(lse)
        touch = sum(x.sum() for x in inputs) * 0.0  # every input is in the graph, used or not
        losses = [output + touch.to(output.dtype)]
        grads = [self.grad_output.nan_to_num().to(dtype)]
        if self.grad_lse is not None:
            losses.append(torch.where(finite, lse, 0.0) + touch.to(lse.dtype))
            grads.append(torch.where(finite, self.grad_lse.to(lse.dtype), 0.0))
        return (output.detach(), lse.detach(), *torch.autograd.grad(losses, inputs, grads))

    def check(self) -> None:
        """Output, lse and all gradients against float64."""
        output, lse = self.forward()
        results = (output, lse, *self.backward(output, lse))
        if self.arguments["bias"] is None:
            assert results[-1].numel() == 0
            results = results[:-1]
        names = ("output", "lse", "grad_query", "grad_key", "grad_value", "grad_bias")
        eager, exact = self.exact(self.dtype), self.exact(torch.float64)
        for name, got, low, high in zip(names, results, eager, exact, strict=False):
            terms = self._bias_rounding() if name == "grad_bias" else None
            assert_matches(got, low, high, name=name, rounding=terms)

    def _bias_rounding(self) -> Tensor:
        """What float32 rounding of each term leaves in a gradient that is a sum of terms of both signs."""
        bias = self.arguments["bias"]
        grid = (len(self.lengths_q), self.heads, max(self.lengths_q), max(self.lengths_k))
        self.arguments["bias"] = bias.expand(grid)
        terms = self.exact(torch.float64)[-1]
        self.arguments["bias"] = bias
        return torch.finfo(torch.float32).eps * terms.abs().sum_to_size(bias.shape)


def offsets(lengths: list[int]) -> Tensor:
    """int32 [B + 1]."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def padding(lengths: list[int], size: int) -> Tensor:
    """bool [B, size], True in the first `length` places of each row."""
    return torch.arange(size) < torch.tensor(lengths)[:, None]
