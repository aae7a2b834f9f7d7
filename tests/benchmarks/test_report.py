"""Tables, files and README's markers, from figures chosen by hand."""

from __future__ import annotations

import csv
import io
import re

import pytest

from ctxfast.benchmarks import page, records, report
from ctxfast.benchmarks import readme as readme_tables
from ctxfast.benchmarks.checks import Deviation
from ctxfast.benchmarks.peers import gemm
from ctxfast.benchmarks.records import CaseResult, Result, Run
from ctxfast.benchmarks.split import split_gain
from ctxfast.benchmarks.timing import Ratio, Summary

NATIVE = {"linear": {"onednn": 72}, "attention_varlen": {"native": 12}}


def timed(label, seconds, *, peer="transformers", dtype="float32", **more):
    summary = Summary(seconds, 0.9 * seconds, 1.1 * seconds)
    more.setdefault("error", Deviation(4e-6, 5e-7))
    return Result(
        "bert-inference",
        "sms_spam-2x32",
        peer,
        label,
        dtype,
        version="1.0",
        seconds=summary,
        samples=[seconds] * 3,
        speedup={"float32": Ratio(seconds / 0.5, seconds / 0.55, seconds / 0.45)},
        gflops=100.0,
        of_limit=0.5,
        limit="compute",
        **more,
    )


def make_run(implementations=NATIVE):
    results = [
        timed("ctxfast", 0.5, peer="ctxfast", implementations=implementations),
        timed("transformers sdpa", 3.0, layout="padded"),
        timed(
            "transformers sdpa, length buckets", 1.5, layout="buckets", detail="4 buckets a batch"
        ),
        timed(gemm.DEFAULT_PATH, 0.9, peer="gemm", part=True, error=None),
        timed(gemm.PACKED_PATH, 0.4, peer="gemm", part=True, error=None),
        Result(
            "bert-inference",
            "sms_spam-2x32",
            "openvino",
            "openvino",
            "",
            status="skipped",
            reason="not importable: no module",
        ),
    ]
    case = CaseResult(
        workload="bert-inference",
        case="sms_spam-2x32",
        size="base",
        description="BERT, 12 layers of 768",
        items=64,
        unit="sentences",
        gflop=240.0,
        facts={"tokens": 1414, "fill": 0.371},
        results=results,
        repeats=3,
        foreign=0.2,
        noisy=True,
    )
    environment = {
        "device": "Some CPU",
        "threads": 2,
        "cores": 2,
        "cpu_flags": ["avx2"],
        "torch": "2.13.0",
        "libraries": {"oneDNN": "3.12"},
        "ctxfast": "0.1.0",
        "commit": "abc",
        "time": "now",
    }
    ceilings = {
        "gemm_gflops": {"float32": {"torch": {"16": 90.0}, "oneDNN": {"16": 210.0}}},
        "read_gb_per_s": {"256 MiB": 33.0},
    }
    peers = {"ctxfast": "0.1.0", "openvino": "not measured: not importable: no module"}
    return Run(environment, peers, ceilings, [case])


def test_split_of_the_gain():
    """3.0 -> 1.5 by buckets -> 1.0 without the 0.5 s that F.linear costs more -> 0.5."""
    split = split_gain(make_run().cases[0])
    assert split is not None
    assert (split.padded, split.buckets, split.better_gemm, split.own) == (3.0, 1.5, 1.0, 0.5)
    factors = (split.padding_factor, split.gemm_factor, split.rest_factor)
    assert factors == (2.0, 1.5, 2.0)
    assert factors[0] * factors[1] * factors[2] == split.padded / split.own


def test_no_split_without_all_its_parts():
    run = make_run()
    del run.cases[0].results[3]
    assert split_gain(run.cases[0]) is None
    assert "where the gain comes from" not in report.terminal(run.cases[0])


def test_headline_begins_with_the_best_setting_of_transformers():
    line = report.headline(make_run().cases[0])
    assert line is not None
    assert line.index("3.00x") < line.index("length-sorted buckets") < line.index("6.00x")


def test_headline_takes_the_padded_batch_where_that_is_faster():
    run = make_run()
    run.cases[0].results[2] = timed("transformers sdpa, length buckets", 3.5, layout="buckets")
    line = report.headline(run.cases[0])
    assert line is not None and "6.00x" in line and "7.00x" not in line


def test_no_headline_where_the_reference_ran():
    run = make_run({"linear": {"onednn": 72}, "attention_varlen": {"native": 11, "reference": 1}})
    assert report.headline(run.cases[0]) is None
    text = report.terminal(run.cases[0])
    assert "on the reference: attention_varlen" in text and "; native" not in text
    (row,) = (line for line in text.splitlines() if line.split()[:2] == ["ctxfast", "fp32"])
    assert "native" not in row


def test_terminal_table_says_everything():
    text = report.terminal(make_run().cases[0])
    for part in (
        "500 ms (450-550)",
        "3.00x [2.73, 3.33]",
        "50% compute",
        "4 buckets a batch",
        "openvino: skipped, not importable: no module",
        "attention_varlen: native 12, linear: onednn 72",
        "noisy: other processes took 20% of the CPU",
        "128.0",  # 64 sentences in half a second
    ):
        assert part in text, part


