"""`ctxfast bench`: speed and error against eager PyTorch and every installed peer."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from ctxfast.cli.errors import FAILURE, Debug


class _Status:
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


def bench(
    workloads: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WORKLOAD]...", help="By default all; see --list."),
    ] = None,
    size: Annotated[str, typer.Option(metavar="tiny|base", help="Of the problems.")] = "base",
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="For every peer. [torch's default]")
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N", help="Interleaved rounds.")] = 7,
    peers: Annotated[
        str | None,
        typer.Option(metavar="A,B,...|all", help="Who is measured. [all but the slow ones]"),
    ] = None,
    json: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write JSON lines, case by case; - is stdout."),
    ] = None,
    csv: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write one row a candidate; - is stdout.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List workloads and peers.")] = False,
    debug: Debug = False,
) -> None:
    """Measure speed and error against eager PyTorch and every installed peer.

    Every candidate is checked against a float64 result first: wrong numbers get no time. Ctrl-C
    keeps the complete rounds.
    """
    from ctxfast.benchmarks import records, report, runner
    from ctxfast.benchmarks import workloads as known

    if list_:
        print(report.listing())
        return
    names = list(dict.fromkeys(workloads or known.WORKLOADS))
    options = runner.Options(size, threads, repeats, _peers(peers))
    quiet = "-" in (json, csv)
    status = _Status()
    with contextlib.ExitStack() as files:
        lines = _open(files, json)
        rows = _open(files, csv)

        def on_start(run: records.Run) -> None:
            status.clear()
            if lines is not None:
                records.write_header(lines, run)
            if not quiet:
                print(report.environment(run), flush=True)

        def on_case(case: records.CaseResult) -> None:
            status.clear()
            if lines is not None:
                records.write_case(lines, case)
            if not quiet:
                print(f"\n{report.terminal(case)}", flush=True)

        try:
            run = runner.measure(
                names, options, on_start=on_start, on_case=on_case, progress=status
            )
        except runner.BadOption as error:
            raise typer.BadParameter(str(error)) from None
        finally:
            status.clear()
        if rows is not None:
            records.write_csv(rows, run)
    for wrong in run.wrong:
        print(f"ctxfast bench: {wrong}", file=sys.stderr)
    if run.interrupted:
        raise KeyboardInterrupt
    if run.wrong:
        raise typer.Exit(FAILURE)


def _peers(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    if text == "all":
        from ctxfast.benchmarks import peers

        return peers.names()
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _open(files: contextlib.ExitStack, path: str | None) -> TextIO | None:
    """The file to write, opened before anything is measured; stdout for "-"."""
    if path is None or path == "-":
        return None if path is None else sys.stdout
    return files.enter_context(Path(path).open("w", encoding="utf-8"))
