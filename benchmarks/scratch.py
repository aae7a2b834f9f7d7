"""Files that a run makes for itself (random weights, models converted for a peer), in one folder that its child
processes share.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

VARIABLE = "CTXFAST_BENCH_SCRATCH"


@cache
def _own() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="ctxfast-bench-")


def root() -> Path:
    """The folder, removed when the process that made it ends; a child's is that of its parent."""
    return Path(os.environ.get(VARIABLE) or _own().name)


def converted(directory: Path, peer: str, write: Callable[[Path], None]) -> Path:
    """The folder with what `write` makes for a peer of the model in a directory, once a run."""
    model = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:16]
    return folder(f"{peer}-{model}", write)


def folder(name: str, write: Callable[[Path], None]) -> Path:
    """The folder `name`, filled by `write` where nobody has done so yet."""
    target = root() / name
    if not target.is_dir():
        unfinished = Path(tempfile.mkdtemp(dir=root()))
        write(unfinished)
        unfinished.rename(target)
    return target
