"""The interface through which the library reports: progress counters, and problems as they occur.

The library never prints. A command passes a `Monitor` that draws on the terminal or emits JSON lines.
"""

from __future__ import annotations

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


@dataclass(slots=True)
class Progress:
    """Progress counters of a command. One thread writes them, any thread may read them.

    `files` counts entries of all kinds where `total_entries` is known. Sizes are in bytes.
    """

    files: int = 0
    done_bytes: int = 0
    total_entries: int | None = None
    total_bytes: int | None = None
    path: bytes = b""


class Monitor(Protocol):
    """A receiver of progress and problems; `progress` is one object for the whole command."""

    progress: Progress

    def problem(self, problem: Problem) -> None:
        """Receive a problem. Called on the thread of the command."""


class RecordingMonitor:
    """A monitor that keeps problems in a list, for tests and for callers without a user interface."""

    def __init__(self) -> None:
        self.progress = Progress()
        self.problems: list[Problem] = []

    def problem(self, problem: Problem) -> None:
        """Append the problem to the list."""
        self.problems.append(problem)
