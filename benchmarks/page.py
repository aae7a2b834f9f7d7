"""The report as one HTML file that needs no network: style sheet and plots are inside, no script is."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from . import charts, report
from .records import CaseResult, Result, Run
from .report import ratio, seconds, short
from .svg import style
from .timing import CONFIDENCE, FEWEST, NOISY_FOREIGN, NOISY_SPREAD, reachable_confidence
from .verdicts import Behind, behind, explanation, fastest_rival, rivals
from .workloads import WORKLOADS


def write(path: Path, run: Run) -> None:
    """Replace the file by the report of a run."""
    replace_file(path, html(run))


def write_plots(folder: Path, run: Run) -> list[Path]:
    """Every plot of a run as an SVG file of its own; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    names: list[str] = []
    for plot in charts.plots(run):
        names.append(plot.name)
        same = names.count(plot.name)  # above 1 where two runs have one case
        files.append(folder / f"{plot.name}{f'.{same}' if same > 1 else ''}.svg")
        replace_file(files[-1], plot.drawing.render(standalone=True) + "\n")
    return files


def replace_file(path: Path, text: str) -> None:
    """Writes a file that is either the old one or the new one, whatever happens."""
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def html(run: Run) -> str:
    """The whole page."""
    about = run.environment
    sections = [
        ("summary", "In short", _summary(run)),
        ("behind", "Where we are slower", _behind(run)),
        *((name, name, _workload(run, name)) for name in _measured(run)),
        ("scaling", "Scaling", _figures(charts.curve_plots(run))),
        ("roofline", "Roofline", _roofline(run)),
        ("machine", "Machine and peers", _machine(run)),
        ("method", "Method", _method(run)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in sections)
    body = "".join(
        f'<section id="{key}"><h2>{escape(title)}</h2>{content}</section>'
        for key, title, content in sections
    )
    title = f"ctxfast benchmark, {about['device']}"
    sheet = style() + Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    commit = f", commit {about['commit']}" if about.get("commit") else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{sheet}</style></head><body>"
        f"<header><h1>ctxfast benchmark</h1><p>{escape(str(about['device']))}, {_count(about['threads'], 'thread')}</p>"
        f'<p class="soft small">{escape(str(about["time"]))}, ctxfast {escape(about["ctxfast"])}{escape(commit)}, '
        f"torch {escape(about['torch'])}</p><nav>{links}</nav></header>"
        f"<main>{body}</main></body></html>\n"
    )


