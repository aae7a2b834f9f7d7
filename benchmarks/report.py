"""Results as text: a table for the terminal, one in Markdown, and README's block between its markers.

python -m ctxfast.benchmarks.report RESULTS.jsonl README.md     rewrites every block that the results have
python -m ctxfast.benchmarks.report RESULTS.jsonl               prints the terminal tables
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from . import peers
from .records import CaseResult, Result, Run, read
from .split import split_gain
from .timing import NOISY_FOREIGN, NOISY_SPREAD, Ratio
from .workloads import WORKLOADS

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int8": "int8"}


def seconds(value: float) -> str:
    """A time with three digits and a unit that fits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale or unit == "us":
            scaled = value / scale
            return f"{scaled:.{max(0, 2 - len(str(int(scaled))) + 1)}f} {unit}"
    raise AssertionError


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
    """The ratio to transformers at its best setting first, then on one padded batch.

    None without both figures, or where an operator of ctxfast ran on the reference.
    """
    padded = case.find("transformers sdpa")
    buckets = case.find("transformers sdpa, length buckets")
    if padded is None or padded.seconds is None:
        return None
    sentences = []
    for own in case.own():
        if not own.native or own.seconds is None:
            continue
        text = f"ctxfast {SHORT[own.dtype]} takes {seconds(own.seconds.median)}, "
        in_one = f"{ratio(padded.speedup[own.dtype])} as fast as transformers fp32"
        if buckets is None or buckets.seconds is None:
            text += in_one
        elif buckets.seconds.median <= padded.seconds.median:
            text += f"{ratio(buckets.speedup[own.dtype])} as fast as transformers fp32 given "
            text += (
                f"length-sorted buckets ({ratio(padded.speedup[own.dtype])} on one padded batch)"
            )
        else:
            text += f"{in_one} on one padded batch, its best setting"
        sentences.append(text)
    return "; ".join(sentences) or None


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


def _columns(case: CaseResult) -> tuple[list[str], list[list[str]]]:
    own = [result.dtype for result in case.own()]
    header = ["", "type", "median (p20-p80)", f"{case.unit}/s"]
    header += [f"of ctxfast {SHORT[dtype]}" for dtype in own]
    header += ["GFLOP/s", "of limit", "max error", ""]
    rows = []
    for result in case.results:
        if result.seconds is None:
            continue
        limit = f"{result.of_limit:.0%} {result.limit}" if result.of_limit is not None else ""
        rows.append(
            [
                result.label,
                SHORT.get(result.dtype, result.dtype),
                _spread(result),
                "" if result.part else f"{case.items / result.seconds.median:,.1f}",
                *(ratio(result.speedup.get(dtype)) for dtype in own),
                f"{result.gflops:,.0f}" if result.gflops else "",
                limit,
                f"{result.error.max:.1e}" if result.error else "",
                note(result),
            ]
        )
    return header, rows


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
    header, rows = _columns(case)
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


def environment(run: Run) -> str:
    """One paragraph: device, threads, versions, commit, ceilings."""
    about = run.environment
    libraries = ", ".join(f"{name} {version}" for name, version in about["libraries"].items())
    versions = ", ".join(f"{name} {version}" for name, version in run.peers.items())
    gemm = "; ".join(
        f"{SHORT[dtype]} "
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
    rows = [[f"  {workload.name}", workload.about] for workload in WORKLOADS.values()]
    lines = ["workloads", *_aligned(rows, frozenset({0, 1})), "", "peers"]
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


def markdown(run: Run, workload: str) -> str:
    """README's table of a workload: each case, its candidates, the split, and the machine."""
    about = run.environment
    blocks = []
    for case in (case for case in run.cases if case.workload == workload):
        own = [result.dtype for result in case.own()]
        header = ["", "type", "time", *(f"of ctxfast {SHORT[d]}" for d in own), "max error"]
        lines = [f"{case.description[0].upper()}{case.description[1:]}.", ""]
        claim = headline(case)
        if claim:
            lines = [f"{lines[0]} {claim[0].upper()}{claim[1:]}.", ""]
        lines += [f"| {' | '.join(header)} |", f"|---|---|{'--:|' * (len(header) - 2)}"]
        for result in case.results:
            if result.seconds is None or result.part:
                continue
            extra = f" ({note(result)})" if note(result) else ""
            cells = [f"{result.label}{extra}", SHORT.get(result.dtype, result.dtype)]
            cells.append(seconds(result.seconds.median))
            cells += [ratio(result.speedup.get(dtype)) for dtype in own]
            cells.append(f"{result.error.max:.0e}" if result.error else "")
            lines.append(f"| {' | '.join(cells)} |")
        split = split_gain(case)
        if split is not None:
            total = split.padded / split.own
            lines += [
                "",
                f"Of the {total:.2f}x over one padded batch, {split.padding_factor:.2f}x is padding that "
                f"length buckets remove too, {split.gemm_factor:.2f}x is torch's default GEMM against oneDNN's "
                f"on the same tokens, and {split.rest_factor:.2f}x is the rest.",
            ]
        lines += ["", *(f"{warning[0].upper()}{warning[1:]}." for warning in warnings(case))]
        blocks.append("\n".join(lines).rstrip())
    blocks.append(
        f"Median of {max((c.repeats for c in run.cases if c.workload == workload), default=0)} interleaved rounds with "
        f"95 % bootstrap intervals; {about['device']}, {about['threads']} threads, torch {about['torch']}"
        + (f", commit {about['commit']}" if about["commit"] else "")
        + f"; `ctxfast bench {workload}`."
    )
    return "\n\n".join(blocks)


def update_markers(text: str, name: str, block: str) -> str:
    """`text` with what stands between `<!-- benchmark:NAME -->` and `<!-- /benchmark:NAME -->` replaced by `block`.

    Raises ValueError unless there is exactly one such pair.
    """
    opening, closing = f"<!-- benchmark:{name} -->", f"<!-- /benchmark:{name} -->"
    if (
        text.count(opening) != 1
        or text.count(closing) != 1
        or text.index(opening) > text.index(closing)
    ):
        raise ValueError(f"report: text must hold one {opening} before one {closing}")
    head, rest = text.split(opening)
    return f"{head}{opening}\n{block.strip()}\n{closing}{rest.split(closing)[1]}"


def marked(text: str) -> list[str]:
    """The names of the blocks in a text."""
    return re.findall(r"<!-- benchmark:([\w-]+) -->", text)


def main(arguments: Sequence[str]) -> int:
    """See the module's docstring."""
    if len(arguments) not in (1, 2):
        print(__doc__, file=sys.stderr)
        return 2
    run = read(Path(arguments[0]))
    if len(arguments) == 1:
        print("\n\n".join([environment(run), *(terminal(case) for case in run.cases)]))
        return 0
    target = Path(arguments[1])
    text = target.read_text(encoding="utf-8")
    measured = {case.workload for case in run.cases}
    for name in marked(text):
        if name in measured:
            text = update_markers(text, name, markdown(run, name))
    target.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
