"""Which implementation runs, and why the others do not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ctxfast.ops import _dispatch


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. Printing it gives a table.

    calls:        (operator, implementation) -> number of calls
    reasons:      (operator, implementation) -> why that implementation was passed over
    packed_bytes: memory of the packed weight copies that the model's modules hold
    padding:      share of padding in the model's last call, None where it has not run
    notes:        what accelerated models say of their layers: fused, or why not; and compute types that were set
    """

    calls: dict[tuple[str, str], int]
    reasons: dict[tuple[str, str], str]
    packed_bytes: int | None = None
    padding: float | None = None
    notes: list[str] = field(default_factory=list)

    def ran(self, operator: str) -> set[str]:
        """The implementations that ran for an operator."""
        return {implementation for name, implementation in self.calls if name == operator}

    def __str__(self) -> str:
        lines = []
        for (operator, implementation), count in sorted(self.calls.items()):
            passed = [
                f"{name}: {reason}"
                for (other, name), reason in self.reasons.items()
                if other == operator
            ]
            detail = f"  (not {'; '.join(passed)})" if passed else ""
            lines.append(f"{operator:24} {implementation:10} {count:5} calls{detail}")
        if self.packed_bytes is not None:
            lines.append(f"packed weights: {self.packed_bytes / 2**20:.1f} MiB")
        if self.padding is not None:
            lines.append(f"padding in the last call: {self.padding:.0%} of the grid, skipped")
        return "\n".join([*lines, *self.notes])


def explain(target: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Run an operator or a model once and say which implementation of every operator ran, and why not another.

    target: a function of `ctxfast.ops`, any module built on them, a model that `ctxfast.accelerate` took or a pipeline
    that holds one; args and kwargs: what to call it with. A module without arguments is not run: only its layers, its
    packed weights and its last padding are reported.
    """
    module = target if isinstance(target, nn.Module) else getattr(target, "model", None)
    calls: Counter[tuple[str, str]] = Counter()
    reasons: dict[tuple[str, str], str] = {}
    if args or kwargs or not isinstance(module, nn.Module):
        with torch.no_grad(), _dispatch.record() as verdicts:
            target(*args, **kwargs)
        for verdict in verdicts:
            calls[verdict.operator, verdict.ran] += 1
            reasons.update({(verdict.operator, name): reason for name, reason in verdict.refused})
    if not isinstance(module, nn.Module):
        return Explanation(dict(calls), reasons)
    named = dict(module.named_modules())
    packed = sum(getattr(part, "packed_bytes", 0) for part in named.values())
    shares = (getattr(part, "last_padding", None) for part in named.values())
    padding = next((share for share in shares if isinstance(share, float)), None)
    precisions = Counter(
        getattr(part, "precision", None) for part in named.values() if isinstance(part, nn.Linear)
    )
    del precisions[None]
    notes = [f"inference in {name}: {n} linear layers" for name, n in sorted(precisions.items())]
    for name, part in named.items():
        describe = getattr(type(part), "ctxfast_notes", None)
        notes += [] if describe is None else describe(part, name)
    return Explanation(dict(calls), reasons, packed, padding, notes)