def _measured(run: Run) -> list[str]:
    """The workloads whose cases are shown one by one: all but the points of curves."""
    return list(dict.fromkeys(case.workload for case in run.cases if not case.curve))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _items(texts: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{text}</li>' for text in texts)}</ul>" if texts else ""


@dataclass(frozen=True)
class _Row:
    """Cells of a table; own: whether it is ctxfast's; note: stands below the first cell."""

    cells: Sequence[str]
    own: bool = False
    note: str = ""


def _table(header: Sequence[str], rows: Sequence[_Row], numbers: range) -> str:
    """A table. numbers: the columns of figures, whose interval goes below them where there is room."""

    def kind(i: int) -> str:
        return ' class="number"' if i in numbers else ""

    def inside(row: _Row, i: int) -> str:
        text = row.cells[i]
        if i == 0 and row.note:
            return f'<span>{escape(text)}<span class="below">{escape(row.note)}</span></span>'
        split = re.fullmatch(r"(.+?) ([\[(].+[\])])", text) if i in numbers else None
        if split is None:
            return escape(text)
        figure, interval = map(escape, split.groups())
        return f'<span>{figure} <span class="below">{interval}</span></span>'

    head = "".join(f"<th{kind(i)}>{escape(name)}</th>" for i, name in enumerate(header))
    body = []
    for row in rows:
        cells = "".join(
            f'<td{kind(i)} data-label="{escape(name)}">{inside(row, i)}</td>'
            for i, name in enumerate(header)
        )
        body.append(('<tr class="own">' if row.own else "<tr>") + f"{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _figures(plots: Iterator[charts.Plot]) -> str:
    found = [
        f"<figure><figcaption><b>{escape(plot.title)}.</b> {escape(plot.caption)}.</figcaption>"
        f"{plot.drawing.render()}</figure>"
        for plot in plots
    ]
    return f'<div class="figures">{"".join(found)}</div>' if found else ""


def _summary(run: Run) -> str:
    refused = sum(r.status == "refused" for case in run.cases for r in case.results)
    timed = sum(bool(r.seconds) and not r.part for case in run.cases for r in case.results)
    noisy = sum(r.noisy for case in run.cases for r in case.results)
    text = (
        f"<p>{_count(len(run.cases), 'case')}, {_count(timed, 'candidate')} timed, {refused} refused for wrong "
        f"numbers, {noisy} marked noisy.</p>"
    )
    text += _models(run) + _figures(charts.overview(run))
    if run.left:
        text += (
            f'<p class="warning">Not measured for want of time: {escape(", ".join(run.left))}.</p>'
        )
    if run.wrong:
        text += f'<p class="warning">ctxfast refused or failed: {escape("; ".join(run.wrong))}.</p>'
    return text


def _models(run: Run) -> str:
    """How many times as fast as transformers, at its best setting and on one padded batch, every whole model is."""
    rows = []
    for case in run.cases:
        padded = case.find("transformers sdpa")
        buckets = case.find("transformers sdpa, length buckets")
        if case.curve or padded is None or padded.seconds is None:
            continue
        for own in case.own():
            if not own.native or own.seconds is None:
                continue
            sorted_too = buckets is not None and own.dtype in buckets.speedup
            rows.append(
                _Row(
                    [
                        case.description,
                        short(own.dtype),
                        seconds(own.seconds.median),
                        ratio(padded.speedup[own.dtype]),
                        ratio(buckets.speedup[own.dtype]) if buckets and sorted_too else "",
                        *_fastest(case, own),
                    ]
                )
            )
    header = ["ctxfast on", "type", "time", "over transformers fp32", "the same, length buckets"]
    header += ["over the fastest peer of the type", "which is"]
    return _table(header, rows, range(2, 6)) if rows else ""


def _fastest(case: CaseResult, own: Result) -> tuple[str, str]:
    """The ratio to the fastest peer in the type of a result, and its name."""
    best = fastest_rival(case, own)
    return (ratio(best.speedup[own.dtype]), best.label) if best else ("", "")


def _behind(run: Run) -> str:
    found = list(behind(run))
    on_curves = sum(bool(item.case.curve) and item.same_type for item in found)
    found = [item for item in found if not item.case.curve]
    same = [item for item in found if item.same_type]
    compared = sum(len(rivals(case, own)) for case in run.cases for own in case.own())
    if not found and not on_curves:
        return f"<p>None of {compared} comparisons with a peer in the same type shows the peer ahead.</p>"
    text = (
        f"<p>Of {compared} comparisons with a peer in the same type, {len(same) + on_curves} show the peer ahead with "
        f"the whole interval, {on_curves} of them at points of the scaling curves below. For each case the farthest "
        "ahead comes first, with how near both come to the limit of the machine and where our time goes (one "
        "profiled pass).</p>"
    )
    text += _items([escape(line) for line in _behind_on_curves(run)])
    if same:
        text += _behind_table(same)
    if len(found) > len(same):
        text += "<p>Ahead in a type that ctxfast does not offer there, at the error shown:</p>"
        text += _behind_table([item for item in found if not item.same_type])
    return text


def _behind_on_curves(run: Run) -> list[str]:
    """The places on scaling curves where a peer of the same type is ahead: a line a curve and peer."""
    places: dict[tuple[str, ...], list[str]] = {}
    for item in behind(run):
        if item.case.curve and item.same_type:
            peer = f"{item.peer.label} {short(item.peer.dtype)}"
            key = (item.case.workload, item.case.curve, peer)
            places.setdefault(key, []).append(f"{item.case.at:g} ({item.ratio.value:.2f}x)")
    return [
        f"{workload}, {axis} {', '.join(found)}: {peer}"
        for (workload, axis, peer), found in places.items()
    ]


def _behind_table(found: Sequence[Behind]) -> str:
    header = [
        "case",
        "peer",
        "its time of ours",
        "its error",
        "our error",
        "why",
    ]
    rows = []
    farthest: dict[tuple[str, ...], list[Behind]] = {}
    for item in found:
        farthest.setdefault((*item.case.identity, item.own.key), []).append(item)
    for group in farthest.values():
        item = group[0]
        own, peer = item.own, item.peer
        others = ", ".join(
            f"{other.peer.label} {short(other.peer.dtype)} {other.ratio.value:.2f}x"
            for other in group[1:]
        )
        rows.append(
            _Row(
                [
                    f"{item.case.workload} {item.case.case}",
                    f"{peer.label} {short(peer.dtype)}" + (f"; also {others}" if others else ""),
                    ratio(item.ratio),
                    f"{peer.error.max:.0e}" if peer.error else "",
                    f"{own.error.max:.0e} ({short(own.dtype)})" if own.error else "",
                    explanation(item),
                ]
            )
        )
    return _table(header, rows, range(2, 5))


def _workload(run: Run, name: str) -> str:
    about = WORKLOADS[name].about if name in WORKLOADS else "a model and a text of the user's"
    text = f'<p class="soft">{escape(about[0].upper() + about[1:])}.</p>'
    cases = [case for case in run.cases if case.workload == name and not case.curve]
    text += _figures(plot for case in cases for plot in charts.case_plots(case))
    return text + "".join(map(_case, cases))


def _case(case: CaseResult) -> str:
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in case.facts.items())
    details = ", ".join(
        filter(None, [case.case, facts, f"{case.gflop:.3g} GFLOP, {case.repeats} rounds"])
    )
    text = f"<h3>{escape(case.description)}</h3><p class='soft small'>{escape(details)}</p>"
    claim = report.headline(case)
    if claim:
        text += f"<p>{escape(claim)}.</p>"
    text += "".join(f'<p class="warning small">{escape(w)}.</p>' for w in report.warnings(case))
    header, rows = report.columns(case)
    own = {result.key for result in case.own()}
    timed = [result.key in own for result in case.results if result.seconds]
    if rows:
        cells = [_Row(row[:-1], mine, row[-1]) for mine, row in zip(timed, rows, strict=True)]
        text += _table(["candidate", *header[1:-1]], cells, range(2, len(header)))
    absent = [
        f"{escape(r.key if r.dtype else r.label)}: {r.status}, {escape(r.reason)}"
        for r in case.results
        if r.status != "ok"
    ]
    ran = [
        f"{escape(r.key)} ran {escape(report.implementations(r))}"
        for r in case.own()
        if r.implementations
    ]
    if absent:
        text += f'<p class="small">Without a time:</p><div class="small">{_items(absent)}</div>'
    if ran:
        summary = "<summary>Which implementations ran</summary>"
        text += f'<details class="small">{summary}{_items(ran)}</details>'
    split = report.split_gain(case)
    if split is not None:
        text += (
            f"<p>Of the {split.padded / split.own:.2f}x over one padded batch, {split.padding_factor:.2f}x is padding "
            f"that length buckets remove too, {split.gemm_factor:.2f}x is torch's default GEMM against oneDNN's on the "
            f"same tokens, and {split.rest_factor:.2f}x is the rest.</p>"
        )
    return text


def _roofline(run: Run) -> str:
    return _figures(charts.rooflines(run))


def _machine(run: Run) -> str:
    about = run.environment
    libraries = ", ".join(f"{name} {version}" for name, version in about["libraries"].items())
    settings = " ".join(f"{name}={value}" for name, value in about.get("settings", {}).items())
    gemm = "; ".join(
        f"{short(dtype)} "
        + ", ".join(f"{path} {max(rates.values()):.0f}" for path, rates in paths.items())
        for dtype, paths in run.ceilings["gemm_gflops"].items()
    )
    reads = ", ".join(f"{mib} {rate:.0f}" for mib, rate in run.ceilings["read_gb_per_s"].items())
    entries = {
        "processor": about["device"],
        "threads": f"{about['threads']} of {about['cores']} cores",
        "instructions": " ".join(about["cpu_flags"]),
        "memory": f"{about['memory_gib']} GiB" if about.get("memory_gib") else "",
        "system": about.get("system", ""),
        "Python": about.get("python", ""),
        "torch": f"{about['torch']} ({libraries})",
        "ctxfast": " at ".join(filter(None, [about["ctxfast"], about.get("commit")])),
        "settings": settings,
        "GEMM, GFLOP/s": gemm,
        "reads, GB/s": reads,
    }
    text = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
        for name, value in entries.items()
        if value
    )
    rows = [_Row([name, version], name == "ctxfast") for name, version in run.peers.items()]
    peers = _table(["peer", "version, or why it is absent"], rows, range(0))
    return f"<dl>{text}</dl><h3>Peers</h3>{peers}"


