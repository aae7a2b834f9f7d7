"""A run that was cut off is continued, never repeated and never mixed with another commit's."""

from __future__ import annotations

import pytest

from ctxfast.benchmarks import planning, records, runner
from ctxfast.benchmarks.case import BadOption
from ctxfast.cli import main

from . import made_up

COMMAND = ["bench", "layer-norm", "linear", "--size", "tiny", "--repeats", "1", "--peers", "eager"]


@pytest.fixture
def cut_off(tmp_path, capsys):
    """A file whose last case was being written when the process was killed."""
    path = tmp_path / "run.jsonl"
    assert main([*COMMAND, "--resume", str(path)]) == 0
    capsys.readouterr()
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:-2]) + lines[-2][:50])
    return path, whole


def test_the_rest_is_measured(cut_off, capsys):
    path, whole = cut_off
    before = records.read(path)
    assert main([*COMMAND, "--resume", str(path)]) == 0
    after = records.read(path)
    assert [c.identity for c in after.cases] == [c.identity for c in records_of(whole, path).cases]
    assert after.cases[: len(before.cases)] == before.cases and len(before.cases) == 6
    text = capsys.readouterr().out
    assert "6 cases are taken from" in text and text.count("GFLOP, 1 rounds") == 1


def records_of(text, path):
    other = path.with_name("whole.jsonl")
    other.write_text(text)
    return records.read(other)


def test_another_commit_is_refused_and_the_file_is_kept(cut_off, capsys, monkeypatch):
    path, _ = cut_off
    before = path.read_bytes()
    monkeypatch.setattr(runner.environment, "commit", lambda: "another")
    assert main([*COMMAND, "--resume", str(path)]) == 2
    assert "can only be continued with the same commit, another here" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_an_interrupted_case_is_measured_again():
    options = runner.Options("tiny", 1, 2, ())
    run = runner.measure(["layer-norm"], options)
    run.cases[0].interrupted = True
    again = runner.measure(["layer-norm"], options, earlier=run)
    assert len(again.cases) == 1 and not again.cases[0].interrupted


def test_no_case_begins_after_the_time():
    run = runner.measure(["layer-norm", "linear"], runner.Options("tiny", 1, 2, (), minutes=0.0))
    assert not run.cases and len(run.left) == 7 and run.left[0] == "layer-norm 48x64"


def test_with_a_limit_every_workload_has_its_turn():
    """The first case of each, then the second of each."""
    limited = runner.Options("tiny", minutes=9.0)
    found = [case.workload for _, case in planning.cases(["linear", "attention"], limited)]
    assert found[:4] == ["linear", "attention", "linear", "attention"]
    whole = planning.cases(["linear", "attention"], runner.Options("tiny"))
    assert sorted(found) == sorted(case.workload for _, case in whole)


def test_plan_counts_what_is_left():
    run = made_up.run(made_up.case([], workload="layer-norm", name="48x64"))
    run.cases[0].size = "tiny"
    options = runner.Options("tiny", budget=30.0, minutes=14.0)
    text = planning.plan(["layer-norm", "linear"], options, run)
    assert text.startswith("6 cases to measure, about 3 minutes of timing at 30 s a case")
    assert text.endswith("none begins after 14 minutes")


def test_folder_has_a_file_for_each_workload(tmp_path, capsys):
    folder = tmp_path / "results"
    assert main([*COMMAND, "--resume", f"{folder}/"]) == 0
    assert {file.name for file in folder.iterdir()} == {"layer-norm.jsonl", "linear.jsonl"}
    whole = (folder / "linear.jsonl").read_text()
    (folder / "linear.jsonl").write_text(whole[: int(0.9 * len(whole))])
    before = records.read(folder / "layer-norm.jsonl")
    capsys.readouterr()
    assert main([*COMMAND, "--resume", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "6 cases are taken from" in text and "1 case to measure" in text
    assert records.read(folder / "layer-norm.jsonl") == before
    assert len(records.read(folder / "linear.jsonl").cases) == 6
    page = tmp_path / "all.html"
    assert main(["bench", "--from", str(folder), "--html", str(page)]) == 0
    assert all(f'id="{name}"' in page.read_text() for name in ("layer-norm", "linear"))


def test_runs_of_two_commits_are_named_and_those_of_two_machines_refused():
    a, b = made_up.run(made_up.case([], name="a")), made_up.run(made_up.case([], name="b"))
    b.environment["commit"] = "def"
    merged = records.merge([a, b])
    assert merged.environment["commit"] == "abc, def" and len(merged.cases) == 2
    b.environment["threads"] = 8
    with pytest.raises(ValueError, match="one threads, got 2 and 8"):
        records.merge([a, b])
    with pytest.raises(ValueError, match="at least one run"):
        records.merge([])


@pytest.mark.parametrize("name", ["minutes", "budget"])
def test_negative_time(name):
    with pytest.raises(BadOption, match=f"{name} must be at least 0"):
        runner.measure(["linear"], runner.Options("tiny", **{name: -1.0}))


def test_two_files_for_records(tmp_path, capsys):
    assert main([*COMMAND, "--resume", "a", "--json", "b"]) == 2
    assert "give one of them" in capsys.readouterr().err
