"""Where the files of a pretrained model are found, and how new ones are written."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SMALL_FILES = ["*.json", "vocab.txt"]
_WEIGHTS = ["model*.safetensors", "pytorch_model*.bin"]


def resolve_directory(
    name: str | os.PathLike[str],
    *,
    caller: str,
    weights: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """The directory that holds a model: `name` itself, its copy in the local Hugging Face cache, or a download.

    weights: whether the directory must hold weights beside config.json
    caller:  the function that error messages speak for

    Raises FileNotFoundError where none of the three exists.
    """
    if not isinstance(name, str | os.PathLike):
        raise TypeError(
            f"{caller}: the model must be a directory or a hub name, got {type(name).__name__}"
        )
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{caller}: the model must be a directory, got the file {path}")
    if not (isinstance(name, str) and _REPOSITORY.fullmatch(name)) or name.startswith("."):
        raise FileNotFoundError(f"{caller}: no such directory: {path}")
    where: dict[str, Any] = {"cache_dir": cache_dir, "revision": revision}
    try:
        import huggingface_hub
    except ImportError:
        raise FileNotFoundError(f"{caller}: no such directory: {path}") from None
    config = huggingface_hub.try_to_load_from_cache(name, "config.json", **where)
    if isinstance(config, str):
        folder = Path(config).parent
        if not weights or any(list(folder.glob(pattern)) for pattern in _WEIGHTS):
            return folder
    if local_files_only or huggingface_hub.constants.HF_HUB_OFFLINE:
        raise FileNotFoundError(
            f"{caller}: {name!r} is neither a directory nor a model in the local Hugging Face cache"
        )
    return _download(name, caller, weights, token, where)


def _download(name: str, caller: str, weights: bool, token: Any, where: dict[str, Any]) -> Path:
    import huggingface_hub

    def fetch(patterns: list[str]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=patterns, token=token, **where)
        )

    try:
        folder = fetch(_SMALL_FILES)
        for pattern in _WEIGHTS if weights else ():
            folder = fetch([pattern])
            if list(folder.glob(pattern)):
                break
    except Exception as error:  # the hub client raises many kinds, from four libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise FileNotFoundError(
            f"{caller}: {name!r} is neither a directory nor a model in the local Hugging Face cache, "
            f"and downloading it failed: {reason}"
        ) from error
    return folder


def make_directory(directory: str | os.PathLike[str], *, caller: str) -> Path:
    """Creates `directory` where it is missing. Raises NotADirectoryError if a file has its name."""
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{caller}: the target must be a directory, got the file {path}")
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls write(temporary file) and renames it to `path`, so that no reader ever sees a part of a file."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # what open() would have given; mkstemp gives 0600
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
