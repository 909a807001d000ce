"""The command line: arguments in, sentences and exit codes out (see CLI.md's contract in the README)."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command and exit with its code."""
    from casfs.cli.app import run

    sys.exit(run(sys.argv[1:]))
