"""The steps of a GPU lease: nothing that fails or hangs stops what comes after it."""

import json
import sys

import pytest

from ctxfast.benchmarks import gpu


def python(text):
    return (sys.executable, "-c", text)


def test_steps_go_on_after_failures(tmp_path, monkeypatch, capsys):
    chosen = [
        gpu.Step("fails", 20, python("print('bad'); raise SystemExit(3)")),
        gpu.Step("hangs", 1, python("print('seen', flush=True); import time; time.sleep(60)")),
        gpu.Step("absent", 20, ("/no/such/program",)),
        gpu.Step("works", 20, python("import os; print(os.environ['TRITON_INTERPRET'])")),
    ]
    monkeypatch.setattr(gpu, "steps", lambda folder: chosen)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == ["fails", "hangs", "absent", "works"]
    results = [line["result"] for line in lines]
    assert results[:2] == [3, "time limit"] and "No such file" in results[2] and results[3] == 0
    assert (tmp_path / "hangs.txt").read_text() == "seen\n"
    assert lines[3]["last"] == "0"
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_names_are_unique_and_checked(tmp_path, capsys):
    names = [step.name for step in gpu.steps(tmp_path)]
    assert len(set(names)) == len(names)
    assert gpu.main(["--list", "--skip", "build", "--out", str(tmp_path / "none")]) == 0
    assert "build" not in capsys.readouterr().out.split()
    assert not (tmp_path / "none").exists()
    with pytest.raises(SystemExit):
        gpu.main(["--only", "nothing"])
