"""Commits are built and measured in worktrees that are gone afterwards."""

from __future__ import annotations

import subprocess

import pytest

from ctxfast.benchmarks import commits, comparison, records, runner
from ctxfast.benchmarks.case import BadOption

from . import made_up

# A repository whose "build" leaves a file, and whose benchmark copies prepared records if that file is there.
SETUP = "import sys, pathlib\nassert sys.argv[1:] == ['build_ext', '--inplace']\npathlib.Path('built').touch()\n"
MAIN = """
import pathlib, shutil, sys
assert pathlib.Path("built").exists() and sys.argv[1:3] == ["bench", "linear"], sys.argv
assert sys.argv[sys.argv.index("--peers") + 1] == "eager,torch"
shutil.copy("prepared.jsonl", sys.argv[sys.argv.index("--json") + 1])
"""


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def prepared(factor):
    own = [factor * t for t in (1.00, 1.01, 0.99, 1.02, 0.98)]
    peers = [made_up.candidate("eager", "eager", [2.0, 2.01, 1.99, 2.0, 2.02])]
    return made_up.run(made_up.case([made_up.candidate("ctxfast", "ctxfast", own), *peers]))


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "repository"
    (root / "ctxfast").mkdir(parents=True)
    git(root, "init", "-q")
    (root / "setup.py").write_text(SETUP)
    (root / "ctxfast" / "__init__.py").write_text("")
    (root / "ctxfast" / "__main__.py").write_text(MAIN)
    for factor in (1.0, 1.15):
        records.rewrite(root / "prepared.jsonl", prepared(factor))
        git(root, "add", "-A")
        git(root, "commit", "-q", "-m", str(factor))
    return root


def test_two_commits_are_measured_in_turns_and_leave_nothing(repository):
    seen = []
    sides = commits.read_or_measure(
        ("HEAD~1", "HEAD"),
        ["linear"],
        runner.Options("tiny"),
        root=repository,
        progress=lambda text, *_: seen.append(text),
    )
    assert [len(side) for side in sides] == [commits.PASSES] * 2
    assert seen[2:] == ["measuring HEAD~1", "measuring HEAD"] * commits.PASSES
    assert [c.verdict for c in comparison.compare(*sides).changes] == ["slower"]
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    assert git(repository, "status", "--porcelain") == ""


def test_a_commit_that_does_not_build_is_one_sentence(repository):
    (repository / "setup.py").write_text("raise SystemExit('no compiler')")
    git(repository, "commit", "-qam", "broken")
    with pytest.raises(RuntimeError, match="setup.py build_ext --inplace failed: no compiler"):
        commits.read_or_measure(
            ("HEAD~1", "HEAD"), ["linear"], runner.Options("tiny"), root=repository
        )
    assert len(git(repository, "worktree", "list").splitlines()) == 1


@pytest.mark.parametrize("name", ["nothing", "--all", "HEAD~9"])
def test_unknown_commit(repository, name):
    with pytest.raises(BadOption, match="files of JSON lines and git commits"):
        commits.read_or_measure((name, "HEAD"), [], runner.Options("tiny"), root=repository)


def test_the_commit_of_this_checkout_is_found():
    if not (commits.ROOT / ".git").exists():
        pytest.skip("no git checkout")
    assert len(commits.resolve(commits.ROOT, "HEAD")) == 40
