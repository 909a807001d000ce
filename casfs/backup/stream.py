"""The stream that a backup reads in place of files: standard input, or the output of a command."""

from __future__ import annotations

import shlex
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from casfs.errors import CasfsError

_END_TIMEOUT_S = 5.0


@contextmanager
def open_stream(command: Sequence[str]) -> Iterator[int]:
    """Yield the descriptor of a command's output, or that of standard input without a command.

    At the end of the block, raise CasfsError if the command failed: its output may be incomplete then. Where
    the block raises, end the command.
    """
    if not command:
        yield 0
        return
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CasfsError(
            f"the command {shlex.join(command)} cannot be run: {reason}; nothing was published"
        ) from error
    assert process.stdout is not None
    try:
        yield process.stdout.fileno()
        process.wait()
    finally:
        process.stdout.close()
        _end(process)
    if process.returncode:
        raise CasfsError(
            f"the command {shlex.join(command)} {_outcome(process.returncode)}; nothing was published"
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command that still runs, by force if it does not end when it is asked to."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _outcome(code: int) -> str:
    if code > 0:
        return f"failed with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
