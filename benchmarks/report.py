"""Results as text for the terminal: a table a case, the machine, and what the run says as a whole.

python -m ctxfast.benchmarks.report RESULTS.jsonl README.md     rewrites every block that the results have, and the
                                                                plots in them: RESULTS.svg, or with several
                                                                workloads RESULTS.WORKLOAD.svg
python -m ctxfast.benchmarks.report RESULTS.jsonl               prints the terminal tables
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import curves, peers
from .records import CaseResult, Result, Run, read
from .split import split_gain
from .timing import NOISY_FOREIGN, NOISY_SPREAD, Ratio
from .verdicts import behind, explanation, rivals
from .workloads import WORKLOADS

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int8": "int8", "tf32": "tf32"}


def seconds(value: float) -> str:
    """A time with three digits and a unit that fits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale or unit == "us":
            scaled = value / scale
            return f"{scaled:.{max(0, 2 - len(str(int(scaled))) + 1)}f} {unit}"
    raise AssertionError


def short(dtype: str) -> str:
    """fp32 for float32."""
    return SHORT.get(dtype, dtype)


def size(value: float) -> str:
    """Bytes with three digits: 1.21 GiB, 437 MiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            scaled = value / scale
            return f"{scaled:.{max(0, 3 - len(str(int(scaled))))}f} {unit}"
    return f"{value:.0f} B"


def ratio(value: Ratio | None) -> str:
    """2.31x [2.28, 2.35]; with one round there is no interval."""
    if value is None:
        return ""
    if value.high == float("inf"):
        return f"{value.value:.2f}x"
    if value.low == value.high == 1.0:
        return "1"
    return f"{value.value:.2f}x [{value.low:.2f}, {value.high:.2f}]"


def note(result: Result) -> str:
    """What a reader must know beside the figures."""
    notes = [result.detail] if result.detail else []
    if result.peer == "ctxfast" and result.implementations:
        fallbacks = result.fallbacks()
        notes.append(f"on the reference: {', '.join(fallbacks)}" if fallbacks else "native")
    if result.noisy:
        notes.append("noisy")
    return "; ".join(notes)


def implementations(result: Result) -> str:
    """linear: onednn 72, attention_varlen: native 12."""
    parts = []
    for operator, ran in sorted(result.implementations.items()):
        calls = " + ".join(f"{name} {count}" for name, count in sorted(ran.items()))
        reason = result.reasons.get(operator)
        parts.append(f"{operator}: {calls}" + (f" ({reason})" if reason else ""))
    return ", ".join(parts)


def headline(case: CaseResult) -> str | None:
    """What each of ctxfast's candidates gains, over the peer that is hardest to beat first.

    For BERT that is transformers at its best setting, then on one padded batch; elsewhere the fastest peer of the same
    type. None without a peer to compare with, or where an operator of ctxfast ran on the reference.
    """
    sentences = []
    for own in case.own():
        if own.native and own.seconds is not None:
            compared = _over_transformers(case, own) or _over_fastest(case, own)
            if compared:
                sentences.append(
                    f"ctxfast {short(own.dtype)} takes {seconds(own.seconds.median)}, {compared}"
                )
    return "; ".join(sentences) or None


def _over_transformers(case: CaseResult, own: Result) -> str | None:
    padded = case.find("transformers sdpa")
    buckets = case.find("transformers sdpa, length buckets")
    if padded is None or padded.seconds is None:
        return None
    in_one = ratio(padded.speedup[own.dtype])
    if buckets is None or buckets.seconds is None:
        return f"{in_one} as fast as transformers fp32"
    if buckets.seconds.median <= padded.seconds.median:
        best = ratio(buckets.speedup[own.dtype])
        return (
            f"{best} as fast as transformers fp32 given length-sorted buckets "
            f"({in_one} on one padded batch)"
        )
    return f"{in_one} as fast as transformers fp32 on one padded batch, its best setting"


def _over_fastest(case: CaseResult, own: Result) -> str | None:
    against = rivals(case, own)
    if not against or own.dtype not in against[0].speedup:
        return None
    text = f"{ratio(against[0].speedup[own.dtype])} as fast as {against[0].label}"
    eager = next((r for r in against if r.peer == peers.EAGER), None)
    if len(against) == 1 or eager is None:
        return text
    others = "" if eager is against[0] else f" ({ratio(eager.speedup[own.dtype])} as fast as eager)"
    return f"{text}, the fastest peer of this type{others}"


def beyond_unpadding(case: CaseResult) -> list[str]:
    """Gains over SDPA on the padded batch, and what of them the scores saved by unpadding do not explain."""
    saved = case.facts.get("scores_saved")
    lines = []
    for own in case.own():
        padded = case.find("SDPA", own.dtype)
        if not isinstance(saved, float) or own.seconds is None or padded is None:
            continue
        gain = padded.speedup.get(own.dtype)
        if gain is not None:
            limit = f", {own.of_limit:.0%} of the limit" if own.of_limit is not None else ""
            lines.append(
                f"ctxfast {short(own.dtype)}: {gain.value:.2f}x over padded SDPA / {saved:.2f}x fewer scores "
                f"= {gain.value / saved:.2f}x per score{limit}"
            )
    return lines


def cosine(result: Result) -> str:
    """0.99912 (0.99953): the least and the mean cosine to the truth; nothing for a type that has none."""
    error = result.error
    if error is None or error.cosine_min is None or error.cosine_mean is None:
        return ""
    return f"{error.cosine_min:.5f} ({error.cosine_mean:.5f})"


def angled(case: CaseResult) -> list[str]:
    """The head of the column of cosines, where a timed candidate has one."""
    return ["cosine: least (mean)"] if any(r.seconds and cosine(r) for r in case.results) else []


def _spread(result: Result) -> str:
    """8.59 ms (7.57-9.83): median, p20 and p80 in one unit."""
    assert result.seconds is not None
    median = seconds(result.seconds.median)
    number, unit = median.split()
    scale = {"s": 1.0, "ms": 1e-3, "us": 1e-6}[unit]
    digits = len(number.partition(".")[2])
    low, high = (
        f"{value / scale:.{digits}f}" for value in (result.seconds.p20, result.seconds.p80)
    )
    return f"{median} ({low}-{high})"


def columns(case: CaseResult) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a case's table, one a timed candidate."""
    own = [result.dtype for result in case.own()]
    header = ["", "type", "median (p20-p80)", f"{case.unit}/s"]
    header += [f"of ctxfast {short(dtype)}" for dtype in own]
    angles = angled(case)
    header += ["GFLOP/s", "of limit", "max error", *angles, ""]
    rows = []
    for result in case.results:
        if result.seconds is None:
            continue
        limit = f"{result.of_limit:.0%} {result.limit}" if result.of_limit is not None else ""
        rows.append(
            [
                result.label,
                short(result.dtype),
                _spread(result),
                "" if result.part else f"{case.items / result.seconds.median:,.1f}",
                *(ratio(result.speedup.get(dtype)) for dtype in own),
                _rate(result.gflops) if result.gflops else "",
                limit,
                f"{result.error.max:.1e}" if result.error else "",
                *(cosine(result) for _ in angles),
                note(result),
            ]
        )
    return header, rows


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _aligned(rows: Sequence[Sequence[str]], left: frozenset[int]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def terminal(case: CaseResult) -> str:
    """The table of one case, with what was refused or skipped, and the split of the gain."""
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in case.facts.items())
    lines = [f"{case.workload} {case.case} ({case.size}): {case.description}"]
    lines.append("  ".join(filter(None, (facts, f"{case.gflop:.3g} GFLOP, {case.repeats} rounds"))))
    header, rows = columns(case)
    if rows:
        lines += ["", *_aligned([header, *rows], frozenset({0, 1, len(header) - 1}))]
    for result in case.results:
        if result.status != "ok":
            name = result.key if result.dtype else result.label
            lines.append(f"{name}: {result.status}, {result.reason}")
    for result in case.own():
        if result.implementations:
            lines.append(f"{result.key} ran {implementations(result)}")
    lines += filter(None, [headline(case)])
    lines += beyond_unpadding(case)
    memory = [r for r in case.results if r.memory]
    if memory:
        rows = [["memory", "type", "peak", "held"]]
        for result in memory:
            assert result.memory is not None
            figures = (size(result.memory.peak), size(result.memory.held))
            rows.append([result.label, short(result.dtype), *figures])
        lines += ["", *_aligned(rows, frozenset({0, 1}))]
    split = split_gain(case)
    if split is not None:
        lines += ["", "where the gain comes from", *split.lines()]
    lines += warnings(case)
    return "\n".join(lines)


