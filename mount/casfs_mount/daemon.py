"""A background process whose parent waits until it is ready or has failed.

The fork comes before anything is opened: no database, thread or descriptor of a repository crosses it.
The child reports through a pipe, so the parent also notices when the child dies without a report.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import msgspec

from casfs.crypto.trust_state import state_folder
from casfs.errors import CasfsError, IntegrityError, LockedError, UsageError
from casfs_mount.logged_name import NamelessFormatter

log = logging.getLogger(__name__)

LOGGERS = ("casfs", "casfs_mount", "pyfuse3")
_SYSLOG = "/dev/log"
_MAX_REPORT_BYTES = 65536


class _Report(msgspec.Struct, frozen=True):
    """The one report of the background process: an empty message when it is ready, else the error."""

    message: str
    exit: int


class ReadinessPipe:
    """The child's end of the pipe on which its parent waits; call `ready` or `failed` once."""

    def __init__(self, pipe: int, log_file: Path | None) -> None:
        self._pipe = pipe
        self._log_file = log_file

    def ready(self) -> None:
        """Detach from the terminal, redirect the log, and report success to the parent."""
        log_to(self._log_file)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.close(null)
        self._send("", 0)

    def failed(self, message: str, code: int) -> None:
        """Report an error and its exit code to the parent."""
        self._send(message, code)

    def _send(self, message: str, code: int) -> None:
        if self._pipe >= 0:
            pipe, self._pipe = self._pipe, -1
            data = msgspec.msgpack.encode(_Report(message, code))[:_MAX_REPORT_BYTES]
            with contextlib.suppress(BrokenPipeError):
                os.write(pipe, data)
            os.close(pipe)


def run_in_background(work: Callable[[ReadinessPipe], None], log_file: Path | None) -> None:
    """Run `work` in a child process and return when it calls `ready`.

    If `work` fails before that, raise a CasfsError with the same message and exit code in this process.
    The child process exits when `work` returns; it never returns from this function.
    """
    check_log(log_file)
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run_child(work, ReadinessPipe(writing, log_file))
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as pipe:
            data = pipe.read(_MAX_REPORT_BYTES)
    except BaseException:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise
    if not data:
        _, status = os.waitpid(child, 0)
        raise CasfsError(f"the mount's server ended unexpectedly ({_ending(status)})")
    report = msgspec.msgpack.decode(data, type=_Report)
    if report.message:
        os.waitpid(child, 0)
        kinds = {kind.exit_code: kind for kind in (UsageError, IntegrityError, LockedError)}
        raise kinds.get(report.exit, CasfsError)(report.message)


def log_to(log_file: Path | None) -> None:
    """Send the log of casfs and its mount to a file, else to syslog, else to a file in the state folder.

    Where there is neither syslog nor a state folder, nothing is logged. Raises CasfsError if `log_file`
    cannot be written.
    """
    handler = _file_handler(log_file) if log_file is not None else _usual_handler()
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)
    # A failed write to the log must not print to a terminal that is closed.
    logging.raiseExceptions = False


def check_log(log_file: Path | None) -> None:
    """Raise CasfsError if the file that a user named for the log cannot be written."""
    if log_file is not None:
        _file_handler(log_file).close()


def _usual_handler() -> logging.Handler:
    if Path(_SYSLOG).exists():
        with contextlib.suppress(OSError):
            handler = logging.handlers.SysLogHandler(_SYSLOG)
            text = f"casfs[{os.getpid()}]: %(levelname)s %(message)s"
            handler.setFormatter(NamelessFormatter(text))
            return handler
    try:
        return _file_handler(state_folder(make=False) / "mount.log")
    except CasfsError:
        return logging.NullHandler()  # a mount does not need a log


def _file_handler(path: Path) -> logging.Handler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # It names files that not every user may know.
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600))
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise CasfsError(
            f"cannot write the log {path}: {error.strerror}; name another file with --log-file"
        ) from error
    handler.setFormatter(
        logging.Formatter("%(asctime)s casfs[%(process)d] %(levelname)s %(message)s")
    )
    return handler


@contextlib.contextmanager
def captured_stderr(said: list[str]) -> Iterator[None]:
    """Capture what libraries write to standard error, and append its lines to `said`."""
    sys.stderr.flush()
    kept = os.dup(2)
    catch = os.memfd_create("stderr", os.MFD_CLOEXEC)
    os.dup2(catch, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        size = os.lseek(catch, 0, os.SEEK_END)
        text = os.pread(catch, min(size, _MAX_REPORT_BYTES), 0).decode("utf-8", "backslashreplace")
        os.close(catch)
        said.extend(line.strip() for line in text.splitlines() if line.strip())


def _run_child(work: Callable[[ReadinessPipe], None], pipe: ReadinessPipe) -> NoReturn:
    code = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        work(pipe)
        code = 0
    except CasfsError as error:
        pipe.failed(str(error), error.exit_code)
        code = error.exit_code
    except KeyboardInterrupt:
        pipe.failed("interrupted", 130)
    except BaseException as error:
        log.exception("the mount's server ended: %r", error)
        pipe.failed(f"the mount's server ended: {error!r}", 1)
    finally:
        logging.shutdown()
        os._exit(code)


def _ending(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return f"exit code {os.waitstatus_to_exitcode(status)}"
