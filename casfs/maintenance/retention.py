"""Retention: which snapshots of a group are kept, and why; a decision without any I/O.

The rules are those that users of restic and borg know. Snapshots are taken from the newest to the
oldest; a rule of periods keeps the newest snapshot of each period, for as many periods as it was told.
Times are local, as people mean them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, Protocol, TypeVar

from casfs.maintenance.durations import Span

UNLIMITED = -1


class Dated(Protocol):
    """What is kept or forgotten."""

    @property
    def time_ns(self) -> int:
        """Nanoseconds since 1970."""

    @property
    def tags(self) -> tuple[str, ...]:
        """Tags of the snapshot."""


D = TypeVar("D", bound=Dated)


@dataclass(frozen=True, slots=True)
class Policy:
    """How many snapshots to keep; `UNLIMITED` keeps one for every period.

    `within` keeps all that are no older than so long before the newest of the group; a snapshot with
    all the tags of one set in `tags` is kept always.
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: Span | None = None
    tags: tuple[frozenset[str], ...] = ()

    def is_empty(self) -> bool:
        """Tell whether it would keep nothing."""
        counts = (self.last, self.hourly, self.daily, self.weekly, self.monthly, self.yearly)
        return not any(counts) and self.within is None and not self.tags


@dataclass(frozen=True, slots=True)
class Verdict(Generic[D]):
    """A snapshot and the rules that keep it; with none it is forgotten."""

    snapshot: D
    reasons: tuple[str, ...]

    @property
    def is_kept(self) -> bool:
        """Tell whether it stays."""
        return bool(self.reasons)


@dataclass(slots=True)
class _Rule:
    name: str
    left: int
    period_of: Callable[[datetime, int], object]
    newest: object = None

    def keeps(self, moment: datetime, position: int) -> bool:
        """Tell whether this rule keeps a snapshot; asked from the newest on."""
        if self.left == 0:
            return False
        period = self.period_of(moment, position)
        if period == self.newest:
            return False
        self.newest = period
        if self.left > 0:
            self.left -= 1
        return True


def decide(snapshots: Iterable[D], policy: Policy) -> list[Verdict[D]]:
    """Return a verdict on each snapshot of one group, from the newest to the oldest."""
    ordered: Sequence[D] = sorted(snapshots, key=lambda item: item.time_ns, reverse=True)
    rules = (
        _Rule("last", policy.last, lambda moment, position: position),
        _Rule("hourly", policy.hourly, lambda moment, _: (moment.date(), moment.hour)),
        _Rule("daily", policy.daily, lambda moment, _: moment.date()),
        _Rule("weekly", policy.weekly, lambda moment, _: moment.isocalendar()[:2]),
        _Rule("monthly", policy.monthly, lambda moment, _: (moment.year, moment.month)),
        _Rule("yearly", policy.yearly, lambda moment, _: moment.year),
    )
    since = None
    if policy.within is not None and ordered:
        since = policy.within.before(local(ordered[0].time_ns))
    verdicts = []
    for position, snapshot in enumerate(ordered):
        moment = local(snapshot.time_ns)
        reasons = [rule.name for rule in rules if rule.keeps(moment, position)]
        if since is not None and policy.within is not None and moment >= since:
            reasons.append(f"within {policy.within.text}")
        tags = set(snapshot.tags)
        reasons += [f"tag {','.join(sorted(wanted))}" for wanted in policy.tags if wanted <= tags]
        verdicts.append(Verdict(snapshot, tuple(reasons)))
    return verdicts


def local(time_ns: int) -> datetime:
    """Return a time as people on this machine mean it; the nearest where a calendar has none."""
    try:
        return datetime.fromtimestamp(time_ns // 1_000_000_000)
    except (OverflowError, ValueError, OSError):
        return datetime.max if time_ns > 0 else datetime.min