def _method(run: Run) -> str:
    return _items(
        [
            "Every candidate is first checked against a float64 result; memory that nobody wrote is NaN during the "
            "check. Wrong numbers get no time, and the last timed output is checked again. ctxfast's error may be at "
            "most twice that of eager PyTorch in the same type; for int8 and TF32, of eager PyTorch with emulated "
            "products. Beside its largest error stand the least and the mean cosine of a token to its exact vector.",
            "All candidates have the same threads. After a warm-up they are timed in interleaved rounds (A B C, A B C, "
            f"...), at least {FEWEST}; figures are medians with 20th and 80th percentile.",
            "Ratios carry bootstrap intervals over whole rounds, so that a drift of the machine cancels; their "
            f"confidence is {CONFIDENCE:.0%} where there are rounds enough, {reachable_confidence(FEWEST):.0%} "
            f"with {FEWEST}.",
            f"A row is marked noisy where (p80 - p20) / median exceeds {NOISY_SPREAD:.0%}, a case where other "
            f"processes took more than {NOISY_FOREIGN:.0%} of the processor.",
            "The ceilings are measured in the same run: the best matrix product by type, and reads from cache and "
            "memory. “Of limit” is the time at the ceiling that binds, divided by the median.",
            "Memory is the growth of resident bytes in a fresh process that prepares one candidate alone, after its "
            "library has run a tiny case.",
            "Peers that pad get one padded batch and length-sorted buckets, whose number is tuned for them.",
        ]
    )
