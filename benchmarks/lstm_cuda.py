"""The LSTM on a GPU: `python -m ctxfast.benchmarks.lstm_cuda`.

First what an exchange between blocks costs by itself, then microseconds of a step of one bidirectional layer of each
ELMo size, against torch.nn.LSTM (cuDNN, one call a direction, which clips no projected state) and the eager cell.
Writes JSON lines to results/lstm-<device>.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctxfast import explain, ops
from ctxfast.ops import _native, _native_lstm_paths

from . import environment

SIZES = ((4096, 512), (2048, 256), (1024, 128))
CLIPS = {"cell_clip": 3.0, "proj_clip": 3.0}


def milliseconds(function: Callable[[], Any], repeats: int = 7) -> float:
    """Median device time of a call; a second of warm-up is not spent, three calls are."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def exchanges(device: torch.device) -> Iterator[dict[str, Any]]:
    """Microseconds of one exchange: the difference of two counts, so that the launch drops out."""

    def loop(index: int, count: int) -> float:
        return milliseconds(lambda: _native_lstm_paths.run_exchange_loop(index, count, device))

    for index, name in enumerate(_native_lstm_paths.exchange_loops()):
        try:
            few, many = loop(index, 1000), loop(index, 3000)
        except RuntimeError as error:
            yield {"exchange": name, "skipped": str(error)}
            continue
        yield {"exchange": name, "microseconds": (many - few) / 2}


class Layer:
    """One bidirectional layer with random weights."""

    def __init__(self, hidden: int, features: int, batch: int, steps: int, dtype: torch.dtype):
        options = {"device": "cuda", "dtype": dtype}
        self.modules = [
            nn.LSTM(features, hidden, proj_size=features, batch_first=True, **options)
            for _ in range(2)
        ]
        self.input = torch.randn(batch, steps, features, **options)
        self.weights = [
            tuple(getattr(m, f"{name}_l0") for m in self.modules)
            for name in ("weight_ih", "weight_hh", "bias_ih", "weight_hr")
        ]
        for module in self.modules:
            nn.init.zeros_(module.bias_hh_l0)
        self.parameters = [p for m in self.modules for p in m.parameters()]

    def ours(self) -> Tensor:
        return ops.bilstm(self.input, *self.weights, **CLIPS)[0]

    def eager(self) -> Tensor:
        with ops.use_backend("reference"):
            return self.ours()

    def cudnn(self) -> Tensor:
        forward, backward = (
            m(x)[0] for m, x in zip(self.modules, (self.input, self.input.flip(1)), strict=True)
        )
        return torch.cat((forward, backward.flip(1)), -1)

    def runs(self) -> dict[str, Callable[[], Tensor]]:
        return {"ctxfast": self.ours, "torch.nn.LSTM": self.cudnn, "eager": self.eager}


def steps_of(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Microseconds of a step."""
    dtypes = [getattr(torch, name) for name in options.dtypes.split(",")]
    counts = [[int(x) for x in text.split(",")] for text in (options.batches, options.steps)]
    for dtype, (hidden, features), batch, steps in itertools.product(dtypes, SIZES, *counts):
        torch.manual_seed(0)
        layer = Layer(hidden, features, batch, steps, dtype)
        wanted = dict(layer.runs())
        if steps > 20 or batch > 32:
            wanted.pop("eager")
        problem = {"hidden": hidden, "features": features, "batch": batch, "steps": steps}
        problem["dtype"] = str(dtype).removeprefix("torch.")
        for name, function in wanted.items():
            line = {**problem, "implementation": name}
            if name == "ctxfast":
                line["path"] = sorted(explain(function).ran("lstm"))
            with torch.no_grad():
                line["forward_us"] = 1000 * milliseconds(function) / steps

            def both(function=function, layer=layer):
                output = function()
                torch.autograd.grad(output, layer.parameters, output, allow_unused=True)

            line["forward_backward_us"] = 1000 * milliseconds(both, 3) / steps
            yield line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", default="bfloat16,float16,float32")
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--steps", default="20,100")
    options = parser.parse_args()
    if not torch.cuda.is_available() or not _native.cuda_available():
        print(f"no CUDA device, or no module: {_native.cuda_unavailable_reason()}", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    path = Path(__file__).resolve().parent / "results" / f"lstm-{name}.jsonl"
    lines = [{"environment": environment.describe(), "command": " ".join(sys.argv)}]
    for line in itertools.chain(exchanges(device), steps_of(options)):
        print(json.dumps(line), flush=True)
        lines.append(line)
    temporary = path.with_suffix(".new")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(temporary, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
