"""Every example as a command: what it takes, and one clear sentence for what it cannot take."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = [
    "accelerate_models",
    "elmo_tagger",
    "layers_of_meaning",
    "predict_mask",
    "sentence_similarity",
    "spam_detection",
]


def test_the_list_is_whole() -> None:
    folder = Path(__file__).parents[2] / "ctxfast" / "examples"
    commands = [path.stem for path in folder.glob("*.py") if "__main__" in path.read_text("utf-8")]
    assert sorted(commands) == EXAMPLES


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", EXAMPLES)
def test_help(name: str) -> None:
    line = [sys.executable, "-m", f"ctxfast.examples.{name}", "--help"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {name}.py")


@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("elmo_tagger", ["absent", "absent.conllu", "absent.conllu"]),
        ("layers_of_meaning", ["absent"]),
        ("predict_mask", ["a [MASK]", "absent"]),
        ("sentence_similarity", ["absent"]),
        ("spam_detection", ["absent.tsv"]),
    ],
)
def test_an_absent_file(
    name: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as ended:  # any other exception would show as a traceback
        runpy.run_module(f"ctxfast.examples.{name}", run_name="__main__")
    if isinstance(ended.value.code, int):  # the message is written already
        assert ended.value.code != 0
        message = capsys.readouterr().err
    else:
        message = str(ended.value.code)
    assert "absent" in message.splitlines()[-1]
