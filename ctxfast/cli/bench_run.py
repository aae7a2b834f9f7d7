"""What `ctxfast bench` does once its arguments are read: measure, report, compare."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from ctxfast.cli.errors import FAILURE

if TYPE_CHECKING:
    from ctxfast.benchmarks.records import CaseResult, Run
    from ctxfast.benchmarks.runner import Options


class Status:
    """What is being measured, on one line of stderr, where that is a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, text: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(bar_format="{desc}", leave=False, file=sys.stderr)
        self._bar.set_description_str(f"[{done}/{total}] {text}" if total else text)

    def clear(self) -> None:
        """Leave the line, so that a table can be printed."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@dataclass(frozen=True)
class Outputs:
    """Where results go: files, "-" for stdout (json, csv), a folder for plots; None for nowhere."""

    json: str | None = None
    resume: str | None = None
    csv: str | None = None
    html: str | None = None
    plots: str | None = None

    @property
    def quiet(self) -> bool:
        """Whether stdout belongs to records alone."""
        return "-" in (self.json, self.csv)

    def check(self) -> None:
        """Find what cannot be written before anything is measured."""
        if self.json is not None and self.resume is not None:
            raise typer.BadParameter("--json and --resume name the same records: give one of them")
        if self.html is not None:
            with Path(self.html).open("a", encoding="utf-8"):
                pass
        if self.plots is not None:
            Path(self.plots).mkdir(parents=True, exist_ok=True)

    def write_reports(self, run: Run) -> None:
        """The HTML report and the plots of what was measured."""
        from ctxfast.benchmarks import page

        if self.html is not None and run.cases:
            page.write(Path(self.html), run)
        if self.plots is not None:
            page.write_plots(Path(self.plots), run)


def measure(names: Sequence[str], options: Options, outputs: Outputs) -> None:
    """Measure workloads, printing and writing each case as it is done."""
    from ctxfast.benchmarks import planning, records, report, runner
    from ctxfast.benchmarks.sink import Sink

    status = Status()
    with contextlib.ExitStack() as files:
        outputs.check()
        sink = Sink(outputs.resume) if outputs.resume is not None else None
        earlier = sink.earlier() if sink is not None else None
        rows = _open(files, outputs.csv)
        lines = None if outputs.json is None else _open(files, outputs.json)

        started: list[Run] = []

        def on_start(run: Run) -> None:
            status.clear()
            started.append(run)
            if sink is not None:  # only now is it known that the file can be continued
                sink.start(run)
            elif lines is not None:
                records.write_header(lines, run)
            if not outputs.quiet:
                print(report.environment(run), flush=True)
                if run.cases:
                    print(f"\n{len(run.cases)} cases are taken from {outputs.resume}", flush=True)
                print(f"\n{planning.plan(names, options, run)}", flush=True)

        def on_case(case: CaseResult) -> None:
            status.clear()
            if sink is not None:
                sink.add(started[0], case)
            elif lines is not None:
                records.write_case(lines, case)
            if not outputs.quiet:
                print(f"\n{report.terminal(case)}", flush=True)

        with _usage_errors(runner.BadOption):
            try:
                run = runner.measure(
                    names,
                    options,
                    earlier=earlier,
                    on_start=on_start,
                    on_case=on_case,
                    progress=status,
                )
            finally:
                status.clear()
        if rows is not None:
            records.write_csv(rows, run)
    outputs.write_reports(run)
    if not outputs.quiet:
        print("".join(f"\n{line}" for line in report.summary(run)))
    _finish(run)


def report_file(path: str, outputs: Outputs) -> None:
    """Print and write the reports of records that are there."""
    from ctxfast.benchmarks import records, report

    run = records.read_all(Path(path))
    with contextlib.ExitStack() as files:
        outputs.check()
        rows = _open(files, outputs.csv)
        if rows is not None:
            records.write_csv(rows, run)
    outputs.write_reports(run)
    if not outputs.quiet:
        print("\n\n".join([report.environment(run), *map(report.terminal, run.cases)]))
        print("".join(f"\n{line}" for line in report.summary(run)))


def compare_runs(before: str, after: str, names: Sequence[str], options: Options) -> None:
    """Compare two files or commits and fail where the second is slower beyond noise."""
    from ctxfast.benchmarks import commits, comparison, runner

    status = Status()
    with _usage_errors(runner.BadOption):
        options.check()
        try:
            sides = commits.read_or_measure((before, after), names, options, progress=status)
        finally:
            status.clear()
    result = comparison.compare(*sides)
    print("\n".join(comparison.lines(result, before, after)))
    if result.failed:
        raise typer.Exit(FAILURE)


@contextlib.contextmanager
def _usage_errors(kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kind as error:
        raise typer.BadParameter(str(error)) from None


def _finish(run: Run) -> None:
    for wrong in run.wrong:
        print(f"ctxfast bench: {wrong}", file=sys.stderr)
    if run.interrupted:
        raise KeyboardInterrupt
    if run.wrong:
        raise typer.Exit(FAILURE)


def _open(files: contextlib.ExitStack, path: str | None) -> TextIO | None:
    """The file to write, opened before anything is measured; stdout for "-"."""
    if path is None or path == "-":
        return None if path is None else sys.stdout
    return files.enter_context(Path(path).open("w", encoding="utf-8"))
