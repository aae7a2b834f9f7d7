"""A case from start to end: prepare every candidate, check it, time those that are right, compare.

A candidate whose numbers are wrong is refused and gets no time, before the clock starts and again on its last timed
output. ctxfast's own candidates run their check under the record of the operator dispatch: what is called native is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from ctxfast.ops import _dispatch

from . import checks, environment, peers, timing, workloads
from .case import BadOption, Candidate, Case, Unavailable, element_size
from .ceilings import Ceilings
from .ceilings import measure as measure_ceilings
from .peers import Peer
from .records import CaseResult, Result, Run

Progress = Callable[
    [str, int, int], None
]  # what is being done, steps done, steps in all (0: unknown)

OTHER_THREAD_POOLS = {"onnxruntime", "openvino", "ctranslate2"}
MIN_SAMPLE = {"tiny": 0.002, "base": 0.05}  # seconds
SETTLE = 0.05  # seconds after which the threads of such a peer have stopped spinning


@dataclass(frozen=True)
class Options:
    """size: of `workloads.SIZES`; threads: for every peer; peers: names, None for all but the slow ones."""

    size: str = "base"
    threads: int | None = None
    repeats: int = 7
    peers: tuple[str, ...] | None = None


@dataclass
class Prepared:
    """The candidates of a case that passed their check, and the results of all, in the order of the peers."""

    truth: Tensor
    candidates: dict[str, Candidate] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    eager: dict[str, checks.Deviation] = field(default_factory=dict)

    def result(self, candidate: Candidate) -> Result:
        return next(r for r in self.results if r.key == candidate.key)


def measure(
    names: Sequence[str],
    options: Options,
    *,
    on_start: Callable[[Run], None] = lambda run: None,
    on_case: Callable[[CaseResult], None] = lambda case: None,
    progress: Progress = lambda *_: None,
) -> Run:
    """Run workloads by name. Every finished case is handed to `on_case` at once.

    After Ctrl-C the case in hand keeps its complete rounds, and the run ends with `interrupted`. Raises
    BadOption for an unknown workload, size or peer, and for a number of threads or repeats below 1.
    """
    for name, value in (("threads", options.threads), ("repeats", options.repeats)):
        if value is not None and value < 1:
            raise BadOption(f"{name} must be at least 1, got {value}")
    cases = [workloads.cases(name, options.size) for name in names]
    found = peers.find(options.peers)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or before)
    try:
        progress("measuring the ceilings of this machine", 0, 0)
        ceilings = measure_ceilings(quick=options.size == "tiny")
        run = Run(environment.describe(), _versions(found), ceilings.to_json())
        on_start(run)
        try:
            for case in chain.from_iterable(cases):
                result = run_case(case, options, found, ceilings, progress)
                run.cases.append(result)
                run.interrupted = result.interrupted
                on_case(result)
                if run.interrupted:
                    break
        except KeyboardInterrupt:  # between the timed parts: the cases that are done are kept
            run.interrupted = True
    finally:
        torch.set_num_threads(before)
    return run


def _versions(found: Sequence[Peer]) -> dict[str, str]:
    return {
        peer.name: peer.version if peer.available else f"not measured: {peer.reason}"
        for peer in found
        if peer.name != peers.PARTS
    }


def run_case(
    case: Case,
    options: Options,
    found: Sequence[Peer],
    ceilings: Ceilings,
    progress: Progress = lambda *_: None,
) -> CaseResult:
    """Prepare, check and time every candidate of a case."""
    where = f"{case.workload} {case.name}"
    with torch.inference_mode():
        prepared = prepare(case, found, lambda what: progress(f"{where}: {what}", 0, 0))
        used = {candidate.peer for candidate in prepared.candidates.values()}
        schedule = timing.Schedule(
            repeats=options.repeats,
            min_sample=MIN_SAMPLE[options.size],
            settle=SETTLE if used & OTHER_THREAD_POOLS else 0.0,
        )
        steps, done = len(prepared.candidates) * (schedule.repeats + 1), 0

        def step(label: str) -> None:
            nonlocal done
            done += 1
            progress(f"{where}: timing {label}", done, steps)

        functions = {key: candidate.run for key, candidate in prepared.candidates.items()}
        samples = timing.interleave(functions, schedule, progress=step)
        _finish(case, prepared, samples, ceilings)
    return CaseResult(
        workload=case.workload,
        case=case.name,
        size=options.size,
        description=case.description,
        items=case.items,
        unit=case.unit,
        gflop=case.flop / 1e9,
        facts=case.facts,
        results=prepared.results,
        repeats=max((len(times) for times in samples.seconds.values()), default=0),
        foreign=samples.foreign,
        noisy=samples.foreign is not None and samples.foreign > timing.NOISY_FOREIGN,
        interrupted=samples.interrupted,
    )


def prepare(case: Case, found: Sequence[Peer], progress: Callable[[str], None]) -> Prepared:
    """Build and check every candidate: the eager one first, because its error is the measure of ctxfast's own."""
    progress("float64 truth")
    prepared = Prepared(case.truth())
    able = [peer for peer in found if peer.knows(case)]
    for peer in sorted(able, key=lambda p: p.name != peers.EAGER):
        failure = Result(case.workload, case.name, peer.name, peer.name, "", peer.version)
        if not peer.available:
            failure.status, failure.reason = "skipped", peer.reason
            prepared.results.append(failure)
            continue
        progress(f"preparing {peer.name}")
        try:
            for candidate in peer.candidates(case):
                progress(f"checking {candidate.label} {candidate.dtype}")
                prepared.results.append(_describe(case, peer, candidate))
                if _passes(candidate, prepared) and candidate.timed:
                    prepared.candidates[candidate.key] = candidate
        except Exception as error:  # one peer's failure must not end the run of the others
            failure.status = "skipped" if isinstance(error, Unavailable | ImportError) else "failed"
            failure.reason = _sentence(error)
            prepared.results.append(failure)
    order = peers.names()
    prepared.results.sort(key=lambda result: order.index(result.peer))
    prepared.candidates = {
        result.key: prepared.candidates[result.key]
        for result in prepared.results
        if result.key in prepared.candidates
    }
    return prepared


