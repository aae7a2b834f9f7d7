"""The report and its plots: whole, escaped, without a network, nothing outside the drawing."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from ctxfast.benchmarks import charts, curves, page, records, report, svg, verdicts
from ctxfast.cli import main

from . import made_up

VOID = {"meta", "rect", "line", "polyline"}


class Balanced(HTMLParser):
    """Collects text, links and sources; fails where tags do not nest."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.targets, self.ids = [], [], [], []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.targets += [found[name] for name in ("href", "src") if name in found]
        self.ids += [found["id"]] if "id" in found else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(text):
    parser = Balanced()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def test_page_is_well_formed_and_says_everything():
    parser = parsed(page.html(made_up.whole_run()))
    text = " ".join(parser.text)
    for part in (
        "Some CPU, 2 threads",
        "commit abc",
        "ONNX <Runtime> & co",
        "absent: skipped, not importable",
        "OpenVINO · float32: refused, wrong result: 1 < 2",
        "Where we are slower",
        "linear 80%, other 20%",
        "150 MiB, holds 100 MiB",
        "Roofline fp32",
        "s: time against length",
    ):
        assert part in text, part


def test_page_needs_no_network():
    text = page.html(made_up.whole_run())
    parser = parsed(text)
    assert all(target.startswith("#") and target[1:] in parser.ids for target in parser.targets)
    assert not re.search(r"https?:|url\(|@import|<script|<link|<img", text)


def test_only_peers_that_are_ahead_beyond_noise_are_listed():
    run = made_up.whole_run()
    ahead = [(b.peer.label, b.same_type) for b in verdicts.behind(run)]
    assert ahead == [("ONNX <Runtime> & co", True), ("CTranslate2", False)]
    run.cases[0].results[4].speedup["float32"] = made_up.ratio_interval(
        [0.4, 0.6, 0.5], [0.5, 0.4, 0.6]
    )
    assert [b.peer.label for b in verdicts.behind(run)] == ["CTranslate2"]
    assert any(
        line.startswith("behind: bert-inference a, CTranslate2 int8")
        for line in report.summary(run)
    )


def test_every_peer_that_is_ahead_is_explained():
    """With its bytes, how near both come to the limit and our profile; and that there is none where there is none."""
    run = made_up.whole_run()
    texts = [verdicts.explanation(item) for item in verdicts.behind(run)]
    both = "we reach 50% of the limit by compute, the peer 50% compute"
    profile = "our time in operators: linear 80%, other 20%"
    assert texts == [
        f"{both}; {profile}",
        f"its weights have 0.5 of the bytes; {both}; no pass of ours was profiled",
    ]
    text = " ".join(parsed(page.html(run)).text)
    assert all(part in text and part in "\n".join(report.summary(run)) for part in texts)


def test_names_of_the_profiler_are_made_readable():
    names = ["ctxfast::linear", "aten::empty", "GeneratedBackwardFor_ctxfast_lstm_default"]
    engine = (
        "autograd::engine::evaluate_function: GeneratedBackwardFor_ctxfast_lstm_defaultBackward"
    )
    found = [verdicts._operator(name) for name in [*names, engine]]
    assert found == ["linear", "aten::empty", "lstm in autograd", "lstm in autograd"]


def test_all_that_are_ahead_are_named():
    run = made_up.whole_run()
    results = run.cases[0].results
    results.insert(5, made_up.candidate("torch", "second", [0.45, 0.46, 0.44]))
    results[5].speedup = {"float32": made_up.ratio_interval([0.45] * 3, [0.5] * 3)}
    for case in run.cases[1:]:
        case.results[1].speedup = {"float32": made_up.ratio_interval([0.8] * 3, [1.0] * 3)}
    text = " ".join(parsed(page.html(run)).text)
    assert "ONNX <Runtime> & co fp32; also second fp32 0.90x" in text
    assert "s, length 16 (0.80x), 32 (0.80x), 64 (0.80x): eager fp32" in text


def test_ctxfast_in_another_form_is_no_peer():
    run = made_up.whole_run()
    result = run.cases[0].results[4]
    result.peer = "ctxfast.bert"
    assert "ONNX <Runtime> & co" not in [b.peer.label for b in verdicts.behind(run)]
    assert result not in verdicts.rivals(run.cases[0], run.cases[0].results[0])


def test_plots_are_files_of_their_own(tmp_path):
    files = page.write_plots(tmp_path / "plots", made_up.whole_run())
    names = {file.stem for file in files}
    assert names == {
        "overview",
        "speedup-bert-inference-a",
        "memory-bert-inference-a",
        "curve-s-length",
        "roofline-float32",
        "roofline-bfloat16",
    }
    for file in files:
        root = ElementTree.parse(file).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "prefers-color-scheme: dark" in file.read_text()


