"""The outcome of a run: each step, each hook, one exit code and one summary.

The summary is the same value everywhere: the JSON line of `casfs run --json`, standard input of hooks, the
text of a notification, the body of a ping.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

import msgspec

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_UNREADABLE = 3
EXIT_CHANGED = 4
EXIT_DAMAGED = 5
EXIT_LOCKED = 6
EXIT_INTERRUPTED = 130

# From best to worst. Damage outranks a step that failed, which may succeed the next time; an interruption
# outranks both because it says that the rest was not tried.
_SEVERITY = (
    EXIT_DONE,
    EXIT_CHANGED,
    EXIT_UNREADABLE,
    EXIT_LOCKED,
    EXIT_FAILED,
    2,
    EXIT_DAMAGED,
    EXIT_INTERRUPTED,
)

JsonObject = dict[str, Any]
"""An object that another process printed; its fields are documented with the verb that prints it."""


class StepName(StrEnum):
    """The steps of a run, in their order."""

    BACKUP = "backup"
    FORGET = "forget"
    PRUNE = "prune"
    CHECK = "check"
    MIRROR = "mirror"


class StepStatus(StrEnum):
    """Whether a step ran, and why not."""

    RAN = "ran"
    NOT_DUE = "not due"
    SKIPPED = "skipped"


class Outcome(StrEnum):
    """A run as a whole: all is well, a snapshot has warnings, or a person has to act."""

    SUCCESS = "success"
    WARNING = "warning"
    FAILED = "failed"


class StepOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a run.

    `exit` is the exit code of its command, None where it did not run. `target` is the repository that a
    mirror writes to. `reason` says why it did not run, or what its command said when it failed.
    `result` is the last JSON object that the command printed, `problems` the first few problems.
    """

    step: StepName
    target: str | None = msgspec.field(default=None, name="mirror_to")
    status: StepStatus = StepStatus.RAN
    exit: int | None = None
    started_s: float | None = None
    seconds: float = 0.0
    reason: str | None = None
    result: JsonObject | None = None
    problems: tuple[JsonObject, ...] = ()
    problem_count: int = 0

    @property
    def title(self) -> str:
        """Return the name of the step for display."""
        return f"{self.step} to {self.target}" if self.target is not None else str(self.step)

    def number(self, field: str) -> int | None:
        """Return a whole number from the result, or None if it has none in this field."""
        value = self.result.get(field) if self.result is not None else None
        return value if type(value) is int else None


class HookOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """A hook that was run; `exit` is that of its shell, or 128 and the signal that ended it."""

    hook: str
    exit: int
    seconds: float


class RunSummary(msgspec.Struct, frozen=True, kw_only=True, tag="run", tag_field="type"):
    """A run so far, or as it ended; `snapshot` is the id of the one that it published."""

    profile: str
    repository: str
    host: str
    started: str
    seconds: float = 0.0
    exit: int = 0
    outcome: Outcome = Outcome.SUCCESS
    snapshot: str | None = None
    error: str | None = None
    steps: tuple[StepOutcome, ...] = ()
    hooks: tuple[HookOutcome, ...] = ()


def worst_exit(codes: Iterable[int]) -> int:
    """Return the worst of some exit codes; an unknown code counts as a failure."""
    known = [code if code in _SEVERITY else EXIT_FAILED for code in codes]
    return max(known, key=_SEVERITY.index, default=EXIT_DONE)


def outcome_of(code: int) -> Outcome:
    """Return the outcome that an exit code means.

    Unreadable sources are a failure, because a disk that is not mounted looks like that.
    """
    if code == EXIT_DONE:
        return Outcome.SUCCESS
    return Outcome.WARNING if code == EXIT_CHANGED else Outcome.FAILED
