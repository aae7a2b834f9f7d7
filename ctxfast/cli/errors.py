"""Exit statuses, and errors as one sentence on stderr."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, NoReturn

import typer

FAILURE, USAGE, INTERRUPTED = 1, 2, 130
# Click is a dependency of some Typer releases and a private part of others.
UsageError, ClickException = typer.BadParameter.__mro__[1:3]

_debug = False


def _set_debug(value: bool) -> None:
    global _debug
    _debug = _debug or value


Debug = Annotated[
    bool, typer.Option("--debug", callback=_set_debug, help="Show the traceback of an error.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def run(app: typer.Typer, arguments: Sequence[str]) -> int:
    """Run `app` and return the exit status; what went wrong is said in one sentence on stderr."""
    global _debug
    _debug = False
    command = typer.main.get_command(app)
    name = next((f"ctxfast {word}" for word in arguments if not word.startswith("-")), "ctxfast")
    try:
        with _warnings_on_one_line(), _unwinding_on_sigterm():
            status = command.main(list(arguments), prog_name="ctxfast", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except Exception as error:
        if _debug:
            traceback.print_exc()
        return _report(name, error)
    if status == INTERRUPTED:
        print(f"{name}: interrupted", file=sys.stderr)
    return status if isinstance(status, int) else 0


@contextmanager
def _unwinding_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM an exception, so that partial files are removed."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _warnings_on_one_line() -> Iterator[None]:
    """Python's warnings and ctxfast's log messages as sentences on stderr."""
    logger = logging.getLogger("ctxfast")
    handler = _OneLine(logging.WARNING)
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *where, **more: _warn(str(message))
            yield
    finally:
        logger.removeHandler(handler)


class _OneLine(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _warn(record.getMessage())


def _warn(message: str) -> None:
    print(f"ctxfast: warning: {' '.join(message.split())}", file=sys.stderr)


def _report(name: str, error: Exception) -> int:
    from ctxfast.embeddings import OptionError

    if isinstance(error, UsageError):
        path = error.ctx.command_path if error.ctx else name  # type: ignore[attr-defined]
        message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        print(f"{path}: {message} (see {path} --help)", file=sys.stderr)
        return USAGE
    message = sentence(error)
    prefix = name.removeprefix("ctxfast ") + ": "
    print(f"{name}: {message.removeprefix(prefix)}", file=sys.stderr)
    return USAGE if isinstance(error, OptionError) else FAILURE


def sentence(error: Exception) -> str:
    """What went wrong, on one line."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return where + error.strerror.lower()
    text = " ".join(str(error).split())
    if isinstance(error, OSError):  # HDF5's own text, with the system's somewhere inside
        inner = re.search(r"error message = '([^']+)'", text)
        text = inner[1].lower() if inner else text
    if not text or not isinstance(error, OSError | ValueError | TypeError | RuntimeError):
        return f"{type(error).__name__}: {text}".rstrip(": ")
    return text
