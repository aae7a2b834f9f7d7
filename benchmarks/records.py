"""What a run leaves: JSON lines with the run, its cases and its candidates, and CSV with one row a candidate."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from .checks import Deviation
from .timing import Ratio, Summary

SCHEMA = 1
STATUSES = ("ok", "refused", "failed", "skipped")


@dataclass
class Result:
    """One candidate on one case.

    status: "ok" (timed), "refused" (wrong numbers), "failed" (an error), "skipped" (cannot run here); reason says why.
    seconds: a pass over the whole case; samples: the same for each round.
    speedup: for each dtype of ctxfast's own, how many times as fast as this candidate it is.
    of_limit: the time at the measured ceilings divided by the median; limit: which ceiling.
    implementations: operator -> implementation -> calls, for ctxfast's own candidates; reasons: why an operator fell
    back to the reference.
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

    @property
    def key(self) -> str:
        return f"{self.label} · {self.dtype}"

    @property
    def native(self) -> bool:
        """Whether no operator fell back to the reference."""
        return bool(self.implementations) and not self.fallbacks()

    def fallbacks(self) -> list[str]:
        """The operators that ran on the reference."""
        return sorted(name for name, ran in self.implementations.items() if "reference" in ran)


@dataclass
class CaseResult:
    """A case and its results. foreign: share of CPU time that other processes took while it was timed."""

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
    """environment: device, versions, commit; peers: name -> version or reason of absence; ceilings as measured."""

    environment: dict[str, Any]
    peers: dict[str, str]
    ceilings: dict[str, Any]
    cases: list[CaseResult] = field(default_factory=list)
    interrupted: bool = False

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
    yield json.dumps({"record": "case", **head}, ensure_ascii=False)
    for result in results:
        yield json.dumps({"record": "result", **result}, ensure_ascii=False)


def write_case(stream: TextIO, case: CaseResult) -> None:
    """Append a case to JSON lines, so that an interrupted run keeps what is done."""
    for line in case_lines(case):
        stream.write(line + "\n")
    stream.flush()


def write_header(stream: TextIO, run: Run) -> None:
    """The first JSON line."""
    stream.write(json.dumps(run.header(), ensure_ascii=False) + "\n")
    stream.flush()


def read(path: Path) -> Run:
    """The run in a file of JSON lines; ValueError where it is not one."""
    run: Run | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            kind = entry.pop("record")
            if kind == "run":
                if entry.pop("schema") != SCHEMA:
                    raise ValueError("another schema")
                run = Run(**entry)
            elif kind == "case" and run is not None:
                run.cases.append(CaseResult(results=[], **entry))
            elif kind == "result" and run is not None and run.cases:
                run.cases[-1].results.append(_result(entry))
            else:
                raise ValueError(f"unexpected record {kind!r}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: line {number} is no benchmark record ({error})") from None
    if run is None:
        raise ValueError(f"{path}: holds no benchmark records")
    return run


def _result(entry: dict[str, Any]) -> Result:
    seconds, error = entry.pop("seconds"), entry.pop("error")
    speedup = {key: Ratio(**ratio) for key, ratio in entry.pop("speedup").items()}
    return Result(
        **entry,
        seconds=Summary(**seconds) if seconds else None,
        error=Deviation(**error) if error else None,
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
    ),
    *("gflops", "of_limit", "limit", "device", "threads", "torch", "ctxfast", "commit", "time"),
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
            }
