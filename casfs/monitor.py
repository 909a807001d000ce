"""The interface through which the library reports: progress counters, and problems as they occur.

The library never prints. A command passes a `Monitor` that draws on the terminal or emits JSON lines.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol


class ProblemKind(StrEnum):
    """The kind of a problem with one entry. No problem ends the command."""

    UNREADABLE = "unreadable"
    VANISHED = "vanished"
    CHANGED = "changed"
    APPENDED = "appended"
    SILENTLY_CHANGED = "silently changed"
    MISSING_SOURCE = "missing source"
    REPOSITORY = "repository left out"
    DAMAGED = "damaged"
    METADATA = "metadata"
    UNSAFE = "unsafe"
    LEFT_OUT = "left out"
    UNMATCHED_PATTERN = "unmatched pattern"


@dataclass(frozen=True, slots=True)
class Problem:
    """An unexpected result for one entry; `path` is its path in the snapshot."""

    kind: ProblemKind
    path: bytes
    message: str
    details: dict[str, str | int | None] = field(default_factory=dict)


class EntryChange(StrEnum):
    """What a command does with a file: how a backup found it beside the parent snapshot, or a restore."""

    NEW = "new"
    MODIFIED = "modified"
    RESTORE = "restore"


class Unit(StrEnum):
    """What `Progress.items` counts."""

    FILES = "files"
    ENTRIES = "entries"
    SNAPSHOTS = "snapshots"
    PACKS = "packs"
    OBJECTS = "objects"


@dataclass(slots=True)
class Progress:
    """Progress counters of a command, which moves through stages. Sizes are in bytes.

    `done_bytes` are those of finished entries, `file_bytes` those of the current file so far, and
    `again_bytes` those of the current file that were read a second time. A total is None where it is
    unknown, and `is_estimate` is set where it comes from the previous snapshot. One thread writes the
    counters, except through `add_bytes`; any thread may read them.
    """

    stage: str = ""
    unit: Unit = Unit.FILES
    items: int = 0
    done_bytes: int = 0
    file_bytes: int = 0
    again_bytes: int = 0
    total_items: int | None = None
    total_bytes: int | None = None
    is_estimate: bool = False
    path: bytes = b""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(
        self,
        stage: str,
        unit: Unit,
        *,
        total_items: int | None = None,
        total_bytes: int | None = None,
        is_estimate: bool = False,
    ) -> None:
        """Begin a stage: all counters begin at zero."""
        self.stage, self.unit, self.path = stage, unit, b""
        self.items = self.done_bytes = self.file_bytes = self.again_bytes = 0
        self.total_items, self.total_bytes, self.is_estimate = total_items, total_bytes, is_estimate

    def begin_file(self) -> None:
        """Begin a file, or begin it again."""
        self.file_bytes = self.again_bytes = 0

    def finish_file(self, size: int) -> None:
        """Count a file of this size as finished."""
        self.done_bytes += size
        self.file_bytes = self.again_bytes = 0

    def read_bytes(self, count: int) -> None:
        """Count bytes of the current file."""
        self.file_bytes += count

    def read_bytes_again(self, count: int) -> None:
        """Count bytes of the current file that are read a second time."""
        self.again_bytes += count

    def add_bytes(self, count: int) -> None:
        """Add to `done_bytes`, from any thread."""
        with self._lock:
            self.done_bytes += count


class Monitor(Protocol):
    """A receiver of progress and problems; `progress` is one object for the whole command."""

    progress: Progress

    def problem(self, problem: Problem) -> None:
        """Receive a problem. Called on the thread of the command."""

    def entry(self, path: bytes, change: EntryChange) -> None:
        """Receive a file that was read or written. Called on the thread of the command."""


class RecordingMonitor:
    """A monitor that keeps problems in a list, for tests and for callers without a user interface."""

    def __init__(self) -> None:
        self.progress = Progress()
        self.problems: list[Problem] = []

    def problem(self, problem: Problem) -> None:
        """Append the problem to the list."""
        self.problems.append(problem)

    def entry(self, path: bytes, change: EntryChange) -> None:
        """Ignore the file: the snapshot holds it."""
