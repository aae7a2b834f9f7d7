"""ELMo's LSTM layers: both directions of one layer with projection, 20 steps, one sentence and a batch of 32.

Beside them a layer without projection, for which oneDNN has a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..case import Case

# Recurrent weights of one direction up to this size stay in the last-level cache from step to step.
CACHED_BYTES = 24 << 20


@dataclass(frozen=True)
class LstmInputs:
    """input [B, T, K], the parameters of a bidirectional torch.nn.LSTM, and whether a step of training is measured.

    projection: features of the state, 0 for as many as there are cells
    """

    input: Tensor
    parameters: dict[str, Tensor]
    hidden: int
    projection: int
    training: bool

    def to(self, device: torch.device) -> LstmInputs:
        parameters = {name: x.to(device) for name, x in self.parameters.items()}
        return replace(self, input=self.input.to(device), parameters=parameters)

    def module(self, kind: type[nn.LSTM], dtype: torch.dtype) -> nn.LSTM:
        """A module with these parameters, made outside inference mode."""
        with torch.inference_mode(False):
            module = kind(
                self.input.shape[2],
                self.hidden,
                proj_size=self.projection,
                bidirectional=True,
                batch_first=True,
                dtype=dtype,
                device=self.input.device,
            )
            module.load_state_dict(self.parameters)
        return module.train(self.training)

    def run(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        """The output [B * T, 2P]; in training beside it the gradient of the input, for a loss that sums the output."""
        if not self.training:
            return module(self.input.to(dtype))[0].flatten(0, 1)
        with torch.inference_mode(False), torch.enable_grad():
            x = self.input.to(dtype, copy=True).requires_grad_()
            module.zero_grad()
            output = module(x)[0]
            output.sum().backward()
            assert x.grad is not None
            return torch.cat((output.detach(), x.grad), 2).flatten(0, 1)


def lstm(size: str) -> Iterator[Case]:
    """Forward, then forward and backward, at the sizes of the published models."""
    models = {
        "tiny": ((32, 8), (8, 0)),
        "base": ((4096, 512), (2048, 256), (1024, 128), (512, 0)),
    }[size]
    steps, batches = {"tiny": (4, (1, 3)), "base": (20, (1, 32))}[size]
    for training in (False, True):
        for hidden, projection in models:
            for batch in batches:
                yield _case(hidden, projection, batch, steps, training)


def _case(hidden: int, projection: int, batch: int, steps: int, training: bool) -> Case:
    features = projection or hidden
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.LSTM(features, hidden, proj_size=projection, bidirectional=True)
        x = torch.randn(batch, steps, features)
    parameters = {name: x.detach() for name, x in module.named_parameters()}
    inputs = LstmInputs(x, parameters, hidden, projection, training)
    weights = 4 * hidden * features  # of the input, and again of the state
    recurrent = weights + hidden * projection
    passes = 3 if training else 1

    def traffic(element: int) -> float:
        reads = 1 if recurrent * element <= CACHED_BYTES else steps
        return 2.0 * passes * element * (weights + recurrent * reads)

    size = f"{hidden}/{projection}" if projection else f"{hidden}"
    cells = f"{hidden} cells" + (f" projected to {projection}" if projection else "")
    return Case(
        workload="lstm",
        name=f"{'train-' if training else ''}{size}-{batch}x{steps}",
        kind="lstm",
        description=f"bidirectional LSTM, {cells}, {batch} x {steps} tokens"
        + (", forward and backward" if training else ""),
        inputs=inputs,
        truth=lambda: inputs.run(inputs.module(nn.LSTM, torch.float64), torch.float64),
        dtypes=("float32",) if training else ("float32", "bfloat16"),
        flop=2.0 * passes * 2 * (weights + recurrent) * batch * steps,
        traffic=traffic,
        items=batch * steps,
        unit="tokens",
        facts={"recurrent_mib": round(recurrent * 4 / 2**20, 1)},
    )
