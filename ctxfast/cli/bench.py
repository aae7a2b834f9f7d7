"""`ctxfast bench`: speed, memory and error against eager PyTorch and every installed peer."""

from __future__ import annotations

from typing import Annotated

import typer

from ctxfast.cli.errors import Debug


def bench(
    workloads: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WORKLOAD]...", help="By default all but the long ones."),
    ] = None,
    size: Annotated[str, typer.Option(metavar="tiny|base|large", help="Of the problems.")] = "base",
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where everything runs.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="For every peer. [torch's default]")
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N", help="Interleaved rounds.")] = 7,
    budget: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Of timing a case: fewer rounds, at least 3."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(metavar="N", help="After which no further case begins.")
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...|all",
            help="Who is measured, in every setting. [all but the slow ones, at their best]",
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Long workloads, slow peers, their lesser settings and memory too."
        ),
    ] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Peak memory, each candidate in a process of its own.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(metavar="DIR", help="Measure this BERT directory on --input.")
    ] = None,
    input: Annotated[
        str | None, typer.Option(metavar="FILE", help="UTF-8 text, one sentence a line.")
    ] = None,
    lines: Annotated[int, typer.Option(metavar="N", help="Lines of --input to use.")] = 256,
    json: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write JSON lines, case by case; - is stdout."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DIR/",
            help="As --json, but cases that it has are not repeated. In DIR/ a file a workload.",
        ),
    ] = None,
    csv: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write one row a candidate; - is stdout.")
    ] = None,
    html: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a report that needs no network.")
    ] = None,
    plots: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write the report's plots as SVG files.")
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="FILE|DIR", help="Measure nothing: report these JSON lines."
        ),
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="A B",
            help="JSON lines or git commits: fail where B is slower beyond noise.",
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List workloads and peers.")] = False,
    debug: Debug = False,
) -> None:
    """Measure speed, memory and error against eager PyTorch and every installed peer.

    Every candidate is checked against a float64 result first: wrong numbers get no time. Ctrl-C
    keeps the complete rounds.
    """
    from ctxfast.benchmarks import report
    from ctxfast.cli.bench_run import Outputs, compare_runs, measure, report_file

    if list_:
        print(report.listing())
        return
    outputs = Outputs(json, resume, csv, html, plots)
    if from_ is not None:
        report_file(from_, outputs)
        return
    from ctxfast.benchmarks import peers as known_peers
    from ctxfast.benchmarks import workloads as known
    from ctxfast.benchmarks.runner import Options
    from ctxfast.benchmarks.user_model import UserModel

    if (model is None) != (input is None):
        raise typer.BadParameter("--model and --input must be given together")
    if model is not None and workloads:
        raise typer.BadParameter(
            f"WORKLOAD must not be given with --model, which is one by itself, got {workloads[0]!r}"
        )
    chosen = None
    if peers == "all" or (full and peers is None):
        chosen = known_peers.names()
    elif peers is not None:
        chosen = tuple(name.strip() for name in peers.split(",") if name.strip())
    options = Options(
        size=size,
        device=device,
        threads=threads,
        repeats=repeats,
        peers=chosen,
        budget=budget,
        minutes=minutes,
        memory=memory or full,
        model=None if model is None or input is None else UserModel.at(model, input, lines),
    )
    names = list(dict.fromkeys(workloads or known.names(size, full=full, device=device)))
    if compare is not None:
        compare_runs(*compare, names, options)
    else:
        measure(names, options, outputs)
