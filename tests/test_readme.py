"""README's Python runs and prints what README says; its numbers come from committed results."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", README, re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.unpoisoned
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_prints_what_readme_says(number, monkeypatch, tmp_path):
    from ctxfast.demo import find_weights

    code, expected = EXAMPLES[number]
    if "find_weights" in code:
        try:
            find_weights()
        except FileNotFoundError as error:
            pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, f"README.md, example {number}", "exec"), {"__name__": "readme"})
    lines, expected_lines = printed.getvalue().splitlines(), expected.splitlines()
    assert len(lines) == len(expected_lines)
    for line, wanted in zip(lines, expected_lines, strict=True):
        # Text to the letter, numbers to the digits that README shows.
        assert NUMBER.sub("#", line) == NUMBER.sub("#", wanted)
        for a, b in zip(NUMBER.findall(line), NUMBER.findall(wanted), strict=True):
            digits = len(b.partition(".")[2])
            assert float(a) == pytest.approx(float(b), abs=10**-digits)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", README):
        assert (ROOT / target).exists(), target
