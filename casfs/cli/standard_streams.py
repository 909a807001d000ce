"""Standard output and standard error, on which a write is complete or an error.

Python's own streams lose data where a write is partial: on a full disk, on a pipe that another process
made non-blocking, and with PYTHONUNBUFFERED. They also raise OSError, which a command could take for an
error of the file that it works on. The streams here write everything, wait where a pipe is full, and
raise `OutputError` once; afterwards they drop all output. Where `keep_working` was called, they raise
nothing, so that a command whose reader has gone away finishes what it began. Errors of standard error
are ignored.
"""

from __future__ import annotations

import io
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_BUFFER_BYTES = 64 * 1024


class OutputError(Exception):
    """Standard output cannot be written; `cause` is the error of the system."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(cause)
        self.cause = cause


class CompleteWriter(io.RawIOBase):
    """An unbuffered stream on a descriptor, which it does not close.

    `error` is the first error of a write; later writes do nothing. With `raises` the first error raises
    OutputError.
    """

    def __init__(self, fd: int, raises: bool) -> None:
        super().__init__()
        self.raises = raises
        self.error: OSError | None = None
        self._fd = fd

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, data: ReadableBuffer, /) -> int:
        """Write all of `data`, or record the error."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view) and self.error is None:
            try:
                done += os.write(self._fd, view[done:])
            except BlockingIOError:
                _wait_until_writable(self._fd)
            except OSError as error:
                self.error = error
                if self.raises:
                    raise OutputError(error) from error
        return len(view)


class _StandardOutput:
    """The stream that `install` put in the place of standard output, if it did."""

    writer: CompleteWriter | None = None


def install() -> None:
    """Replace `sys.stdout` and `sys.stderr`; open the null device where the parent process closed one."""
    _open_closed_descriptors()
    _StandardOutput.writer = CompleteWriter(1, raises=True)
    sys.stdout = _text_stream(_StandardOutput.writer, sys.stdout)
    sys.stderr = _text_stream(CompleteWriter(2, raises=False), sys.stderr, line_buffering=True)


def keep_working() -> None:
    """Let the command finish its work even if its output cannot be written."""
    if _StandardOutput.writer is not None:
        _StandardOutput.writer.raises = False


def write_error() -> OSError | None:
    """Flush standard output; return the error that it has met, or None."""
    sys.stdout.flush()
    writer = _StandardOutput.writer
    return writer.error if writer is not None else None


def _text_stream(
    writer: CompleteWriter, before: TextIO | None, line_buffering: bool = False
) -> TextIO:
    if isinstance(before, io.TextIOWrapper):
        before.flush()
        line_buffering = line_buffering or before.line_buffering or before.write_through
    return io.TextIOWrapper(
        io.BufferedWriter(writer, _BUFFER_BYTES),
        encoding=before.encoding if before is not None else "utf-8",
        errors="backslashreplace",
        line_buffering=line_buffering,
    )


def _open_closed_descriptors() -> None:
    """Open the null device for each of stdin, stdout and stderr that the parent process closed.

    Otherwise a file of the repository would get that descriptor number: a read of stdin would read it,
    and any message would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # open(2) returns the lowest free number, which is this one.
            fd = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            os.set_inheritable(fd, True)


def _wait_until_writable(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()
