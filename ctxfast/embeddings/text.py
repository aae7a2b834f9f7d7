"""Text with one sentence a line, from a file, a gzip file, a pipe or standard input."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

_GZIP_MAGIC = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"


class TextLines:
    """Lines of UTF-8 text, read twice: `check` counts them, iteration gives them.

    A line ends at a line feed; a carriage return before it is dropped, and so is a byte order mark
    at the start. What cannot be read twice (standard input, a pipe) is first copied to an unnamed
    temporary file.

    Args:
        source: a path, gzip-compressed or not, or "-" for standard input.

    Attributes:
        name: the source as error messages call it.
        count: number of lines, after `check`.
        sha256: hex digest of the text's bytes (decompressed), after `check`.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        self.name = "standard input" if os.fspath(source) == "-" else os.fspath(source)
        self.count = 0
        self.sha256 = ""
        self._gzip = False
        self._raw = _open(source)

    def check(self) -> None:
        """Read everything once.

        Raises:
            ValueError: the text is empty, is not UTF-8 (with the line number) or is a broken gzip
                file.
        """
        if not _is_regular(self._raw):
            self._raw = _spooled(self._raw)
        self._gzip = self._raw.read(2) == _GZIP_MAGIC
        digest = hashlib.sha256()
        self.count = sum(1 for _ in self._decoded(digest))
        if self.count == 0:
            raise ValueError(f"embed: input must hold at least one line, got {self.name} empty")
        self.sha256 = digest.hexdigest()

    def __iter__(self) -> Iterator[str]:
        """The lines in order.

        Raises:
            ValueError: the text is not what it was when it was counted.
        """
        digest = hashlib.sha256()
        yield from self._decoded(digest)
        if digest.hexdigest() != self.sha256:
            raise ValueError(f"embed: input must stay as it is, got {self.name} changed meanwhile")

    def chunks(self, lines: int, characters: int) -> Iterator[list[str]]:
        """Lists of at most `lines` lines that end once they hold `characters` characters."""
        chunk: list[str] = []
        held = 0
        for line in self:
            chunk.append(line)
            held += len(line)
            if len(chunk) >= lines or held >= characters:
                yield chunk
                chunk, held = [], 0
        if chunk:
            yield chunk

    def close(self) -> None:
        self._raw.close()

    def __enter__(self) -> TextLines:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _decoded(self, digest: Any) -> Iterator[str]:
        self._raw.seek(0)
        text = gzip.GzipFile(fileobj=self._raw) if self._gzip else self._raw
        number = 0
        try:
            for raw in text:
                number += 1
                digest.update(raw)
                if number == 1:
                    raw = raw.removeprefix(_BOM)
                    if not raw:
                        continue
                yield raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise ValueError(
                f"embed: input must be UTF-8 text, got byte 0x{byte:02x} in line {number}"
                f" of {self.name}"
            ) from None
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(
                f"embed: input must be an intact gzip file, got {self.name} broken ({error})"
            ) from None


def _open(source: str | os.PathLike[str]) -> IO[bytes]:
    if os.fspath(source) == "-":
        return os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    path = Path(source)
    if path.is_dir():
        raise IsADirectoryError(f"embed: input must be a text file, got the directory {path}")
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"embed: input must be an existing file, got {path}") from None


def _is_regular(file: IO[bytes]) -> bool:
    return stat.S_ISREG(os.fstat(file.fileno()).st_mode)


def _spooled(stream: IO[bytes]) -> IO[bytes]:
    with stream:
        copy = cast(IO[bytes], tempfile.TemporaryFile())  # noqa: SIM115
        try:
            shutil.copyfileobj(stream, copy, 1 << 20)
            copy.seek(0)
        except BaseException:
            copy.close()
            raise
    return copy
