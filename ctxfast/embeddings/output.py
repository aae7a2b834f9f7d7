"""Files that appear complete or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A new empty file beside `path` that takes its name when the block ends without an error.

    After an error, an interrupt included, nothing is left and an existing `path` is as it was.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False.
        OSError: the directory is missing or not writable.
    """
    target = Path(os.path.realpath(path))
    _check(target, overwrite)
    partial = target.with_name(f".ctxfast-{secrets.token_hex(6)}.partial")
    try:
        partial.touch(exist_ok=False)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise type(error)(f"embed: output must be writable, got {path} ({reason})") from None
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        _check(target, overwrite)
        os.replace(partial, target)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def _check(target: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise IsADirectoryError(f"embed: output must be a file, got the directory {target}")
    if target.exists() and not overwrite:
        raise FileExistsError(f"embed: output must be a new file, got {target}, which exists")
    if not target.parent.is_dir():
        raise NotADirectoryError(
            f"embed: output must be in an existing directory, got {target.parent}"
        )