def _describe(case: Case, peer: Peer, candidate: Candidate) -> Result:
    return Result(
        workload=case.workload,
        case=case.name,
        peer=peer.name,
        label=candidate.label,
        dtype=candidate.dtype,
        version=peer.version,
        layout=candidate.layout,
        detail=candidate.detail,
        part=candidate.part,
    )


def _passes(candidate: Candidate, prepared: Prepared) -> bool:
    """Run a candidate once and check it; what is wrong with it goes into its result."""
    result = prepared.result(candidate)
    own = candidate.peer == peers.OWN
    try:
        with checks.poisoned_memory() if own else nullcontext(), _dispatch.record() as verdicts:
            output = candidate.run()
    except Exception as error:  # a candidate that cannot run is a finding, not the end
        result.status, result.reason = "failed", _sentence(error)
        return False
    if own:
        for verdict in verdicts:
            ran = result.implementations.setdefault(verdict.operator, {})
            ran[verdict.ran] = ran.get(verdict.ran, 0) + 1
            if verdict.ran == "reference":
                refusals = (f"{name}: {reason}" for name, reason in verdict.refused)
                result.reasons[verdict.operator] = "; ".join(refusals)
    return _is_right(candidate, output, prepared)


def _is_right(candidate: Candidate, output: object, prepared: Prepared) -> bool:
    if candidate.part:
        return True
    result, dtype = prepared.result(candidate), candidate.dtype
    eager = prepared.eager.get(dtype) if candidate.peer == peers.OWN else None
    try:
        result.error = checks.check(candidate.result(output), prepared.truth, dtype, eager=eager)
    except checks.WrongResult as error:
        result.status, result.reason = "refused", f"wrong result: {error}"
        return False
    if candidate.peer == peers.EAGER:
        prepared.eager[dtype] = result.error
    return True


def _finish(case: Case, prepared: Prepared, samples: timing.Samples, ceilings: Ceilings) -> None:
    """Fill in the times of the candidates whose last timed output is right too, then what follows from the times."""
    for key, candidate in prepared.candidates.items():
        result = prepared.result(candidate)
        if key in samples.failures:
            result.status, result.reason = "failed", samples.failures[key]
        elif samples.seconds[key] and _is_right(candidate, samples.last[key], prepared):
            result.samples = samples.seconds[key]
            result.seconds = timing.summarise(result.samples)
            result.noisy = result.seconds.noisy
    timed = [result for result in prepared.results if result.seconds]
    own = [result for result in timed if result.peer == peers.OWN]
    for result in timed:
        assert result.seconds is not None
        if not result.part:
            result.speedup = {
                mine.dtype: timing.ratio_interval(result.samples, mine.samples) for mine in own
            }
        flop = prepared.candidates[result.key].flop or case.flop
        result.gflops = flop / result.seconds.median / 1e9
        element = element_size(result.dtype)
        limit = (
            ceilings.limit_of_steps(result.dtype, case.steps, element)
            if case.steps and not result.part
            else ceilings.limit(result.dtype, flop, case.traffic(element))
        )
        if limit is not None:
            result.of_limit, result.limit = limit[0] / result.seconds.median, limit[1]


def _sentence(error: Exception) -> str:
    """An error on one line."""
    text = " ".join(str(error).split())
    if isinstance(error, Unavailable):
        return text
    return f"{type(error).__name__}: {text}"[:300]