def test_cosines_stand_beside_the_error_of_int8(tmp_path):
    run = make_run()
    case = run.cases[0]
    assert "cosine" not in report.terminal(case) + readme_tables.markdown(run, case.workload)
    error = Deviation(0.2, 0.03, 0.99912, 0.99953)
    case.results.append(timed("int engine", 0.4, peer="ctranslate2", dtype="int8", error=error))
    path = tmp_path / "run.jsonl"
    records.rewrite(path, run)
    assert records.read(path) == run
    shown = re.sub(r"<[^>]+>", "", page.html(run))
    texts = report.terminal(case), readme_tables.markdown(run, case.workload), shown
    for text in texts:
        assert "cosine: least (mean)" in text and text.count("0.99912 (0.99953)") == 1
    stream = io.StringIO()
    records.write_csv(stream, run)
    row = list(csv.DictReader(io.StringIO(stream.getvalue())))[-1]
    assert (row["cosine_min"], row["cosine_mean"]) == ("0.99912", "0.99953")


def test_json_lines_are_read_back(tmp_path):
    run = make_run()
    path = tmp_path / "run.jsonl"
    with path.open("w") as stream:
        records.write_header(stream, run)
        for case in run.cases:
            records.write_case(stream, case)
    assert records.read(path) == run


@pytest.mark.parametrize(
    "text",
    ["", "{}\n", "[]\n", "no json\n", '{"record": "result"}\n', '{"record": "run", "schema": 0}\n'],
)
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="benchmark record"):
        records.read(path)


def test_csv_has_a_row_a_candidate_with_device_and_versions():
    stream = io.StringIO()
    run = make_run()
    records.write_csv(stream, run)
    rows = list(csv.DictReader(io.StringIO(stream.getvalue())))
    assert len(rows) == len(run.cases[0].results)
    first = rows[0]
    assert (first["device"], first["commit"], first["torch"]) == ("Some CPU", "abc", "2.13.0")
    assert (first["p50"], first["p20"], first["status"]) == ("0.5", "0.45", "ok")
    assert rows[-1]["reason"] == "not importable: no module" and rows[-1]["p50"] == ""


def test_markers_round_trip(tmp_path):
    run = make_run()
    (tmp_path / "results").mkdir()
    path, readme = tmp_path / "results" / "run.jsonl", tmp_path / "README.md"
    with path.open("w") as stream:
        records.write_header(stream, run)
        records.write_case(stream, run.cases[0])
    head, tail = "# Title\n\n", "\n\nText after, a | pipe and <!-- another comment -->\n"
    block = "<!-- benchmark:bert-inference -->\nold\n<!-- /benchmark:bert-inference -->"
    other = "\n<!-- benchmark:linear -->kept<!-- /benchmark:linear -->"
    readme.write_text(head + block + tail + other)
    assert report.main([str(path), str(readme)]) == 0
    once = readme.read_text()
    assert once.startswith(head + "<!-- benchmark:bert-inference -->\n") and once.endswith(
        tail + other
    )
    block = readme_tables.markdown(run, "bert-inference", "results/run.svg")
    assert block in once and "old" not in once and 'src="results/run.svg"' in block
    assert (tmp_path / "results" / "run.svg").read_text().startswith("<svg xmlns=")
    assert report.main([str(path), str(readme)]) == 0
    assert readme.read_text() == once


def test_long_tables_fold_behind_their_plot(monkeypatch):
    unfolded = readme_tables.markdown(make_run(), "bert-inference", "plot.svg")
    monkeypatch.setattr(readme_tables, "_FOLDED", 2)
    folded = readme_tables.markdown(make_run(), "bert-inference", "plot.svg")
    assert "<details>" not in unfolded + readme_tables.markdown(make_run(), "bert-inference")
    assert folded.index("plot.svg") < folded.index("<summary>All 3 rows</summary>\n\n|")
    assert "|\n\n</details>\n\n" in folded


def test_markdown_table_is_rectangular_and_names_the_machine():
    block = readme_tables.markdown(make_run(), "bert-inference")
    rows = [line for line in block.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1 and len(rows) == 2 + 3
    assert "Some CPU, 2 threads, torch 2.13.0, commit abc" in block
    assert "2.00x is padding" in block and "1.50x is torch's default GEMM" in block


@pytest.mark.parametrize(
    "text",
    [
        "no markers",
        "<!-- benchmark:x -->",
        "<!-- /benchmark:x --><!-- benchmark:x -->",
        "<!-- benchmark:x --><!-- /benchmark:x -->" * 2,
    ],
)
def test_markers_must_be_one_pair(text):
    with pytest.raises(ValueError, match="must hold one"):
        readme_tables.update_markers(text, "x", "block")


def test_gain_beyond_unpadding():
    """Three times as fast as padded SDPA on half of its scores is 1.5 times a score."""
    case = make_run().cases[0]
    case.results.append(timed("SDPA", 1.5, peer="torch", layout="padded"))
    assert report.beyond_unpadding(case) == []
    case.facts["scores_saved"] = 2.0
    line = "ctxfast fp32: 3.00x over padded SDPA / 2.00x fewer scores = 1.50x per score, 50% of the limit"
    assert report.beyond_unpadding(case) == [line] and line in report.terminal(case)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12.345, "12.3 s"),
        (1.0, "1.00 s"),
        (0.4567, "457 ms"),
        (2.5e-3, "2.50 ms"),
        (7.89e-6, "7.89 us"),
        (4e-8, "0.04 us"),
    ],
)
def test_times(value, text):
    assert report.seconds(value) == text
