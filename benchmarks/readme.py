"""README's tables: Markdown from committed results, between markers that name the workload."""

from __future__ import annotations

import re

from . import curves
from .records import CaseResult, Result, Run
from .report import angled, cosine, headline, note, ratio, seconds, short, size, warnings
from .split import split_gain
from .timing import reachable_confidence
from .verdicts import rivals

_FOLDED = 6  # rows above which a table is folded away behind its plot


def markdown(run: Run, workload: str, plot: str | None = None) -> str:
    """The table of a workload, and the machine.

    One case: a row a candidate. Several: a row a case and type with the fastest peer. Points of scaling curves: a row
    a candidate with its exponents.

    plot: the address of a picture to show above the table
    """
    cases = [case for case in run.cases if case.workload == workload]
    if len(cases) == 1:
        blocks = _one_case(cases[0], plot)
    elif any(case.curve for case in cases):
        blocks = [_exponents(run, workload)]
    else:
        blocks = _shown(_many_cases(cases), plot, f"{workload}: ctxfast over the fastest peer")
        notes = dict.fromkeys(w for case in cases for w in warnings(case))
        blocks += [_sentence(text) for text in notes]
    about = run.environment
    rounds = sorted({case.repeats for case in cases})
    ends = dict.fromkeys((rounds[0], rounds[-1]))
    counted = " to ".join(map(str, ends))
    confidence = " to ".join(dict.fromkeys(f"{reachable_confidence(n):.0%}" for n in ends))
    machine = [about["device"], f"{about['threads']} threads", f"torch {about['torch']}"]
    machine += [f"commit {about['commit']}"] if about["commit"] else []
    blocks.append(
        f"Median of {counted} interleaved rounds with bootstrap intervals of {confidence} confidence; "
        f"{', '.join(machine)}; `ctxfast bench {workload}`."
    )
    return "\n\n".join(blocks)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _table(header: list[str], rows: list[list[str]], left: int) -> str:
    lines = [header, ["---"] * left + ["--:"] * (len(header) - left), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(table: str, plot: str | None, title: str) -> list[str]:
    """A table below its plot, folded where it is long."""
    if plot is None:
        return [table]
    rows = table.count("\n") - 1
    if rows > _FOLDED:
        table = f"<details><summary>All {rows} rows</summary>\n\n{table}\n\n</details>"
    return [f'<img src="{plot}" width="560" alt="{title}">', table]


def _one_case(case: CaseResult, plot: str | None) -> list[str]:
    own = [result.dtype for result in case.own()]
    claim = headline(case)
    blocks = [_sentence(case.description) + (f" {claim}." if claim else "")]
    timed = [result for result in case.results if result.seconds and not result.part]
    with_memory = any(result.memory for result in timed)
    header = ["", "type", "time", *(f"of ctxfast {short(dtype)}" for dtype in own), "max error"]
    angles = angled(case)
    header += [*angles, *(["peak memory"] if with_memory else [])]
    rows = []
    for result in timed:
        extra = f" ({note(result)})" if note(result) else ""
        row = [f"{result.label}{extra}", short(result.dtype), _time(result)]
        row += [ratio(result.speedup.get(dtype)) for dtype in own]
        row += [_error(result), *(cosine(result) for _ in angles)]
        if with_memory:
            row.append(size(result.memory.peak) if result.memory else "")
        rows.append(row)
    title = f"{case.workload}: how many times as fast as each candidate ctxfast is"
    blocks += _shown(_table(header, rows, 2), plot, title)
    split = split_gain(case)
    if split is not None:
        total = split.padded / split.own
        blocks.append(
            f"Of the {total:.2f}x over one padded batch, {split.padding_factor:.2f}x is padding that "
            f"length buckets remove too, {split.gemm_factor:.2f}x is torch's default GEMM against oneDNN's "
            f"on the same tokens, and {split.rest_factor:.2f}x is the rest."
        )
    found = [_sentence(warning) for warning in warnings(case)]
    return blocks + (["\n".join(found)] if found else [])


def _many_cases(cases: list[CaseResult]) -> str:
    header = [
        "",
        "type",
        "fastest peer",
        "ctxfast",
        "over it",
        "over eager",
        "of limit",
        "max error",
    ]
    rows = []
    for case in cases:
        for own in case.own():
            against = rivals(case, own)
            eager = next((r for r in against if r.peer == "eager"), None)
            best = against[0] if against else None
            limit = f"{own.of_limit:.0%} {own.limit}" if own.of_limit is not None else ""
            rows.append(
                [
                    case.description + (f" ({note(own)})" if note(own) else ""),
                    short(own.dtype),
                    best.label if best else "",
                    _time(own),
                    ratio(best.speedup.get(own.dtype)) if best else "",
                    ratio(eager.speedup.get(own.dtype)) if eager else "",
                    limit,
                    _error(own),
                ]
            )
    return _table(header, rows, 3)


def _exponents(run: Run, workload: str) -> str:
    found = [curve for curve in curves.find(run) if curve.workload == workload]
    axes = list(dict.fromkeys(curve.axis for curve in found))
    rows = []
    for key in dict.fromkeys(curve.key for curve in found):
        of_key = {curve.axis: curve for curve in found if curve.key == key}
        first = next(iter(of_key.values()))
        cells = []
        for axis in axes:
            exponent = of_key[axis].exponent if axis in of_key else None
            cells.append(
                f"{exponent.value:.2f} [{exponent.low:.2f}, {exponent.high:.2f}]"
                if exponent
                else ""
            )
        rows.append([first.label, short(first.dtype), *cells])
    return _table(["", "type", *(f"{axis} ^" for axis in axes)], rows, 2)


def _time(result: Result) -> str:
    return seconds(result.seconds.median) if result.seconds else ""


def _error(result: Result) -> str:
    return f"{result.error.max:.0e}" if result.error else ""


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
