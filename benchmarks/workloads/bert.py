"""BERT inference on batches of real length distributions, and on one short sentence.

A candidate gets what a serving loop has, token ids and mask of each batch padded to its longest sentence, and gives the
last hidden state; how it deals with the padding is its own affair. FLOP are counted on valid tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .. import lengths as length_sets
from .. import scratch
from ..case import Case
from ..plain_bert import Shape, alone, read_weights, write_weights

TINY = Shape(
    vocab_size=1000,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=256,
)
MINILM = Shape(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
LARGE = Shape(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)
# "short" has the layers of "base", but four: enough for a curve, which is the same for any number of equal layers
SHAPES = {
    "tiny": TINY,
    "minilm": MINILM,
    "base": Shape(),
    "large": LARGE,
    "short": Shape(num_hidden_layers=4),
}


@dataclass(frozen=True)
class Batch:
    """ids [B, S] int64, mask [B, S] bool (True = token), the lengths on the host."""

    ids: Tensor
    mask: Tensor
    lengths: tuple[int, ...]

    def rows(self, chosen: list[int]) -> Batch:
        """Some sentences of the batch, padded to the longest of them."""
        lengths = tuple(self.lengths[i] for i in chosen)
        index = torch.tensor(chosen, device=self.ids.device)
        longest = max(lengths)
        return Batch(
            self.ids[index, :longest].contiguous(), self.mask[index, :longest].contiguous(), lengths
        )

    def to(self, device: torch.device) -> Batch:
        return Batch(self.ids.to(device), self.mask.to(device), self.lengths)


@dataclass(frozen=True)
class BertInputs:
    """A Hugging Face directory and the batches to run through it, one after the other."""

    make_directory: Callable[[], Path]
    shape: Shape
    batches: tuple[Batch, ...]

    @property
    def directory(self) -> Path:
        """Made on first use: a case can be listed without writing its weights."""
        return self.make_directory()

    @property
    def lengths(self) -> list[int]:
        """Of all sentences of all batches."""
        return [length for batch in self.batches for length in batch.lengths]

    def packed_ids(self) -> Tensor:
        """[T] of the valid tokens of all batches."""
        return torch.cat([batch.ids[batch.mask] for batch in self.batches])

    @property
    def device(self) -> torch.device:
        return self.batches[0].ids.device

    def to(self, device: torch.device) -> BertInputs:
        batches = tuple(batch.to(device) for batch in self.batches)
        return BertInputs(self.make_directory, self.shape, batches)

    def valid(self, outputs: list[Tensor]) -> Tensor:
        """[T, hidden] of the valid tokens of padded outputs [B, S, hidden], one a batch."""
        pairs = zip(outputs, self.batches, strict=True)
        return torch.cat([output[batch.mask] for output, batch in pairs])


def make_batch(lengths: list[int], shape: Shape, seed: int) -> Batch:
    """Random token ids; padding holds id 0."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.randint(1, shape.vocab_size, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return Batch(grid.masked_fill(~mask, 0), mask, tuple(lengths))


def pad_rows(rows: Sequence[Sequence[int]]) -> Batch:
    """Token ids of sentences on a padded grid; padding holds id 0."""
    lengths = tuple(len(row) for row in rows)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    grid = torch.zeros(mask.shape, dtype=torch.int64)
    grid[mask] = torch.tensor([token for row in rows for token in row])
    return Batch(grid, mask, lengths)


def model_directory(size: str) -> Path:
    """The directory with the random weights of a shape, written once a run and removed at its end."""
    return scratch.folder(f"bert-{size}", lambda folder: write_weights(folder, SHAPES[size]))


def make_case(
    workload: str, name: str, description: str, size: str, batch_lengths: list[list[int]]
) -> Case:
    """The case of a shape of SHAPES and the lengths of its batches."""
    shape = SHAPES[size]
    batches = tuple(make_batch(lengths, shape, seed) for seed, lengths in enumerate(batch_lengths))
    directory = partial(model_directory, size)
    return encoder_case(workload, name, description, directory, shape, batches)


def encoder_case(
    workload: str,
    name: str,
    description: str,
    directory: Callable[[], Path],
    shape: Shape,
    batches: tuple[Batch, ...],
) -> Case:
    """The case of a model directory and its batches."""
    inputs = BertInputs(directory, shape, batches)
    flat = inputs.lengths
    padded = sum(batch.mask.numel() for batch in batches)

    def truth() -> Tensor:
        weights = read_weights(inputs.directory, torch.float64)
        with torch.inference_mode():
            return alone(weights, shape, inputs.packed_ids(), flat)

    def traffic(element: int) -> float:
        return float(element * shape.linear_parameters() * len(batches))

    return Case(
        workload=workload,
        name=name,
        kind="bert",
        description=description,
        inputs=inputs,
        truth=truth,
        dtypes=("float32", "bfloat16"),
        flop=shape.flop(flat),
        traffic=traffic,
        items=len(flat),
        unit="sentences",
        facts={
            "batches": len(batches),
            "sentences": len(flat),
            "tokens": sum(flat),
            "padded_tokens": padded,
            "fill": round(sum(flat) / padded, 3),
        },
    )


def serves_int8(case: Case) -> bool:
    """Whether ctxfast has linear layers on 8-bit integers for a BERT case here."""
    from ctxfast.ops.linear_int8 import int8_unavailable_reason

    on_cpu = case.device.type == "cpu"
    return on_cpu and "bfloat16" in case.dtypes and int8_unavailable_reason() is None


def serves_tf32(case: Case) -> bool:
    """Whether ctxfast has faster products for float32 on a CPU where torch allows TF32."""
    from ctxfast.ops import _native

    on_cpu = case.device.type == "cpu"
    return on_cpu and "float32" in case.dtypes and _native.available() and _native.isa() == "amx"


def inference(size: str) -> Iterator[Case]:
    """Batches of 32 (tiny: 8) sentences with the lengths of short messages."""
    batches, batch_size = {"tiny": (1, 8), "base": (2, 32), "large": (1, 32)}[size]
    text_set = "sms_spam"
    lengths = length_sets.draw_batches(text_set, batches, batch_size)
    layers, hidden = SHAPES[size].num_hidden_layers, SHAPES[size].hidden_size
    yield make_case(
        "bert-inference",
        f"{text_set}-{batches}x{batch_size}",
        f"BERT, {layers} layers of {hidden}, {batches} x {batch_size} sentences with {text_set} lengths",
        size,
        lengths,
    )


def latency(size: str) -> Iterator[Case]:
    """One sentence at a time: of twelve tokens, and of 5 to 20 in random order, as a service meets them."""
    several = torch.randperm(16, generator=torch.Generator().manual_seed(0)).add(5).tolist()
    for shape in ("base", "minilm") if size == "base" else (size,):
        layers, hidden = SHAPES[shape].num_hidden_layers, SHAPES[shape].hidden_size
        for name, lengths, what in (
            ("1x12", [12], "one sentence of 12 tokens"),
            ("16x(5..20)", several, "16 sentences of 5 to 20 tokens, one after the other"),
        ):
            description = f"BERT, {layers} layers of {hidden}, {what}"
            prefix = "" if shape == size else f"{shape}-"
            batches = [[length] for length in lengths]
            yield make_case("bert-latency", prefix + name, description, shape, batches)
