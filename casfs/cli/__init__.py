"""The command line: arguments in, messages and exit codes out (see docs/command-line.md)."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command and exit with its code."""
    from casfs.cli.app import run

    sys.exit(run(sys.argv[1:]))
