"""Which cases a run measures, in which order, and how long that may take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat, zip_longest

import torch

from . import user_model, workloads
from .case import Case
from .options import Options
from .records import Run


def cases(names: Sequence[str], options: Options) -> Iterator[tuple[tuple[str, ...], Case]]:
    """Every case behind where it comes from, as `memory.find_case` takes it.

    Workload by workload; with a limit on the time the first case of each comes first, then the second of each, so that
    none is left out.
    """
    device = torch.device(options.device)
    if options.model is not None:
        own = (case.on(device) for case in user_model.cases(options.model))
        made = [(options.model.source, own)]
    else:
        made = [
            (("workload", name, options.size), workloads.cases(name, options.size, device))
            for name in names
        ]
    if options.minutes is None:
        return ((source, case) for source, found in made for case in found)
    turns = zip_longest(*(zip(repeat(source), found, strict=False) for source, found in made))
    return (item for turn in turns for item in turn if item is not None)


def plan(names: Sequence[str], options: Options, run: Run) -> str:
    """How many cases are left to measure and, where the options bound it, for how long."""
    done = {case.identity for case in run.cases}
    left = sum(
        (case.workload, case.name, options.size_name) not in done
        for _, case in cases(names, options)
    )
    text = f"{left} case{'' if left == 1 else 's'} to measure"
    if options.budget is not None:
        minutes = left * options.budget / 60
        text += f", about {minutes:.0f} minutes of timing at {options.budget:g} s a case"
        text += " and as much again for preparing and checking"
    if options.minutes is not None:
        text += f"; none begins after {options.minutes:g} minutes"
    return text
