"""What a run leaves: JSON lines with the run, its cases and its candidates, and CSV with one row a candidate."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from .checks import Deviation
from .timing import Ratio, Summary

SCHEMA = 1
STATUSES = ("ok", "refused", "failed", "skipped")


@dataclass(frozen=True)
class Memory:
    """Bytes that a candidate adds to a process: what stays after a pass (weights), and the most during one."""

    held: int
    peak: int


@dataclass
class Result:
    """One candidate on one case.

    status: "ok" (timed), "refused" (wrong numbers), "failed" (an error), "skipped" (cannot run here); reason says why.
    seconds: a pass over the whole case; samples: the same for each round.
    speedup: for each dtype of ctxfast's own, how many times as fast as this candidate it is.
    of_limit: the time at the measured ceilings divided by the median; limit: which ceiling.
    implementations: operator -> implementation -> calls, for ctxfast's own candidates; reasons: why an operator fell
    back to the reference.
    intensity: FLOP a byte of the traffic that cannot be avoided; memory: as measured in a process of its own, or None.
    profile: operator -> share of a pass, largest first, for ctxfast's own candidates.
    """

    workload: str
    case: str
    peer: str
    label: str
    dtype: str
    version: str = ""
    layout: str = ""
    detail: str = ""
    part: bool = False
    status: str = "ok"
    reason: str = ""
    seconds: Summary | None = None
    samples: list[float] = field(default_factory=list)
    noisy: bool = False
    error: Deviation | None = None
    gflops: float | None = None
    of_limit: float | None = None
    limit: str = ""
    speedup: dict[str, Ratio] = field(default_factory=dict)
    implementations: dict[str, dict[str, int]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    intensity: float | None = None
    memory: Memory | None = None
    profile: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.label} · {self.dtype}"

    @property
    def ours(self) -> bool:
        """Whether it is ctxfast, in whatever form: then it is no peer to be compared with."""
        return self.peer.split(".")[0] == "ctxfast"

    @property
    def native(self) -> bool:
        """Whether no operator fell back to the reference."""
        return bool(self.implementations) and not self.fallbacks()

    def fallbacks(self) -> list[str]:
        """The operators that ran on the reference."""
        return sorted(name for name, ran in self.implementations.items() if "reference" in ran)


@dataclass
class CaseResult:
    """A case and its results. foreign: share of CPU time that other processes took while it was timed.

    curve, at, threads: as in `Case`.
    """

    workload: str
    case: str
    size: str
    description: str
    items: int
    unit: str
    gflop: float
    facts: dict[str, float | int | str]
    results: list[Result]
    repeats: int = 0
    foreign: float | None = None
    noisy: bool = False
    interrupted: bool = False
    curve: str = ""
    at: float = 0.0
    threads: int | None = None

    @property
    def identity(self) -> tuple[str, str, str]:
        """What a case is known by in another run: workload, case and size."""
        return self.workload, self.case, self.size

    def find(self, label: str, dtype: str = "float32") -> Result | None:
        """The timed result of a candidate."""
        for result in self.results:
            if (result.label, result.dtype, result.status) == (label, dtype, "ok"):
                return result if result.seconds else None
        return None

    def own(self) -> list[Result]:
        """The timed results of ctxfast."""
        return [r for r in self.results if r.peer == "ctxfast" and r.seconds]


@dataclass
class Run:
    """environment: device, versions, commit; peers: name -> version or reason of absence; ceilings as measured.

    left: the cases for which the time did not suffice.
    """

    environment: dict[str, Any]
    peers: dict[str, str]
    ceilings: dict[str, Any]
    cases: list[CaseResult] = field(default_factory=list)
    interrupted: bool = False
    left: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        """ctxfast's own candidates that were refused for wrong numbers or failed."""
        return [
            f"{result.workload} {result.case}, {result.key}: {result.reason}"
            for case in self.cases
            for result in case.results
            if result.peer == "ctxfast" and result.status in ("refused", "failed")
        ]

    def header(self) -> dict[str, Any]:
        return {
            "record": "run",
            "schema": SCHEMA,
            "environment": self.environment,
            "peers": self.peers,
            "ceilings": self.ceilings,
        }


def case_lines(case: CaseResult) -> Iterator[str]:
    """The JSON lines of a case."""
    head = asdict(case)
    results = head.pop("results")
    yield json.dumps({"record": "case", **head, "candidates": len(results)}, ensure_ascii=False)
    for result in results:
        yield json.dumps({"record": "result", **result}, ensure_ascii=False)


def write_case(stream: TextIO, case: CaseResult) -> None:
    """Append a case to JSON lines, so that an interrupted run keeps what is done."""
    stream.write("".join(f"{line}\n" for line in case_lines(case)))
    stream.flush()


def write_header(stream: TextIO, run: Run) -> None:
    """The first JSON line."""
    stream.write(json.dumps(run.header(), ensure_ascii=False) + "\n")
    stream.flush()


