"""A commit built and measured in a temporary worktree, with the benchmarks that it brings itself."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .case import BadOption
from .records import Run, read

if TYPE_CHECKING:
    from .runner import Options

PASSES = 5  # processes of each commit, taken in turns
CONTROLS = (
    "eager",
    "torch",
)  # the peers of a run that names none: quick, and the same on both sides
ROOT = Path(__file__).resolve().parent.parent

Progress = Callable[[str, int, int], None]


def read_or_measure(
    sides: Sequence[str],
    names: Sequence[str],
    options: Options,
    *,
    root: Path = ROOT,
    progress: Progress = lambda *_: None,
) -> list[list[Run]]:
    """The runs of each side: those of a file, or PASSES new ones of a git commit of the checkout `root`.

    Raises BadOption for what is neither, and RuntimeError where a commit cannot be built or measured.
    """
    runs: list[list[Run]] = [[read(Path(side))] if Path(side).is_file() else [] for side in sides]
    commits = [
        None if found else resolve(root, side) for side, found in zip(sides, runs, strict=True)
    ]
    with ExitStack() as worktrees:
        folders = []
        for side, commit in zip(sides, commits, strict=True):
            if commit is None:
                folders.append(None)
                continue
            progress(f"building {side}", 0, 0)
            folders.append(worktrees.enter_context(worktree(root, commit)))
            build(folders[-1])
        for turn in range(PASSES):
            for side, found, folder in zip(sides, runs, folders, strict=True):
                if folder is not None:
                    progress(f"measuring {side}", turn + 1, PASSES)
                    found.append(measure(folder, names, options))
    return runs


def resolve(root: Path, name: str) -> str:
    """The full hash of a commit; BadOption where `root` knows none by that name."""
    done = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    if done.returncode:
        raise BadOption(f"--compare takes files of JSON lines and git commits, got {name!r}")
    return done.stdout.strip()


@contextmanager
def worktree(root: Path, commit: str) -> Iterator[Path]:
    """A checkout of the commit in a temporary folder, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="ctxfast-compare-") as parent:
        folder = Path(parent) / commit[:12]
        done = _git(root, "worktree", "add", "--detach", str(folder), commit)
        if done.returncode:
            raise RuntimeError(f"git worktree: {_last(done.stderr)}")
        try:
            yield folder
        finally:
            _git(root, "worktree", "remove", "--force", str(folder))


def build(folder: Path) -> None:
    """Compile the native module beside its sources."""
    _python(folder, "setup.py", "build_ext", "--inplace")


def measure(folder: Path, names: Sequence[str], options: Options) -> Run:
    """One run of the commit in a process of its own."""
    target = folder / "comparison.jsonl"
    peers = CONTROLS if options.peers is None else options.peers
    arguments = [
        "--size",
        options.size,
        "--device",
        options.device,
        "--repeats",
        str(options.repeats),
        "--peers",
        ",".join(peers),
    ]
    if options.threads is not None:
        arguments += ["--threads", str(options.threads)]
    _python(folder, "-m", "ctxfast", "bench", *names, *arguments, "--json", str(target))
    return read(target)


def _python(folder: Path, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise RuntimeError(f"{folder.name}: {' '.join(arguments[:4])} failed: {_last(done.stderr)}")


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
