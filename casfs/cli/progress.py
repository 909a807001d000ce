"""The command line's monitor: prints problems as text or JSON lines, and progress where it is wanted.

Progress is a line of the terminal, or JSON lines with `--progress json`. A thread draws it.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from unicodedata import combining, east_asian_width

from casfs.cli.output import Output, json_path, terminal_line
from casfs.cli.standard_streams import OutputError
from casfs.display import escape_path, format_size
from casfs.monitor import EntryChange, Problem, Progress

log = logging.getLogger(__name__)

_REFRESH_S = 0.2
_JSON_INTERVAL_S = 1.0
_RATE_WINDOW_S = 10.0
"""The rate is that of the last seconds: a slow beginning does not spoil the remaining time."""

_MIN_RATE_S = 1.0
"""No rate is shown before: the first measurements jump."""

_MIN_PATH_CELLS = 12


class ProgressMode(StrEnum):
    """Where progress goes: to a terminal if standard error is one, nowhere, or to the JSON lines."""

    AUTO = "auto"
    NEVER = "never"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Verbosity:
    """The options of a command about its output besides the result."""

    progress: ProgressMode = ProgressMode.AUTO
    verbose: bool = False
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class ProgressState:
    """The progress of a command at one moment. Rates are in bytes per second; None is unknown."""

    stage: str
    unit: str
    items: int
    total_items: int | None
    done_bytes: int
    total_bytes: int | None
    is_estimate: bool
    elapsed_s: float
    rate: float | None
    path: bytes
    again_bytes: int = 0

    @property
    def share(self) -> float | None:
        """The finished share of the stage, by bytes where their total is known, from 0 to 1."""
        for done, total in ((self.done_bytes, self.total_bytes), (self.items, self.total_items)):
            if total:
                return done / total if done <= total else None
        return None

    @property
    def remaining_s(self) -> float | None:
        """The remaining seconds at the current rate."""
        if self.total_bytes is None or not self.rate or self.done_bytes > self.total_bytes:
            return None
        return (self.total_bytes - self.done_bytes) / self.rate


class ProgressMeter:
    """Measure the rate of a command's progress; `clock` returns seconds. One thread."""

    def __init__(self, progress: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        self._progress = progress
        self._clock = clock
        self._began_s = clock()
        self._stage = progress.stage
        self._samples: deque[tuple[float, int]] = deque()

    def measure(self) -> ProgressState:
        """Return the state now."""
        progress, now_s = self._progress, self._clock()
        stage = progress.stage
        done = progress.done_bytes + progress.file_bytes
        moved = done + progress.again_bytes
        if stage != self._stage or (self._samples and moved < self._samples[-1][1]):
            # Another stage, or a file that is read again from its beginning.
            self._samples.clear()
            self._stage = stage
        self._samples.append((now_s, moved))
        while len(self._samples) > 2 and now_s - self._samples[0][0] > _RATE_WINDOW_S:
            self._samples.popleft()
        first_s, first_bytes = self._samples[0]
        rate = None
        if now_s - first_s >= _MIN_RATE_S:
            rate = (moved - first_bytes) / (now_s - first_s)
        return ProgressState(
            stage,
            progress.unit.value,
            progress.items,
            progress.total_items,
            done,
            progress.total_bytes,
            progress.is_estimate,
            now_s - self._began_s,
            rate,
            progress.path,
            progress.again_bytes,
        )


def progress_line(verb: str, state: ProgressState, width: int) -> str:
    """Return the progress as one line of at most `width` cells; what does not fit is left out."""
    about = "~" if state.is_estimate else ""
    fields = []
    if state.share is not None:
        fields.append(f"{about}{int(state.share * 100)} %")
    if state.done_bytes or state.total_bytes:
        of = f" of {about}{format_size(state.total_bytes)}" if state.total_bytes else ""
        fields.append(f"{format_size(state.done_bytes)}{of}")
    if state.rate is not None and (state.rate or state.total_bytes):
        fields.append(f"{format_size(state.rate)}/s")
    if state.remaining_s is not None:
        fields.append(f"{about}{format_duration(state.remaining_s)} left")
    fields.append(format_duration(state.elapsed_s))
    if state.items or state.total_items:
        of = f" of {about}{state.total_items}" if state.total_items is not None else ""
        fields.append(f"{state.items}{of} {state.unit}")
    line = f"{verb}: {state.stage}" if state.stage else f"{verb}:"
    for field in fields:
        longer = f"{line} {field}" if line.endswith(":") else f"{line}  {field}"
        if len(longer) > width:
            break
        line = longer
    line = line[:width]
    path = escape_path(state.path)
    if state.again_bytes:
        path += f" (read again: {format_size(state.again_bytes)})"
    room = width - len(line) - 2
    return f"{line}  {shorten(path, room)}" if path and room >= _MIN_PATH_CELLS else line


def format_duration(seconds: float) -> str:
    """Return a duration as minutes and seconds, or with hours."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def cells_of(text: str) -> int:
    """Return the width of a text on a terminal."""
    if text.isascii():
        return len(text)
    return sum(map(_cells, text))


def shorten(text: str, room: int) -> str:
    """Return a text of at most `room` cells, without its beginning where it is longer."""
    if cells_of(text) <= room:
        return text
    kept: list[str] = []
    left = room - 1
    for character in reversed(text):
        left -= _cells(character)
        if left < 0:
            break
        kept.append(character)
    return "…" + "".join(reversed(kept))


def _cells(character: str) -> int:
    if combining(character):
        return 0
    return 2 if east_asian_width(character) in "WF" else 1


class CommandMonitor:
    """Report problems and progress of one command to the user; use it in a `with` block around the work.

    `source_path` turns a path of a snapshot into the path of the source, for text messages only. A thread
    draws the progress; `problem` and `entry` are called from the thread that does the work.
    """

    def __init__(
        self,
        output: Output,
        verb: str,
        source_path: Callable[[bytes], bytes] | None = None,
        verbosity: Verbosity | None = None,
    ) -> None:
        self.progress = Progress()
        self.problems = 0
        self._output = output
        self._source_path = source_path if source_path is not None else _same_path
        self._verb = verb
        self._verbosity = verbosity if verbosity is not None else Verbosity()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def problem(self, problem: Problem) -> None:
        """Print a problem at once."""
        self.problems += 1
        message = f"{escape_path(self._source_path(problem.path)) or '/'}: {problem.message}"
        self._output.warn(message)
        self._output.emit(
            "problem",
            kind=problem.kind.value,
            **json_path(problem.path),
            message=problem.message,
            **problem.details,
        )

    def entry(self, path: bytes, change: EntryChange) -> None:
        """Print a file that was read or written, with --verbose."""
        if self._verbosity.verbose:
            self._output.line(f"{change.value:<8}  {escape_path(self._source_path(path))}")
            self._output.emit("entry", change=change.value, **json_path(path))

    def __enter__(self) -> CommandMonitor:
        draw = self._drawing()
        if draw is not None:
            self._thread = threading.Thread(
                target=self._run, args=(draw,), name="casfs-progress", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            terminal_line.clear()

    def _drawing(self) -> Callable[[], None] | None:
        """Return the function that draws the progress until the end, None where none is wanted."""
        mode = self._verbosity.progress
        if mode == ProgressMode.JSON:
            return self._emit
        is_shown = mode == ProgressMode.AUTO and not self._verbosity.quiet and sys.stderr.isatty()
        return self._draw if is_shown else None

    def _run(self, draw: Callable[[], None]) -> None:
        try:
            draw()
        except OutputError:
            return  # the command reports it
        except Exception as error:
            log.debug("the progress cannot be shown: %s", error)

    def _draw(self) -> None:
        meter = ProgressMeter(self.progress)
        while not self._done.wait(_REFRESH_S):
            # The last column stays free: some terminals begin a new line after it.
            width = max(os.get_terminal_size(2).columns - 1, 1)
            line = progress_line(self._verb, meter.measure(), width)
            terminal_line.show(line, cells_of(line))

    def _emit(self) -> None:
        meter = ProgressMeter(self.progress)
        while not self._done.wait(_JSON_INTERVAL_S):
            state = meter.measure()
            self._output.emit(
                "progress",
                verb=self._verb,
                stage=state.stage or None,
                unit=state.unit,
                items=state.items,
                total_items=state.total_items,
                done_bytes=state.done_bytes,
                total_bytes=state.total_bytes,
                reread_bytes=state.again_bytes,
                is_estimate=state.is_estimate,
                bytes_per_second=round(state.rate) if state.rate is not None else None,
                elapsed_seconds=round(state.elapsed_s, 3),
                remaining_seconds=round(state.remaining_s)
                if state.remaining_s is not None
                else None,
                **json_path(state.path),
            )
            sys.stdout.flush()


def _same_path(path: bytes) -> bytes:
    return path