def rewrite(path: Path, run: Run) -> None:
    """Replace the file by a whole run: what a killed run left half written is gone, and more can be appended."""
    unfinished = path.with_name(f".{path.name}.part")
    with unfinished.open("w", encoding="utf-8") as stream:
        write_header(stream, run)
        for case in run.cases:
            write_case(stream, case)
    unfinished.replace(path)


def read(path: Path) -> Run:
    """The run in a file of JSON lines; ValueError where it is not one.

    A last case that a killed run left half written is left out.
    """
    run: Run | None = None
    expected = 0  # results of the case in hand
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            entry = json.loads(line)
            kind = entry.pop("record")
            if kind == "run":
                if entry.pop("schema") != SCHEMA:
                    raise ValueError("another schema")
                run = Run(**entry)
            elif kind == "case" and run is not None:
                expected = entry.pop("candidates", 0)
                run.cases.append(CaseResult(results=[], **entry))
            elif kind == "result" and run is not None and run.cases:
                run.cases[-1].results.append(_result(entry))
            else:
                raise ValueError(f"unexpected record {kind!r}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: line {number} is no benchmark record ({error})") from None
    if run is None:
        raise ValueError(f"{path}: holds no benchmark records")
    if run.cases and len(run.cases[-1].results) < expected:
        run.cases.pop()
    return run


def merge(runs: Sequence[Run]) -> Run:
    """Several runs of one machine as one; where their commits differ, all are named. The ceilings are the first run's.

    Raises ValueError for no run, and for another device, number of threads or torch.
    """
    if not runs:
        raise ValueError("merge: runs must hold at least one run, got none")
    first = runs[0]
    for name in ("device", "threads", "torch"):
        found = list(dict.fromkeys(run.environment.get(name) for run in runs))
        if len(found) > 1:
            raise ValueError(f"merge: runs must have one {name}, got {found[0]} and {found[1]}")
    cases = [case for run in runs for case in run.cases]
    commits = dict.fromkeys(filter(None, (run.environment.get("commit") for run in runs)))
    times = sorted({run.environment["time"] for run in runs})
    joined = {
        "commit": ", ".join(commits) or None,
        "time": " to ".join(dict.fromkeys(times[:: len(times) - 1 or 1])),
    }
    peers = {name: version for run in reversed(runs) for name, version in run.peers.items()}
    return Run(
        first.environment | joined,
        peers,
        first.ceilings,
        cases,
        any(run.interrupted for run in runs),
        [name for run in runs for name in run.left],
    )


def read_all(path: Path) -> Run:
    """The run in a file, or the runs in all files of a folder as one."""
    if not path.is_dir():
        return read(path)
    files = sorted(path.glob("*.jsonl"))
    if not files:
        raise ValueError(f"{path}: holds no file of benchmark records, *.jsonl")
    return merge([read(file) for file in files])


def _result(entry: dict[str, Any]) -> Result:
    seconds, error, memory = entry.pop("seconds"), entry.pop("error"), entry.pop("memory", None)
    speedup = {key: Ratio(**ratio) for key, ratio in entry.pop("speedup").items()}
    return Result(
        **entry,
        seconds=Summary(**seconds) if seconds else None,
        error=Deviation(**error) if error else None,
        memory=Memory(**memory) if memory else None,
        speedup=speedup,
    )


CSV_COLUMNS = (
    *("workload", "case", "size", "peer", "label", "dtype", "version", "layout", "detail"),
    *(
        "status",
        "reason",
        "p50",
        "p20",
        "p80",
        "unit",
        "repeats",
        "noisy",
        "max_error",
        "rms_error",
        "cosine_min",
        "cosine_mean",
    ),
    *("gflops", "of_limit", "limit", "intensity", "held_bytes", "peak_bytes"),
    *("device", "threads", "torch", "ctxfast", "commit", "time"),
)


def write_csv(stream: TextIO, run: Run) -> None:
    """One row a candidate, each with device, versions and commit."""
    writer = csv.DictWriter(stream, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_csv_rows(run))


def _csv_rows(run: Run) -> Iterable[dict[str, Any]]:
    shared = {
        name: run.environment.get(name)
        for name in ("device", "threads", "torch", "ctxfast", "commit", "time")
    }
    for case in run.cases:
        for result in case.results:
            own = {name: getattr(result, name) for name in CSV_COLUMNS if hasattr(result, name)}
            seconds, error = result.seconds, result.error
            yield {
                **own,
                **shared,
                "size": case.size,
                "repeats": case.repeats,
                "unit": "s",
                "p50": seconds.median if seconds else None,
                "p20": seconds.p20 if seconds else None,
                "p80": seconds.p80 if seconds else None,
                "max_error": error.max if error else None,
                "rms_error": error.rms if error else None,
                "cosine_min": error.cosine_min if error else None,
                "cosine_mean": error.cosine_mean if error else None,
                "held_bytes": result.memory.held if result.memory else None,
                "peak_bytes": result.memory.peak if result.memory else None,
                "threads": case.threads or shared["threads"],
            }
