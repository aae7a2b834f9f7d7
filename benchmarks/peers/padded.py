"""What a peer that needs rectangular batches gets: one padded batch, and length-sorted buckets, their count tuned."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import timing
from ..case import Candidate, Case
from ..lengths import length_buckets
from ..workloads.bert import Batch, BertInputs

BUCKET_COUNTS = (2, 4, 8)
Forward = Callable[[Batch], Tensor]  # padded batch -> [B, S, hidden]


def variants(
    peer: str,
    label: str,
    dtype: str,
    case: Case,
    forward: Forward,
    *,
    layouts: tuple[str, ...] = ("padded", "buckets"),
    lesser: bool | None = None,
) -> Iterator[Candidate]:
    """The candidates of a padded peer. The number of buckets is the fastest of BUCKET_COUNTS on the first batch.

    lesser: whether the padded one is a lesser setting; None: where there are buckets.
    """
    inputs: BertInputs = case.inputs
    even = all(min(batch.lengths) == max(batch.lengths) for batch in inputs.batches)
    if "padded" in layouts or even:
        yield Candidate(
            peer=peer,
            label=label,
            dtype=dtype,
            run=lambda: [forward(batch) for batch in inputs.batches],
            result=inputs.valid,
            layout="padded",
            lesser="buckets" in layouts and not even if lesser is None else lesser,
        )
    if "buckets" not in layouts or even:
        return
    count = _fastest_count(inputs.batches[0], forward)
    groups = [length_buckets(batch.lengths, count) for batch in inputs.batches]
    buckets = [
        [batch.rows(group) for group in batch_groups]
        for batch, batch_groups in zip(inputs.batches, groups, strict=True)
    ]

    def result(outputs: list[list[Tensor]]) -> Tensor:
        grids = []
        for batch, batch_groups, parts in zip(inputs.batches, groups, outputs, strict=True):
            grid = parts[0].new_zeros(*batch.ids.shape, parts[0].shape[-1])
            for group, part in zip(batch_groups, parts, strict=True):
                grid[torch.tensor(group, device=grid.device), : part.shape[1]] = part
            grids.append(grid)
        return inputs.valid(grids)

    yield Candidate(
        peer=peer,
        label=f"{label}, length buckets",
        dtype=dtype,
        run=lambda: [[forward(bucket) for bucket in of_batch] for of_batch in buckets],
        result=result,
        layout="buckets",
        detail=f"{count} buckets a batch",
    )


def _fastest_count(batch: Batch, forward: Forward) -> int:
    clock, times = timing.clock_of(batch.ids.device), {}
    for count in BUCKET_COUNTS:
        parts = [batch.rows(group) for group in length_buckets(batch.lengths, count)]
        for _ in range(2):  # the first pass warms up
            start = clock()
            for part in parts:
                forward(part)
            times[count] = clock() - start
    return min(times, key=lambda count: times[count])
