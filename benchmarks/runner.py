"""A case from start to end: prepare every candidate, check it, time those that are right, compare.

A candidate whose numbers are wrong is refused and gets no time, before the clock starts and again on its last timed
output. ctxfast's own candidates are checked as they will be timed, where whole layers may be one call, and once more
under the record of the operator dispatch, which sees the parts of layers: what is called native is.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ctxfast.ops import _dispatch

from . import checks, environment, memory, peers, planning, profiling, timing
from .case import BadOption, Candidate, Case, Unavailable, element_size
from .ceilings import Ceilings
from .ceilings import measure as measure_ceilings
from .options import Options
from .peers import Peer
from .records import CaseResult, Result, Run

Progress = Callable[
    [str, int, int], None
]  # what is being done, steps done, steps in all (0: unknown)

OTHER_THREAD_POOLS = {"onnxruntime", "openvino", "ctranslate2"}
MIN_SAMPLE = {"tiny": 0.002, "base": 0.05, "large": 0.05}  # seconds
SETTLE = 0.05  # seconds after which the threads of such a peer have stopped spinning


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
    earlier: Run | None = None,
    on_start: Callable[[Run], None] = lambda run: None,
    on_case: Callable[[CaseResult], None] = lambda case: None,
    progress: Progress = lambda *_: None,
) -> Run:
    """Run workloads by name. Every finished case is handed to `on_case` at once.

    earlier: an interrupted run of this machine and commit; its finished cases are taken over and not measured again.

    After Ctrl-C the case in hand keeps its complete rounds, and the run ends with `interrupted`. Raises
    BadOption for an unknown workload, size or peer, for a number below its least, and for an earlier run of another
    machine or commit.
    """
    options.check()
    cases = planning.cases(names, options)
    found = peers.find(options.peers)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or before)
    start = time.monotonic()
    try:
        run, ceilings = _begin(found, options, earlier, progress)
        on_start(run)
        done = {case.identity for case in run.cases}
        try:
            for source, case in cases:
                if (case.workload, case.name, options.size_name) in done:
                    continue
                if options.minutes is not None and time.monotonic() - start > 60 * options.minutes:
                    run.left.append(f"{case.workload} {case.name}")
                    continue
                result = run_case(case, options, found, ceilings, progress, source=source)
                with _interrupts_held_back():
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


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Delivers Ctrl-C after the block: a case is written and printed whole."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


def _begin(
    found: Sequence[Peer], options: Options, earlier: Run | None, progress: Progress
) -> tuple[Run, Ceilings]:
    """The run to fill and the ceilings: measured, or those of the earlier run that is continued."""
    device = torch.device(options.device)
    here = environment.describe(device)
    if earlier is not None:
        for name in ("device", "threads", "torch", "commit"):
            if earlier.environment.get(name) != here[name]:
                raise BadOption(
                    f"a run can only be continued with the same {name}, {here[name]} here, got "
                    f"{earlier.environment.get(name)}"
                )
        kept = [case for case in earlier.cases if not case.interrupted]
        run = Run(earlier.environment, earlier.peers, earlier.ceilings, kept)
        return run, Ceilings.from_json(earlier.ceilings)
    progress("measuring the ceilings of this machine", 0, 0)
    ceilings = measure_ceilings(device, quick=options.size == "tiny")
    return Run(here, _versions(found), ceilings.to_json()), ceilings


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
    source: tuple[str, ...] = (),
) -> CaseResult:
    """Prepare, check and time every candidate of a case; measure its memory where that is asked for."""
    where = f"{case.workload} {case.name}"
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads or threads)
    try:
        return _run_case(case, options, found, ceilings, source, where, progress)
    finally:
        torch.set_num_threads(threads)


def _run_case(
    case: Case,
    options: Options,
    found: Sequence[Peer],
    ceilings: Ceilings,
    source: tuple[str, ...],
    where: str,
    progress: Progress,
) -> CaseResult:
    with torch.inference_mode():
        prepared = prepare(
            case,
            found,
            lambda what: progress(f"{where}: {what}", 0, 0),
            every_setting=options.every_setting,
        )
        used = {candidate.peer for candidate in prepared.candidates.values()}
        schedule = timing.Schedule(
            repeats=options.repeats,
            min_sample=MIN_SAMPLE[options.size],
            settle=SETTLE if used & OTHER_THREAD_POOLS else 0.0,
            budget=options.budget,
        )
        steps, done = len(prepared.candidates) * (schedule.repeats + 1), 0

        def planned(rounds: int) -> None:
            nonlocal steps
            steps = len(prepared.candidates) * (rounds + 1)

        def step(label: str) -> None:
            nonlocal done
            done += 1
            progress(f"{where}: timing {label}", done, steps)

        functions = {key: candidate.run for key, candidate in prepared.candidates.items()}
        samples = timing.interleave(
            functions,
            schedule,
            clock=timing.clock_of(case.device),
            progress=step,
            planned=planned,
        )
        _finish(case, prepared, samples, ceilings)
        if not samples.interrupted and case.device.type == "cpu":
            _profile(prepared)
    # A process for every point would take hours; resident bytes say nothing of a GPU.
    wanted = options.memory and source and not case.curve and case.device.type == "cpu"
    if wanted and memory.available() and not samples.interrupted:
        _measure_memory(case, prepared, source, lambda what: progress(f"{where}: {what}", 0, 0))
    return CaseResult(
        workload=case.workload,
        case=case.name,
        size=options.size_name,
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
        curve=case.curve,
        at=case.at,
        threads=case.threads,
    )


def prepare(
    case: Case,
    found: Sequence[Peer],
    progress: Callable[[str], None],
    *,
    every_setting: bool = True,
) -> Prepared:
    """Build and check every candidate: the eager one first, because its error is the measure of ctxfast's own.

    every_setting: the lesser settings of the peers, too.
    """
    progress("float64 truth")
    prepared = Prepared(case.truth())
    able = [peer for peer in found if peer.knows(case)]
    for peer in sorted(able, key=lambda p: p.name != peers.EAGER):
        failure = Result(case.workload, case.name, peer.name, peer.name, "", peer.version)
        if not peer.available:
            failure.status, failure.reason = "skipped", peer.reason
            prepared.results.append(failure)
            continue
        if not peer.runs_on(case.device.type):
            failure.status, failure.reason = "skipped", f"not measured on {case.device.type}"
            prepared.results.append(failure)
            continue
        progress(f"preparing {peer.name}")
        try:
            for candidate in peer.candidates(case, every_setting=every_setting):
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
    """Run a candidate and check it; what is wrong with it goes into its result."""
    if candidate.peer != peers.OWN:
        return _is_right_once(candidate, prepared)
    with checks.poisoned_memory():
        if not _is_right_once(candidate, prepared):
            return False
        with _dispatch.record() as verdicts:
            right = _is_right_once(candidate, prepared)
    result = prepared.result(candidate)
    for verdict in verdicts:
        ran = result.implementations.setdefault(verdict.operator, {})
        ran[verdict.ran] = ran.get(verdict.ran, 0) + 1
        if verdict.ran == "reference":
            refusals = (f"{name}: {reason}" for name, reason in verdict.refused)
            result.reasons[verdict.operator] = "; ".join(refusals)
    return right


def _is_right_once(candidate: Candidate, prepared: Prepared) -> bool:
    try:
        output = candidate.run()
    except Exception as error:  # a candidate that cannot run is a finding, not the end
        result = prepared.result(candidate)
        result.status, result.reason = "failed", _sentence(error)
        return False
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
        traffic = case.traffic(element)
        result.intensity = flop / traffic if traffic else None
        limit = (
            ceilings.limit_of_steps(result.dtype, case.steps, element)
            if case.steps and not result.part
            else ceilings.limit(result.dtype, flop, traffic)
        )
        # The ceilings are those of the run's threads.
        if limit is not None and case.threads is None:
            result.of_limit, result.limit = limit[0] / result.seconds.median, limit[1]


def _profile(prepared: Prepared) -> None:
    """Which operators the time of ctxfast's own candidates goes into, from one more pass."""
    for candidate in prepared.candidates.values():
        result = prepared.result(candidate)
        if candidate.peer == peers.OWN and result.seconds:
            result.profile = profiling.shares(candidate.run)


def _measure_memory(
    case: Case, prepared: Prepared, source: tuple[str, ...], progress: Callable[[str], None]
) -> None:
    for result in prepared.results:
        if result.seconds and not result.part:
            progress(f"memory of {result.key}")
            try:
                result.memory = memory.measure(case, source, result.peer, result.key)
            except Unavailable as error:
                result.reasons["memory"] = str(error)


def _sentence(error: Exception) -> str:
    """An error on one line."""
    text = " ".join(str(error).split())
    if isinstance(error, Unavailable):
        return text
    return f"{type(error).__name__}: {text}"[:300]
