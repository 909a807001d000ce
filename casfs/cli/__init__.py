"""The command line: arguments in, messages and exit codes out (see docs/command-line.md)."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def main() -> None:
    """Run the command and exit with its code."""
    from casfs.cli.app import run
    from casfs.storage.interruption import INTERRUPTED

    code = run(sys.argv[1:])
    if INTERRUPTED.is_set():
        # The interpreter would wait for threads whose calls to a server nothing can end.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)
