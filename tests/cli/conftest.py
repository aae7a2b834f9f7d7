"""The command line, in this process and in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.embeddings.conftest import model_directory

__all__ = ["model_directory"]


# A tiny model gains nothing from threads, and loses much to them on a busy machine.
ENVIRONMENT = {**os.environ, "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


def without_warnings(text):
    """What remains where the compiled module is absent, which is told in a warning."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if "runs on the eager reference" not in line)


@pytest.fixture
def cli(capsys):
    """Run the command in this process: (status, stdout, stderr)."""
    from ctxfast.cli import main

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, without_warnings(captured.err)

    return run


@pytest.fixture
def command():
    """The command as the beginning of a list for subprocess, and a runner."""

    def run(*arguments, **options):
        line = [sys.executable, "-m", "ctxfast", *map(str, arguments)]
        done = subprocess.run(line, capture_output=True, env=ENVIRONMENT, timeout=240, **options)
        done.stderr = without_warnings(done.stderr.decode()).encode()
        return done

    return run
