"""Named workloads. Each gives its cases at a size; adding one is a function and a line here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..case import CPU, BadOption, Case
from . import accelerate, bert, bert_pretraining, elmo, lstm, operators, scaling

SIZES = ("tiny", "base", "large")


@dataclass(frozen=True)
class Workload:
    """about: one line for a list; cases(size): its problems, made when they are asked for.

    sizes: those of SIZES that it has; full: whether it is long, and left out unless it is named or all are wanted.
    gpu: whether it can also run there.
    """

    name: str
    about: str
    cases: Callable[[str], Iterator[Case]]
    sizes: tuple[str, ...] = ("tiny", "base")
    full: bool = False
    gpu: bool = True


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "bert-inference", "BERT on batches of 32 messages of real length", bert.inference, SIZES
        ),
        Workload("bert-latency", "BERT on one sentence of 12 tokens", bert.latency, SIZES),
        Workload(
            "bert-pretraining",
            "a pretraining step of BERT, optimizer included, on 16 messages",
            bert_pretraining.pretraining,
            gpu=False,
        ),
        Workload(
            "accelerate",
            "other people's models: text to vectors, a batch, a sentence, fine-tuning",
            accelerate.accelerate,
            gpu=False,
        ),
        Workload("attention", "attention, dense and on packed batches", operators.attention, SIZES),
        Workload("elmo-inference", "ELMo on 32 messages and on one sentence", elmo.inference),
        Workload("lstm", "bidirectional LSTM with projection, ELMo's sizes", lstm.lstm),
        Workload("linear", "linear with bias and its epilogue", operators.linear),
        Workload("layer-norm", "residual and LayerNorm in one pass", operators.layer_norm),
        Workload(
            "bert-scaling",
            "BERT's time against tokens, batch, length, threads",
            scaling.bert,
            full=True,
            gpu=False,
        ),
        Workload(
            "attention-scaling",
            "attention's time against batch, length, threads",
            scaling.attention,
            full=True,
            gpu=False,
        ),
    )
}


def names(size: str = "base", *, full: bool = False, device: str = "cpu") -> list[str]:
    """The workloads of a run that names none: what the size and device have, without the long ones unless `full`."""
    return [
        w.name
        for w in WORKLOADS.values()
        if size in w.sizes and (full or not w.full) and (device == "cpu" or w.gpu)
    ]


def cases(name: str, size: str = "base", device: torch.device = CPU) -> Iterator[Case]:
    """The cases of a workload. Raises BadOption for an unknown name or size, or where it does not run on the device."""
    if name not in WORKLOADS:
        raise BadOption(f"workload must be one of {', '.join(WORKLOADS)}, got {name!r}")
    if size not in SIZES:
        raise BadOption(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    if size not in WORKLOADS[name].sizes:
        sizes = ", ".join(WORKLOADS[name].sizes)
        raise BadOption(f"size of {name} must be one of {sizes}, got {size!r}")
    if device.type != "cpu" and not WORKLOADS[name].gpu:
        raise BadOption(f"device of {name} must be cpu, got {device.type!r}")
    return (case.on(device) for case in WORKLOADS[name].cases(size))
