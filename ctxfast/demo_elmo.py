"""The ELMo part of the demo: random weights in the published layout, written, read, checked and timed.

No published weights can be shipped. What is shown is that the two files load, that the numbers are those of the eager
reference, and what the fused path saves.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ctxfast.elmo import ElmoBiLm, ElmoOptions, batch_to_ids, save_model
from ctxfast.elmo.weights import initial_weights
from ctxfast.examples.texts import generate_sentences
from ctxfast.ops import use_backend

# The published "small" model but for a narrower token encoder.
OPTIONS = ElmoOptions(
    dim=1024,
    projection_dim=128,
    n_layers=2,
    cell_clip=3.0,
    proj_clip=3.0,
    use_skip_connections=True,
    filters=((1, 32), (2, 32), (3, 64), (4, 128), (5, 256)),
    n_highway=1,
)
BATCH = 32
REPEATS = 3


@dataclass(frozen=True)
class ElmoDemoResult:
    """Largest difference to the eager reference over all layers and words, and medians in seconds."""

    parameters: int
    sentences: int
    words: int
    difference: float
    largest_value: float
    reference: float
    ctxfast: float

    @property
    def agrees(self) -> bool:
        """Whether the difference is one of rounding: 2e-5, scaled by the largest value."""
        return self.difference <= 2e-5 * max(1.0, self.largest_value)

    @property
    def speedup(self) -> float:
        return self.reference / self.ctxfast

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"agrees": self.agrees, "speedup": self.speedup}


def run_elmo_demo() -> ElmoDemoResult:
    """Writes options.json and weights.hdf5, loads them and compares a batch of sentences with the eager reference."""
    sentences = [text.split()[:60] for text in generate_sentences(BATCH)]
    with tempfile.TemporaryDirectory(prefix="ctxfast-demo-") as folder:
        tensors = initial_weights(OPTIONS, torch.Generator().manual_seed(0))
        save_model(folder, tensors, OPTIONS, form="hdf5")
        model = ElmoBiLm(folder).eval()
    model.stateful = "reset"
    ids = batch_to_ids(sentences)
    ours = model.layers(ids)[0]
    with use_backend("reference"):
        reference = model.layers(ids)[0]
        slow = _median(lambda: model.layers(ids), range(REPEATS))
    fast = _median(lambda: model.layers(ids), range(REPEATS))
    return ElmoDemoResult(
        parameters=sum(p.numel() for p in model.parameters()),
        sentences=len(sentences),
        words=sum(map(len, sentences)),
        difference=float((ours - reference).abs().max()),
        largest_value=float(reference.abs().max()),
        reference=slow,
        ctxfast=fast,
    )


def _median(run: Callable[[], Any], repeats: Sequence[int]) -> float:
    times = []
    for _ in repeats:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