def test_plots_of_two_runs_of_one_case_have_two_files(tmp_path):
    once = made_up.whole_run()
    files = page.write_plots(tmp_path, records.merge([once, made_up.whole_run()]))
    assert len(set(files)) == len(files) == len(list(tmp_path.iterdir()))
    assert tmp_path / "memory-bert-inference-a.2.svg" in files


def boxes(drawing):
    """(left, right, bottom) of every text that is not turned."""
    for x, y, anchor, text in re.findall(
        r'<text class="[^"]*" x="([\d.-]+)" y="([\d.-]+)" text-anchor="(\w+)">([^<]*)<',
        drawing.render(),
    ):
        width = 6.2 * len(text)
        left = float(x) - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        yield left, left + width, float(y), text


def test_nothing_leaves_the_drawing():
    for plot in charts.plots(made_up.whole_run()):
        drawing = plot.drawing
        for left, right, y, text in boxes(drawing):
            assert left >= -1 and right <= drawing.width + 1 and 0 < y <= drawing.height, (
                plot.name,
                text,
            )


def test_bars_point_to_the_right_where_ctxfast_is_faster():
    drawing = charts.speedups(made_up.whole_run().cases[0])
    assert drawing is not None
    kinds = re.findall(r'<rect class="(good|bad)"', drawing.render())
    assert kinds == ["good", "good", "bad", "bad"]


def test_case_without_own_time_has_no_bars():
    case = made_up.case([made_up.candidate("eager", "eager", [1.0, 1.1])])
    assert charts.speedups(case) is None
    assert "eager" in page.html(made_up.run(case))


def test_old_records_without_the_new_fields_are_read(tmp_path):
    run = made_up.whole_run()
    path = tmp_path / "run.jsonl"
    records.rewrite(path, run)
    assert records.read(path) == run
    new = {"curve", "at", "candidates", "intensity", "memory", "profile"}
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [json.dumps({k: v for k, v in entry.items() if k not in new}) for entry in entries]
    path.write_text("\n".join(lines) + "\n")
    old = records.read(path)
    assert [c.case for c in old.cases] == [c.case for c in run.cases] and not old.cases[1].curve
    parsed(page.html(old))


def test_command_reports_a_file(tmp_path, capsys):
    source = tmp_path / "run.jsonl"
    records.rewrite(source, made_up.whole_run())
    outputs = [
        "--html",
        str(tmp_path / "a.html"),
        "--plots",
        str(tmp_path / "p"),
        "--csv",
        str(tmp_path / "a.csv"),
    ]
    assert main(["bench", "--from", str(source), *outputs]) == 0
    assert "s length ctxfast fp32 1.00 [" in " ".join(capsys.readouterr().out.split())
    assert parsed((tmp_path / "a.html").read_text()).ids
    assert len(list((tmp_path / "p").glob("*.svg"))) == 6
    assert (tmp_path / "a.csv").read_text().count("\n") == 1 + 8 + 6


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 1.0, 2.0])
def test_fitted_exponent(exponent):
    at = [16, 32, 64, 128]
    exact = curves.fit(at, [[n**exponent * f for f in (0.9, 1.0, 1.1)] for n in at])
    assert exact.value == pytest.approx(exponent, abs=1e-12)
    assert exact.low <= exponent <= exact.high
    with pytest.raises(ValueError, match="two different places"):
        curves.fit([2, 2], [[1.0], [2.0]])


def test_curves_follow_the_axis():
    found = {curve.label: curve for curve in curves.find(made_up.whole_run())}
    assert set(found) == {"ctxfast", "eager"}
    assert [place for place, _ in found["eager"].points] == [16.0, 32.0, 64.0]
    assert found["eager"].exponent.value == pytest.approx(1.0)


def test_scales():
    scale = svg.Scale(1.0, 100.0, 0.0, 200.0)
    assert [scale(v) for v in (0.1, 1.0, 10.0, 100.0, 1e9)] == [0.0, 0.0, 100.0, 200.0, 200.0]
    assert scale.ticks() == [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]
    assert svg.Scale(0.0, 7.0, 0.0, 70.0, log=False).ticks() == [0.0, 2.0, 4.0, 6.0]


def test_labels_are_spread():
    places = svg.spread([50.0, 50.0, 51.0, 200.0], 10.0, 0.0, 100.0)
    ordered = sorted(places)
    assert all(b - a >= 10.0 - 1e-9 for a, b in zip(ordered, ordered[1:], strict=False))
    assert ordered[0] >= 0.0 and ordered[-1] <= 100.0
