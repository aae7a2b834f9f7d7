"""The layers of an encoder as CUDA graphs, for calls so short that launching kernels takes longer than running them.

A graph is a fixed list of launches that read and write fixed addresses. One serves every batch that fits its bucket:
sequences that are not there have no tokens, and what rows beyond the last token hold reaches no other row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ctxfast.integrations._inspection import Inspection
from ctxfast.integrations._layer import Layer
from ctxfast.integrations._plan import Plan
from ctxfast.integrations._stock import is_adapter
from ctxfast.integrations._swap import State
from ctxfast.integrations._weights import PackedWeights
from ctxfast.nn.certificate import Snapshot
from ctxfast.ops import _dispatch

# A layer of BERT-base on so many tokens is 58 GFLOP, a tenth of a millisecond on the fastest devices: what its launches
# cost from Python.
_MOST_ROWS = 4096
_MOST_GRAPHS = 32
_FEWEST_ROWS = 16
_WARMUP = (
    2  # calls before a capture, in which kernels are compiled and libraries take their workspace
)

Body = Callable[[], Tensor]


class Bucket(NamedTuple):
    """What one graph serves: at most so many rows, sequences and tokens in a sequence, in that dtype."""

    rows: int
    sequences: int
    max_seqlen: int
    dtype: torch.dtype

    @classmethod
    def of(cls, hidden: Tensor, plan: Plan) -> Bucket:
        """Rows in steps of a half or a third, sequences in powers of two."""
        power = max(_FEWEST_ROWS, _power_of_two(hidden.shape[0]))
        smaller = 3 * power // 4
        rows = smaller if max(_FEWEST_ROWS, hidden.shape[0]) <= smaller else power
        sequences = _power_of_two(plan.batch.batch_size)
        return cls(rows, sequences, plan.batch.max_seqlen, hidden.dtype)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


class Recorder:
    """CUDA's side of a set of graphs that share their memory: no two of them may run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._done = torch.cuda.Event()

    def capture(self, body: Body) -> tuple[Callable[[], object], Tensor]:
        """What launches the kernels of `body` again, and where these leave its result."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARMUP):
                body()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = body()
        return graph.replay, output

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """What is launched inside runs after everything that was launched in the turn before, on any stream."""
        torch.cuda.current_stream().wait_event(self._done)
        try:
            yield
        finally:
            self._done.record()

    def wait(self) -> None:
        """Returns when the last turn has run."""
        self._done.synchronize()


class _Graph:
    """One bucket: where its launches read and write."""

    def __init__(
        self,
        bucket: Bucket,
        hidden: Tensor,
        plan: Plan,
        layers: Callable[[Tensor, Plan], Tensor],
        recorder: Recorder,
    ) -> None:
        # Outside inference mode, so that the buffers also serve calls under no_grad.
        with torch.inference_mode(False), torch.no_grad():
            self._hidden = hidden.new_zeros((bucket.rows, hidden.shape[1]))
            self._cu_seqlens = plan.batch.cu_seqlens.new_zeros(bucket.sequences + 1)
            self._bias = None if plan.bias is None else torch.empty_like(plan.bias)
            # Without dropout the layers read of the layout no more than the offsets and the bound of the lengths.
            batch = dataclasses.replace(plan.batch, cu_seqlens=self._cu_seqlens)
            self._replay, self._output = recorder.capture(
                lambda: layers(self._hidden, Plan(batch, bucket.rows, bias=self._bias))
            )

    def _fill(self, hidden: Tensor, plan: Plan) -> None:
        cu_seqlens = plan.batch.cu_seqlens
        self._hidden[: hidden.shape[0]].copy_(hidden)
        self._cu_seqlens[: len(cu_seqlens)].copy_(cu_seqlens)
        self._cu_seqlens[len(cu_seqlens) :].copy_(cu_seqlens[-1])
        if self._bias is not None and plan.bias is not None:
            self._bias.copy_(plan.bias)

    def __call__(self, hidden: Tensor, plan: Plan) -> Tensor:
        self._fill(hidden, plan)
        self._replay()
        return self._output[: hidden.shape[0]].clone()


class LayerGraphs:
    """The graphs of all layers of an encoder in evaluation mode, for as long as nobody changes these.

    found: what the layers were found to be;  serve: whether they may be captured
    """

    def __init__(self, found: Inspection) -> None:
        modules = [module for module, _ in found.layers]
        self.found = found
        parts = [part for module in modules for part in module.modules()]
        # An adapter keeps what it computes with where a snapshot does not look.
        self.serve = not any(part.training or is_adapter(part) for part in parts)
        self.snapshot = Snapshot(modules, ())
        self._recorder: Recorder | None = None
        self._graphs: OrderedDict[Bucket, _Graph] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, hidden: Tensor, plan: Plan, weights: PackedWeights) -> Tensor:
        """All layers on hidden [T, H] -> [T, H]."""

        def layers(hidden: Tensor, plan: Plan) -> Tensor:
            for _, layer in self.found.layers:
                assert isinstance(layer, Layer)
                hidden, _ = layer(hidden, plan, weights)
            return hidden

        bucket = Bucket.of(hidden, plan)
        with self._lock:
            recorder = self._recorder = self._recorder or Recorder()
            with recorder.turn():
                graph = self._graphs.get(bucket)
                if graph is None:
                    if len(self._graphs) == _MOST_GRAPHS:
                        recorder.wait()
                        self._graphs.popitem(last=False)
                    graph = _Graph(bucket, hidden, plan, layers, recorder)
                    self._graphs[bucket] = graph
                self._graphs.move_to_end(bucket)
                return graph(hidden, plan)


def graphs_of(state: State, found: Inspection, hidden: Tensor, plan: Plan) -> LayerGraphs | None:
    """The graphs that serve a call, or None where its kernels have to be launched one by one.

    found: the inspection of the model, known to hold: its certificate looks at everything but what parameters hold
    """
    if not (state.options.cuda_graphs and _serves(state, found, hidden, plan)):
        return None
    graphs = state.graphs
    if graphs is None or graphs.found is not found or not graphs.snapshot.parameters_hold():
        state.graphs = graphs = LayerGraphs(found)
    return graphs if graphs.serve else None


def _serves(state: State, found: Inspection, hidden: Tensor, plan: Plan) -> bool:
    return (
        found.fused
        and plan.batch.total > 0
        and hidden.shape[0] <= _MOST_ROWS
        and not plan.padded
        and _dispatch.parts_unseen(hidden.device.type)
        and not getattr(state.owner(), "_is_replica", False)  # of DataParallel: lives for one call
        and _capturable(hidden)
    )


def _capturable(hidden: Tensor) -> bool:
    """Whether launches on the stream of this tensor can be captured: not within a capture of the caller's."""
    return hidden.is_cuda and not torch.cuda.is_current_stream_capturing()
