"""Retention: which snapshots of a group are kept, and why; a decision without any I/O.

The rules are those that users of restic and borg know. Snapshots are taken from the newest to the
oldest; a rule of periods keeps the newest snapshot of each period, for as many periods as it was told.
Times are local, as people mean them.
"""

from __future__ import annotations

import re
from calendar import monthrange
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Generic, Protocol, TypeVar

from casfs.errors import UsageError

_PART = re.compile(r"([0-9]{1,6})(min|[a-z])")
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


def parse_duration(text: str, option: str) -> int:
    """Return seconds; units are s, m or min (minutes), h, d and w, together as in 1h30m."""
    parts = _parts(text)
    if not parts or any(unit not in _SECONDS for _, unit in parts):
        raise UsageError(f"{option} {text!r} is not a length of time such as 30d, 12h or 10m")
    return sum(number * _SECONDS[unit] for number, unit in parts)


class CalendarSpan:
    """A length of time by the calendar; units are y, m (months), w, d, h and min."""

    def __init__(self, text: str, option: str) -> None:
        parts = _parts(text)
        if not parts or any(unit not in ("y", "m", "w", "d", "h", "min") for _, unit in parts):
            raise UsageError(
                f"{option} {text!r} is not a length of time such as 1y6m, 30d or 36h "
                "(y, m for months, w, d, h, min)"
            )
        self._months = sum(n * (12 if unit == "y" else 1) for n, unit in parts if unit in "ym")
        self._seconds = sum(n * _SECONDS[unit] for n, unit in parts if unit not in "ym")
        self.text = text

    def before(self, moment: datetime) -> datetime:
        """Return the moment that lies so long before another; the earliest there is where it must."""
        months = moment.year * 12 + moment.month - 1 - self._months
        year, month = divmod(months, 12)
        if year < 1:
            return datetime.min
        day = min(moment.day, monthrange(year, month + 1)[1])
        try:
            earlier = moment.replace(year=year, month=month + 1, day=day)
            return earlier - timedelta(seconds=self._seconds)
        except OverflowError:
            return datetime.min


def _parts(text: str) -> list[tuple[int, str]]:
    found = _PART.findall(text)
    if "".join(number + unit for number, unit in found) != text:
        return []
    return [(int(number), unit) for number, unit in found]


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
    within: CalendarSpan | None = None
    tags: tuple[frozenset[str], ...] = ()

    def is_empty(self) -> bool:
        """Tell whether it would keep nothing."""
        counts = (self.last, self.hourly, self.daily, self.weekly, self.monthly, self.yearly)
        return not any(counts) and self.within is None and not self.tags


@dataclass(frozen=True, slots=True)
class KeepDecision(Generic[D]):
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


def apply_policy(snapshots: Iterable[D], policy: Policy) -> list[KeepDecision[D]]:
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
        since = policy.within.before(local_datetime(ordered[0].time_ns))
    verdicts = []
    for position, snapshot in enumerate(ordered):
        moment = local_datetime(snapshot.time_ns)
        reasons = [rule.name for rule in rules if rule.keeps(moment, position)]
        if since is not None and policy.within is not None and moment >= since:
            reasons.append(f"within {policy.within.text}")
        tags = set(snapshot.tags)
        reasons += [f"tag {','.join(sorted(wanted))}" for wanted in policy.tags if wanted <= tags]
        verdicts.append(KeepDecision(snapshot, tuple(reasons)))
    return verdicts


def local_datetime(time_ns: int) -> datetime:
    """Return a time as people on this machine mean it; the nearest where a calendar has none."""
    try:
        return datetime.fromtimestamp(time_ns // 1_000_000_000)
    except (OverflowError, ValueError, OSError):
        return datetime.max if time_ns > 0 else datetime.min
