"""The command line: arguments in, messages and exit codes out (see docs/command-line.md)."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command and exit with its code."""
    from casfs.cli import standard_streams
    from casfs.cli.app import run
    from casfs.storage.interruption import INTERRUPTED

    standard_streams.install()
    code = run(sys.argv[1:])
    if INTERRUPTED.is_set():
        # The interpreter would wait for threads whose calls to a server nothing can end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
