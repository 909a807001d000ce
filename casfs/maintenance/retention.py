"""Retention: decide which snapshots of a group to keep, and by which rules, without any I/O.

The rules are those of `restic forget` and `borg prune`. Snapshots are visited from the newest to the
oldest; a period rule keeps the newest snapshot of each period, for the given number of periods. Periods
are calendar periods in local time.
"""

from __future__ import annotations

import re
from calendar import monthrange
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, Protocol, TypeVar

from casfs.errors import UsageError
from casfs.repository.snapshot_filter import is_from_future

_PART = re.compile(r"([0-9]{1,6})(min|[a-z])")
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


_EARLIEST_NS = -(1 << 63)


def parse_duration(text: str, option: str) -> int:
    """Return seconds; units are s, m or min (minutes), h, d and w, and combine as in 1h30m.

    Raises UsageError, naming `option`, for any other text.
    """
    parts = _parts(text)
    if not parts or any(unit not in _SECONDS for _, unit in parts):
        raise UsageError(f"{option} {text!r} is not a duration such as 30d, 12h or 10m")
    return sum(number * _SECONDS[unit] for number, unit in parts)


class CalendarSpan:
    """A duration of y and m (months), which are those of the calendar, and of w, d, h and min.

    Raises UsageError, naming `option`, for any other text.
    """

    def __init__(self, text: str, option: str) -> None:
        parts = _parts(text)
        if not parts or any(unit not in ("y", "m", "w", "d", "h", "min") for _, unit in parts):
            raise UsageError(
                f"{option} {text!r} is not a duration such as 1y6m, 30d or 36h "
                "(y, m for months, w, d, h, min)"
            )
        self._months = sum(n * (12 if unit == "y" else 1) for n, unit in parts if unit in "ym")
        self._seconds = sum(n * _SECONDS[unit] for n, unit in parts if unit not in "ym")
        self.text = text

    def before_ns(self, time_ns: int) -> int:
        """Return the time this duration before another, in nanoseconds since 1970.

        Years and months follow the calendar of the local time zone. Everything else is elapsed time, which
        no change of the clock makes shorter or longer.
        """
        return self._months_before_ns(time_ns) - self._seconds * 1_000_000_000

    def _months_before_ns(self, time_ns: int) -> int:
        if not self._months:
            return time_ns
        moment = local_datetime(time_ns)
        year, month = divmod(moment.year * 12 + moment.month - 1 - self._months, 12)
        if year < 1:
            return _EARLIEST_NS
        day = min(moment.day, monthrange(year, month + 1)[1])
        try:
            seconds = moment.replace(year=year, month=month + 1, day=day).timestamp()
        except (OverflowError, ValueError):
            return _EARLIEST_NS
        return int(seconds) * 1_000_000_000 + time_ns % 1_000_000_000


def _parts(text: str) -> list[tuple[int, str]]:
    found = _PART.findall(text)
    if "".join(number + unit for number, unit in found) != text:
        return []
    return [(int(number), unit) for number, unit in found]


UNLIMITED = -1


class Dated(Protocol):
    """An item with a time and tags, which a policy keeps or forgets."""

    @property
    def time_ns(self) -> int:
        """Nanoseconds since 1970."""

    @property
    def tags(self) -> tuple[str, ...]:
        """Tags of the snapshot."""


D = TypeVar("D", bound=Dated)


@dataclass(frozen=True, slots=True)
class Policy:
    """The number of snapshots that each rule keeps; `UNLIMITED` keeps one for every period.

    `within` keeps all snapshots no older than this duration before the newest of the group. A snapshot
    with all the tags of one set in `tags` is always kept.
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
        """Return whether the policy has no rule and would keep nothing."""
        counts = (self.last, self.hourly, self.daily, self.weekly, self.monthly, self.yearly)
        return not any(counts) and self.within is None and not self.tags


@dataclass(frozen=True, slots=True)
class KeepDecision(Generic[D]):
    """A snapshot and the rules that keep it; a snapshot without such a rule is forgotten."""

    snapshot: D
    reasons: tuple[str, ...]

    @property
    def is_kept(self) -> bool:
        """Return whether any rule keeps the snapshot."""
        return bool(self.reasons)

    @property
    def is_from_future(self) -> bool:
        """Return whether the snapshot is kept because it is from the future."""
        return self.reasons == (FUTURE,)


@dataclass(slots=True)
class _Rule:
    name: str
    remaining: int
    period_of: Callable[[datetime, int], object]
    newest: object = None

    def keeps(self, moment: datetime, position: int) -> bool:
        """Return whether this rule keeps a snapshot. Call in order, newest snapshot first."""
        if self.remaining == 0:
            return False
        period = self.period_of(moment, position)
        if period == self.newest:
            return False
        self.newest = period
        if self.remaining > 0:
            self.remaining -= 1
        return True


FUTURE = "future"
"""The reason that keeps a snapshot from the future."""


def apply_policy(
    snapshots: Iterable[D], policy: Policy, now_ns: int | None = None
) -> list[KeepDecision[D]]:
    """Return the decision on each snapshot of one group, from the newest to the oldest.

    A snapshot from the future of `now_ns` (None: there is none) is kept and counts in no rule, so that one
    wrong clock does not decide about the snapshots of all others.
    """
    ordered: Sequence[D] = sorted(snapshots, key=lambda item: item.time_ns, reverse=True)
    rules = (
        _Rule("last", policy.last, lambda moment, position: position),
        # The hour that a change of the clock repeats is two hours.
        _Rule("hourly", policy.hourly, lambda moment, _: (moment.date(), moment.hour, moment.fold)),
        _Rule("daily", policy.daily, lambda moment, _: moment.date()),
        _Rule("weekly", policy.weekly, lambda moment, _: moment.isocalendar()[:2]),
        _Rule("monthly", policy.monthly, lambda moment, _: (moment.year, moment.month)),
        _Rule("yearly", policy.yearly, lambda moment, _: moment.year),
    )
    since_ns = None
    decisions = []
    for position, snapshot in enumerate(ordered):
        if now_ns is not None and is_from_future(snapshot.time_ns, now_ns):
            decisions.append(KeepDecision(snapshot, (FUTURE,)))
            continue
        if since_ns is None and policy.within is not None:
            since_ns = policy.within.before_ns(snapshot.time_ns)
        moment = local_datetime(snapshot.time_ns)
        reasons = [rule.name for rule in rules if rule.keeps(moment, position)]
        if since_ns is not None and policy.within is not None and snapshot.time_ns >= since_ns:
            reasons.append(f"within {policy.within.text}")
        tags = set(snapshot.tags)
        reasons += [f"tag {','.join(sorted(wanted))}" for wanted in policy.tags if wanted <= tags]
        decisions.append(KeepDecision(snapshot, tuple(reasons)))
    return decisions


def local_datetime(time_ns: int) -> datetime:
    """Return a time in this machine's time zone, clamped to the range of `datetime`."""
    try:
        return datetime.fromtimestamp(time_ns // 1_000_000_000)
    except (OverflowError, ValueError, OSError):
        return datetime.max if time_ns > 0 else datetime.min
