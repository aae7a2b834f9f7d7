"""A run that was cut off is continued, never repeated and never mixed with another commit's."""

from __future__ import annotations

import pytest

from ctxfast.benchmarks import records, runner
from ctxfast.benchmarks.case import BadOption
from ctxfast.cli import main

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


@pytest.mark.parametrize("name", ["minutes", "budget"])
def test_negative_time(name):
    with pytest.raises(BadOption, match=f"{name} must be at least 0"):
        runner.measure(["linear"], runner.Options("tiny", **{name: -1.0}))


def test_two_files_for_records(tmp_path, capsys):
    assert main([*COMMAND, "--resume", "a", "--json", "b"]) == 2
    assert "give one of them" in capsys.readouterr().err
