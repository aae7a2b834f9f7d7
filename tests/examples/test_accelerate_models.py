"""The example prints the same vectors before and after."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ctxfast.examples import accelerate_models
from tests.integrations.model_files import save


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["the film was good .", "dull", "where was anna ? in paris !"] * 4
    monkeypatch.setattr(accelerate_models, "generate_sentences", lambda count: texts)


def test_it_runs(words, tmp_path: Path, capsys) -> None:
    pytest.importorskip("transformers")
    accelerate_models.main([str(save(tmp_path))])
    printed = capsys.readouterr().out
    found = [float(x) for x in re.findall(r"difference (\S+)", printed)]
    assert found and max(found) < 2e-5
    assert printed.count("2 of 2 layers fused") == len(found)
