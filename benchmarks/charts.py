"""The plots of a report: speed-up, scaling, roofline (Williams et al., 2009) and memory."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from . import curves
from .ceilings import Ceilings
from .curves import Curve
from .records import CaseResult, Result, Run
from .report import ratio, seconds, short, size
from .svg import WIDTH, Drawing, Scale, shortened, spread, text_width
from .timing import Ratio
from .verdicts import fastest_rival, rivals

_COLOURS = {
    **{
        "ctxfast": "own",
        "eager": "c0",
        "transformers": "c1",
        "onnxruntime": "c2",
        "openvino": "c3",
    },
    **{"ctranslate2": "c4", "torch.compile": "c5", "torch": "c6"},
}
_ROW, _LEFT = 31.0, 2.0


@dataclass(frozen=True)
class Plot:
    """name: unique, of a file; caption: what it shows, in a sentence; drawing."""

    name: str
    title: str
    caption: str
    drawing: Drawing


def colour(peer: str) -> str:
    """The class of a peer, the same in every plot."""
    return _COLOURS.get(peer, "c7")


def plots(run: Run) -> Iterator[Plot]:
    """Every plot that a run has figures for."""
    yield from overview(run)
    for case in run.cases:
        if not case.curve:
            yield from case_plots(case)
    yield from curve_plots(run)
    yield from rooflines(run)


def case_plots(case: CaseResult) -> Iterator[Plot]:
    """Speed-up over every peer, and memory where it was measured."""
    name = re.sub(r"[^\w.-]+", "-", f"{case.workload}-{case.case}")
    bars = speedups(case)
    if bars is not None:
        caption = f"{case.description}; times as fast as each candidate"
        yield Plot(f"speedup-{name}", "Speed-up", caption, bars)
    if any(result.memory for result in case.results):
        caption = f"{case.description}; solid, what stays after a pass; pale, the most during one"
        yield Plot(f"memory-{name}", "Memory", caption, memory(case))


def speedups(case: CaseResult) -> Drawing | None:
    """Bars from 1 to the right where ctxfast is faster, to the left where it is slower; whiskers: the interval."""
    own = {result.dtype: result for result in case.own() if result.seconds and not result.part}
    if not own:
        return None
    fastest = min(own.values(), key=lambda r: r.seconds.median if r.seconds else 0.0)
    rows = []
    for result in case.results:
        mine = own.get(result.dtype, fastest)
        value = result.speedup.get(mine.dtype)
        if result.peer != "ctxfast" and not result.part and value is not None:
            other = "" if result.dtype == mine.dtype else f" vs ctxfast {short(mine.dtype)}"
            rows.append((f"{_name(result)} {short(result.dtype)}{other}", value))
    return _ratio_bars(rows, f"{case.workload} {case.case}: speed-up of ctxfast") if rows else None


def overview(run: Run) -> Iterator[Plot]:
    """One plot of all cases: ctxfast over the fastest peer of the same type."""
    rows = []
    cases = [case for case in run.cases if not case.curve]
    per_workload = Counter(case.workload for case in cases)
    for case in cases:
        name = case.workload if per_workload[case.workload] == 1 else f"{case.workload} {case.case}"
        for own in case.own():
            best = fastest_rival(case, own)
            if best is not None:
                label = f"{name} {short(own.dtype)}, {_name(best)}"
                rows.append((label, best.speedup[own.dtype]))
    if rows:
        title = "ctxfast over the fastest peer"
        caption = (
            "Times as fast as the fastest candidate of any peer in the same type, which is named"
        )
        yield Plot("overview", title, caption, _ratio_bars(rows, title))


def summary(run: Run, workload: str) -> Drawing | None:
    """One plot of a workload: over every peer, or where it has several cases over the fastest peer of each."""
    cases = [case for case in run.cases if case.workload == workload]
    if len(cases) == 1:
        return speedups(cases[0])
    found = next(overview(dataclasses.replace(run, cases=cases)), None)
    return None if found is None else found.drawing


def _name(result: Result) -> str:
    return result.label.replace("length buckets", "buckets")


def _ratio_bars(rows: Sequence[tuple[str, Ratio]], title: str) -> Drawing:
    ends = [end for _, r in rows for end in (r.value, r.low, r.high) if 0.0 < end < 1e9]
    low, high = min([0.5, *ends]) / 1.1, max([2.0, *ends]) * 1.1
    drawing = Drawing(_ROW * len(rows) + 26.0, title)
    x = Scale(low, high, _LEFT, WIDTH - _LEFT)
    bottom = _ROW * len(rows) + 4.0
    _ratio_axis(drawing, x, bottom)
    for i, (label, value) in enumerate(rows):
        y, figures = _ROW * i, ratio(value)
        drawing.text(_LEFT, y + 14, shortened(label, WIDTH - text_width(figures) - 14), "halo")
        drawing.text(WIDTH - _LEFT, y + 14, figures, "strong halo", anchor="end")
        start, end = sorted((x(1.0), x(value.value)))
        drawing.box(start, y + 19, end - start, 8, "good" if value.value >= 1.0 else "bad")
        if value.high < 1e9:
            drawing.line(x(value.low), y + 23, x(value.high), y + 23, "whisker")
            for place in (value.low, value.high):
                drawing.line(x(place), y + 20, x(place), y + 26, "whisker")
    return drawing


def _ratio_axis(drawing: Drawing, x: Scale, bottom: float) -> None:
    values = [v for v in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000) if x.low <= v <= x.high]
    taken: list[tuple[float, float]] = []
    for value in sorted(values, key=lambda v: (v != 1, abs(math.log10(v)) % 1 != 0)):
        drawing.line(x(value), 0, x(value), bottom, "axis" if value == 1 else "grid")
        half = text_width(f"{value:g}x") / 2 + 3
        if all(x(value) + half < low or x(value) - half > high for low, high in taken):
            taken.append((x(value) - half, x(value) + half))
            _tick(drawing, x(value), bottom + 15, f"{value:g}x")


def _tick(drawing: Drawing, x: float, y: float, text: str) -> None:
    """A label under an axis, kept inside the drawing."""
    half = text_width(text) / 2
    drawing.text(min(max(x, half), drawing.width - half), y, text, "soft", anchor="middle")


def memory(case: CaseResult) -> Drawing:
    """A bar a candidate: what it holds, and beyond that the most during a pass."""
    rows = [result for result in case.results if result.memory]
    largest = max(r.memory.peak for r in rows if r.memory) or 1
    drawing = Drawing(_ROW * len(rows) + 4.0, f"{case.workload} {case.case}: memory")
    x = Scale(0.0, float(largest), _LEFT, WIDTH - _LEFT, log=False)
    for i, result in enumerate(rows):
        assert result.memory is not None
        y, kind = _ROW * i, colour(result.peer)
        held, peak = min(result.memory.held, result.memory.peak), result.memory.peak
        figures = f"{size(peak)}, holds {size(held)}"
        label = f"{_name(result)} {short(result.dtype)}"
        room = WIDTH - text_width(figures) - 16
        drawing.text(_LEFT, y + 14, shortened(label, room))
        drawing.text(WIDTH - _LEFT, y + 14, figures, "soft", anchor="end")
        drawing.box(_LEFT, y + 19, x(peak) - _LEFT, 8, f"{kind} pale")
        drawing.box(_LEFT, y + 19, x(held) - _LEFT, 8, f"{kind} solid")
    return drawing


def curve_plots(run: Run) -> Iterator[Plot]:
    """Time against each axis of each scaling workload, every candidate with its exponent."""
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves.find(run):
        groups.setdefault((curve.workload, curve.axis), []).append(curve)
    for (workload, axis), group in groups.items():
        caption = f"Median time, both axes logarithmic; behind each name the exponent of time ~ {axis} ^ e"
        yield Plot(
            f"curve-{workload}-{axis}",
            f"{workload}: time against {axis}",
            caption,
            curve_plot(group),
        )


def curve_plot(group: Sequence[Curve]) -> Drawing:
    """Lines with their names at the right end, the marks solid for ctxfast."""
    axis = group[0].axis
    height, left, top = 300.0, 52.0, 10.0
    names = [_curve_name(c) for c in group]
    room = min(240.0, max(map(text_width, names)) + 50)  # of a name and its exponent
    right = WIDTH - room - 8
    bottom = height - 40
    at = sorted({place for curve in group for place, _ in curve.points})
    times = [time for curve in group for _, time in curve.points]
    x = Scale(at[0], at[-1], left + 8, right - 8)
    y = Scale(min(times) / 1.15, max(times) * 1.15, bottom, top)
    drawing = Drawing(height, f"{group[0].workload}: time against {axis}")
    for value in y.ticks():
        drawing.line(left, y(value), right, y(value), "grid")
        drawing.text(left - 6, y(value) + 4, _tick_time(value), "soft", anchor="end")
    drawing.line(left, bottom, right, bottom, "axis")
    free = 0.0
    for place in at:
        text = f"{place:g}"
        if x(place) - text_width(text) / 2 >= free:
            drawing.line(x(place), bottom, x(place), bottom + 4, "axis")
            drawing.text(x(place), bottom + 17, text, "soft", anchor="middle")
            free = x(place) + text_width(text) / 2 + 4
    drawing.text((left + right) / 2, height - 5, axis, "soft", anchor="middle")
    seats = spread([y(c.points[-1][1]) for c in group], 15.0, top + 6, bottom)
    ordered = sorted(
        zip(group, names, seats, strict=True), key=lambda item: item[0].peer == "ctxfast"
    )
    for curve, name, seat in ordered:
        kind = colour(curve.peer)
        path = [(x(place), y(time)) for place, time in curve.points]
        dashed = " dashed" if curve.dtype != "float32" or "eager" in curve.label else ""
        drawing.trace(path, f"{kind} trace{dashed}")
        for (px, py), (place, time) in zip(path, curve.points, strict=True):
            mark = "solid" if curve.peer == "ctxfast" else "hollow"
            hint = f"{curve.label} {short(curve.dtype)}, {axis} {place:g}: {seconds(time)}"
            drawing.dot(px, py, 3.4, f"{kind} {mark}", hint)
        drawing.line(path[-1][0] + 4, path[-1][1], right + 4, seat, "grid")
        strong = " strong" if curve.peer == "ctxfast" else ""
        label = f"{shortened(name, room - 44)} ^{curve.exponent.value:.2f}"
        drawing.text(right + 8, seat + 4, label, f"{kind} tint{strong}")
    return drawing


def _curve_name(curve: Curve) -> str:
    name = curve.label.replace("length buckets", "buckets")
    return name if curve.dtype == "float32" else f"{name} {short(curve.dtype)}"


def _tick_time(value: float) -> str:
    number, unit = seconds(value).split()
    return f"{float(number):g} {unit}"


def rooflines(run: Run) -> Iterator[Plot]:
    """One plot a type: what ctxfast and the fastest peer reach, under the measured ceilings."""
    ceilings = Ceilings.from_json(run.ceilings)
    for dtype in ceilings.gemm:
        found = [
            (case, own, next(iter(rivals(case, own)), None))
            for case in run.cases
            if not case.curve
            for own in case.own()
            if own.dtype == dtype and own.gflops and own.intensity and not own.part
        ]
        if found and ceilings.bandwidth:
            caption = (
                "Arithmetic reached against the measured ceilings; filled ctxfast, "
                "hollow the fastest peer of the same type"
            )
            drawing = roofline(dtype, found, ceilings)
            yield Plot(f"roofline-{dtype}", f"Roofline {short(dtype)}", caption, drawing)


def roofline(
    dtype: str, found: Sequence[tuple[CaseResult, Result, Result | None]], ceilings: Ceilings
) -> Drawing:
    """GFLOP/s against FLOP a byte, both logarithmic."""
    peak = ceilings.best_gemm(dtype) or 1.0
    reads = {
        mib: ceilings.bandwidth[mib] for mib in (min(ceilings.bandwidth), max(ceilings.bandwidth))
    }
    workloads = list(dict.fromkeys(case.workload for case, _, _ in found))
    kinds = {name: f"c{(i + 1) % 8}" for i, name in enumerate(workloads)}
    per_row = 2
    legend = 18.0 * ((len(workloads) + per_row - 1) // per_row)
    left, top, right, bottom = 48.0, 22.0, WIDTH - 14.0, 300.0
    rates = [r.gflops for _, own, peer in found for r in (own, peer) if r is not None and r.gflops]
    reaches = [own.intensity for _, own, _ in found if own.intensity]
    x = Scale(
        min([0.25, *reaches]) / 1.5,
        max([4 * peak / min(reads.values()), *reaches]) * 1.5,
        left,
        right,
    )
    y = Scale(min([peak / 100, *rates]) / 1.5, max([peak, *rates]) * 1.6, bottom, top)
    drawing = Drawing(bottom + 44 + legend, f"Roofline, {dtype}")
    for value in x.ticks():
        drawing.line(x(value), top, x(value), bottom, "grid")
        _tick(drawing, x(value), bottom + 16, f"{value:g}")
    for value in y.ticks():
        drawing.line(left, y(value), right, y(value), "grid")
        drawing.text(left - 6, y(value) + 4, f"{value:g}", "soft", anchor="end")
    drawing.text(2, 12, "GFLOP/s", "soft")
    drawing.text((left + right) / 2, bottom + 33, "FLOP a byte", "soft", anchor="middle")
    for mib, rate in reads.items():
        knee = peak / rate
        first = max(x.low, y.low / rate)
        drawing.trace([(x(first), y(first * rate)), (x(knee), y(peak))], "roof")
        slope = (y(knee * rate) - y(first * rate)) / (x(knee) - x(first))
        turn = math.degrees(math.atan(slope))
        text = f"{mib} MiB: {rate:.0f} GB/s"
        middle = max((x(first) + x(knee)) / 2, left + text_width(text) / 2)
        height = y(first * rate) + slope * (middle - x(first)) - 5
        drawing.text(middle, height, text, "soft halo", anchor="middle", turn=turn)
    drawing.line(x(min(peak / rate for rate in reads.values())), y(peak), right, y(peak), "roof")
    drawing.text(right, y(peak) - 6, f"GEMM {peak:.0f} GFLOP/s", "soft halo", anchor="end")
    for case, own, peer in found:
        assert own.intensity is not None and own.gflops is not None
        place, kind = x(own.intensity), kinds[case.workload]
        about = f"{case.workload} {case.case}"
        if peer is not None and peer.gflops:
            drawing.line(place, y(own.gflops), place, y(peer.gflops), f"{kind} trace")
            drawing.dot(
                place,
                y(peer.gflops),
                4,
                f"{kind} hollow",
                f"{about}: {peer.label} {peer.gflops:.0f}",
            )
        drawing.dot(
            place, y(own.gflops), 4.5, f"{kind} solid", f"{about}: ctxfast {own.gflops:.0f}"
        )
    for i, name in enumerate(workloads):
        px, py = left + (i % per_row) * 210.0, bottom + 52 + 18.0 * (i // per_row)
        drawing.dot(px, py - 4, 4.5, f"{kinds[name]} solid")
        drawing.text(px + 10, py, shortened(name, 195.0))
    return drawing
