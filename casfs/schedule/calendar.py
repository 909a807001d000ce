"""The part of systemd's calendar expressions that cron can express, for machines without systemd.

These are the words (`hourly`, `daily`, `weekly`, `monthly`, `quarterly`, `semiannually`, `yearly`) and
expressions of weekdays, one day of each month or year, and one time of the day: `Mon..Fri 02:30`,
`Sat,Sun *-*-* 04:00:00`, `*-*-01 03:00`. Times are local.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta

from casfs.errors import UsageError

_WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WORDS = {
    "hourly": "*-*-* *:00:00",
    "daily": "*-*-* 00:00:00",
    "weekly": "Mon *-*-* 00:00:00",
    "monthly": "*-*-01 00:00:00",
    "quarterly": "*-01,04,07,10-01 00:00:00",
    "semiannually": "*-01,07-01 00:00:00",
    "semi-annually": "*-01,07-01 00:00:00",
    "yearly": "*-01-01 00:00:00",
    "annually": "*-01-01 00:00:00",
}
_EXPRESSION = re.compile(
    r"(?:(?P<weekdays>[a-z][a-z.,]*) *)?"
    r"(?:(?:\*-)?(?P<months>\*|[\d,]+)-(?P<days>\*|\d{1,2}))?"
    r"(?: *(?P<hour>\*|\d{1,2}):(?P<minute>\d{1,2})(?::0?0)?)?",
)
_MOST_DAYS = 366 * 8 + 1
"""Between two 29ths of February at most."""


@dataclass(frozen=True, slots=True)
class CalendarTime:
    """Recurring times; None means every value. Weekdays are numbered from 0 for Monday."""

    minute: int
    hour: int | None = None
    day: int | None = None
    months: frozenset[int] | None = None
    weekdays: frozenset[int] | None = None

    def cron_fields(self) -> str:
        """Return the five time fields of a crontab line."""
        weekdays = None
        if self.weekdays is not None:
            weekdays = ",".join(str((n + 1) % 7) for n in sorted(self.weekdays))
        months = ",".join(map(str, sorted(self.months))) if self.months is not None else None
        fields = (self.minute, self.hour, self.day, months, weekdays)
        return " ".join("*" if field is None else str(field) for field in fields)

    def last_before(self, moment: datetime) -> datetime | None:
        """Return the latest of the times at or before a local time."""
        for back in range(_MOST_DAYS):
            day = moment - timedelta(days=back)
            if self._is_on(day):
                for hour in range(23, -1, -1) if self.hour is None else (self.hour,):
                    found = day.replace(hour=hour, minute=self.minute, second=0, microsecond=0)
                    if found <= moment:
                        return found
        return None

    def first_after(self, moment: datetime) -> datetime | None:
        """Return the earliest of the times after a local time."""
        for forward in range(_MOST_DAYS):
            day = moment + timedelta(days=forward)
            if self._is_on(day):
                for hour in range(24) if self.hour is None else (self.hour,):
                    found = day.replace(hour=hour, minute=self.minute, second=0, microsecond=0)
                    if found > moment:
                        return found
        return None

    def _is_on(self, day: datetime) -> bool:
        return (
            (self.months is None or day.month in self.months)
            and (self.day is None or day.day == self.day)
            and (self.weekdays is None or day.weekday() in self.weekdays)
        )


def parse_calendar(text: str) -> CalendarTime:
    """Parse a calendar expression; raises UsageError if cron cannot express it."""
    words = " ".join(text.split())
    match = _EXPRESSION.fullmatch(_WORDS.get(words.lower(), words).lower())
    try:
        if match is None or not words:
            raise ValueError
        days = match["days"]
        found = CalendarTime(
            minute=_number(match["minute"] or "0", 0, 59),
            hour=None if match["hour"] == "*" else _number(match["hour"] or "0", 0, 23),
            day=None if days in (None, "*") else _number(days, 1, 31),
            months=_months(match["months"]),
            weekdays=_weekdays(match["weekdays"]),
        )
        if found.day is not None and found.weekdays is not None:
            raise ValueError  # cron means either of the two, systemd both
        if found.first_after(datetime(2000, 1, 1)) is None:
            raise ValueError
    except ValueError:
        raise UsageError(
            f"the schedule {text!r} cannot be expressed in a crontab; there are hourly, daily, weekly, "
            "monthly, and times such as Mon..Fri 02:30 or *-*-01 03:00"
        ) from None
    return found


def _months(text: str | None) -> frozenset[int] | None:
    if text in (None, "*"):
        return None
    assert text is not None
    return frozenset(_number(part, 1, 12) for part in text.split(","))


def _weekdays(text: str | None) -> frozenset[int] | None:
    if text is None:
        return None
    found: set[int] = set()
    for part in text.split(","):
        first, separator, last = part.partition("..")
        start = _weekday(first)
        end = _weekday(last) if separator else start
        if end < start:
            raise ValueError
        found |= set(range(start, end + 1))
    return frozenset(found)


def _weekday(text: str) -> int:
    # "mon" and "monday", as systemd takes them.
    full = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
    return _WEEKDAYS.index(text) if text in _WEEKDAYS else full.index(text)


def _number(text: str, least: int, most: int) -> int:
    number = int(text)
    if not least <= number <= most:
        raise ValueError
    return number
