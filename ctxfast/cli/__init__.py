"""The `ctxfast` command: parsing and printing; each command is one call into the library."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 (failure), 2 (bad arguments), 130."""
    try:
        from ctxfast.cli.app import app
        from ctxfast.cli.errors import run

        return run(app, sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        return 130