def warnings(case: CaseResult) -> list[str]:
    """What makes the figures of a case less than certain."""
    found = []
    if case.interrupted:
        found.append(f"interrupted: {case.repeats} complete rounds")
    if case.noisy and case.foreign is not None:
        found.append(
            f"noisy: other processes took {case.foreign:.0%} of the CPU (over {NOISY_FOREIGN:.0%})"
        )
    if any(result.noisy for result in case.results):
        found.append(f"noisy rows: (p80 - p20) / median over {NOISY_SPREAD:.0%}")
    return found


def summary(run: Run) -> list[str]:
    """What a run says as a whole: the exponents of its curves, where a peer is ahead, what was not measured."""
    lines = []
    found = list(curves.find(run))
    if found:
        rows = [["curve", "", "type", "time ~ axis ^"]]
        for curve in found:
            exponent = curve.exponent
            fitted = f"{exponent.value:.2f} [{exponent.low:.2f}, {exponent.high:.2f}]"
            rows.append([f"{curve.workload} {curve.axis}", curve.label, short(curve.dtype), fitted])
        lines += [*_aligned(rows, frozenset({0, 1, 2, 3})), ""]
    ahead = list(behind(run))
    for item in ahead:
        kind = "" if item.same_type else f" (ctxfast {short(item.own.dtype)})"
        lines.append(
            f"behind: {item.case.workload} {item.case.case}, {item.peer.label} {short(item.peer.dtype)} "
            f"takes {ratio(item.ratio)} our time{kind}: {explanation(item)}"
        )
    if run.left:
        lines.append(f"not measured for want of time: {', '.join(run.left)}")
    return lines


