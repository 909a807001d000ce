"""What the library tells about its progress: counters that are read at leisure, and problems as they come.

The library never prints. A command passes a `Monitor`; the terminal's draws, the JSON one emits lines,
a test's records.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol


class ProblemKind(StrEnum):
    """What went wrong with one entry; none of them ends the command."""

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
    """One entry that was not handled as the user would expect; `path` as in the snapshot."""

    kind: ProblemKind
    path: bytes
    message: str
    details: dict[str, str | int | None] = field(default_factory=dict)


@dataclass(slots=True)
class Progress:
    """How far a command is; written by one thread, read by any.

    Where a total is known, `files` counts entries of all kinds.
    """

    files: int = 0
    done_bytes: int = 0
    total_entries: int | None = None
    total_bytes: int | None = None
    path: bytes = b""


class Monitor(Protocol):
    """Who is told; `progress` is one object for the whole command."""

    progress: Progress

    def problem(self, problem: Problem) -> None:
        """Take note of a problem."""


class RecordingMonitor:
    """Keep problems in a list: for callers without a user to tell, and for tests."""

    def __init__(self) -> None:
        self.progress = Progress()
        self.problems: list[Problem] = []

    def problem(self, problem: Problem) -> None:
        """Keep it."""
        self.problems.append(problem)
