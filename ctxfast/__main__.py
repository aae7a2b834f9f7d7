"""`python -m ctxfast` is the `ctxfast` command."""

import sys

from ctxfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