def environment(run: Run) -> str:
    """One paragraph: device, threads, versions, commit, ceilings."""
    about = run.environment
    libraries = ", ".join(f"{name} {version}" for name, version in about["libraries"].items())
    versions = ", ".join(f"{name} {version}" for name, version in run.peers.items())
    gemm = "; ".join(
        f"{short(dtype)} "
        + ", ".join(f"{path} {max(rates.values()):.0f}" for path, rates in paths.items())
        for dtype, paths in run.ceilings["gemm_gflops"].items()
    )
    reads = ", ".join(f"{size} {rate:.0f}" for size, rate in run.ceilings["read_gb_per_s"].items())
    return "\n".join(
        [
            f"{about['device']}, {about['threads']} threads of {about['cores']} cores, {' '.join(about['cpu_flags'])}",
            f"torch {about['torch']} ({libraries}), ctxfast {about['ctxfast']}"
            + (f" at {about['commit']}" if about["commit"] else ""),
            f"peers: {versions}",
            f"GEMM ceilings, GFLOP/s: {gemm}",
            f"memory reads, GB/s: {reads}",
        ]
    )


def listing() -> str:
    """The workloads, and the peers with their versions or the reason of their absence."""
    rows = [
        [f"  {w.name}", w.about, "only when named or with --full" if w.full else ""]
        for w in WORKLOADS.values()
    ]
    lines = ["workloads", *_aligned(rows, frozenset({0, 1, 2})), "", "peers"]
    default = peers.default_names()
    rows = [
        [
            f"  {peer.name}",
            peer.version if peer.available else f"not available: {peer.reason}",
            "" if peer.name in default else "only when named",
        ]
        for peer in peers.find(peers.names())
    ]
    return "\n".join(lines + _aligned(rows, frozenset({0, 1, 2})))


def main(arguments: Sequence[str]) -> int:
    """See the module's docstring."""
    if len(arguments) not in (1, 2):
        print(__doc__, file=sys.stderr)
        return 2
    from . import charts, page, readme  # they format with this module

    source = Path(arguments[0])
    run = read(source)
    if len(arguments) == 1:
        print("\n\n".join([environment(run), *(terminal(case) for case in run.cases)]))
        return 0
    target = Path(arguments[1])
    text = target.read_text(encoding="utf-8")
    measured = {case.workload for case in run.cases}
    for name in readme.marked(text):
        if name in measured:
            drawing, plot = charts.summary(run, name), None
            if drawing is not None:
                picture = source.with_suffix(".svg" if len(measured) == 1 else f".{name}.svg")
                page.replace_file(picture, drawing.render(standalone=True) + "\n")
                plot = Path(os.path.relpath(picture, target.parent)).as_posix()
            text = readme.update_markers(text, name, readme.markdown(run, name, plot))
    page.replace_file(target, text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
