"""The command line's monitor: prints problems as text or JSON lines, progress only on a terminal."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from casfs.cli.output import Output, json_path
from casfs.display import escape_path, format_size
from casfs.monitor import Problem, Progress

if TYPE_CHECKING:
    from rich.status import Status

_REFRESH_S = 0.2


class CommandMonitor:
    """Report problems and progress of one command to the user; use it in a `with` block around the work.

    `source_path` turns a path of a snapshot into the path of the source, for text messages only. A thread
    draws the progress; `problem` is called from the thread that does the work.
    """

    def __init__(
        self, output: Output, verb: str, source_path: Callable[[bytes], bytes] | None = None
    ) -> None:
        self.progress = Progress()
        self.problems = 0
        self._output = output
        self._source_path = source_path if source_path is not None else _same_path
        self._verb = verb
        self._status: Status | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def problem(self, problem: Problem) -> None:
        """Print a problem at once."""
        self.problems += 1
        message = f"{escape_path(self._source_path(problem.path)) or '/'}: {problem.message}"
        if self._status is not None:
            self._status.console.print(
                f"casfs: {message}", markup=False, highlight=False, soft_wrap=True
            )
        else:
            self._output.warn(message)
        self._output.emit(
            "problem",
            kind=problem.kind.value,
            **json_path(problem.path),
            message=problem.message,
            **problem.details,
        )

    def __enter__(self) -> CommandMonitor:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.status import Status

            self._status = Status(self._verb, console=Console(stderr=True))
            self._status.start()
            self._thread = threading.Thread(target=self._draw, name="casfs-progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        if self._thread is not None and self._status is not None:
            self._thread.join()
            self._status.stop()
            self._status = None

    def _draw(self) -> None:
        from rich.markup import escape

        assert self._status is not None
        while not self._done.wait(_REFRESH_S):
            progress = self.progress
            files = f"{progress.files} files"
            if progress.total_entries is not None:
                files = f"{progress.files} of {progress.total_entries} entries"
            path = escape_path(progress.path)[-60:]
            text = f"{self._verb}: {files}, {format_size(progress.done_bytes)}  {path}"
            self._status.update(escape(text))


def _same_path(path: bytes) -> bytes:
    return path
