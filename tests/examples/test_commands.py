"""Every example as a command: what it takes, and one clear sentence for what it cannot take."""

from __future__ import annotations

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


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", f"ctxfast.examples.{name}", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def test_the_list_is_whole() -> None:
    folder = Path(__file__).parents[2] / "ctxfast" / "examples"
    commands = [path.stem for path in folder.glob("*.py") if "__main__" in path.read_text("utf-8")]
    assert sorted(commands) == EXAMPLES


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", EXAMPLES)
def test_help(name: str) -> None:
    done = run(name, "--help")
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
def test_an_absent_file(name: str, arguments: list[str]) -> None:
    done = run(name, *arguments)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "absent" in done.stderr.splitlines()[-1]
