"""Lengths of time as people write them: 30d, 10m, 1y6m, 2h30min."""

from __future__ import annotations

import re
from calendar import monthrange
from datetime import datetime, timedelta

from casfs.errors import UsageError

_PART = re.compile(r"([0-9]{1,6})(min|[a-z])")
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


def parse_duration(text: str, option: str) -> int:
    """Return seconds; units are s, m or min (minutes), h, d and w, together as in 1h30m."""
    parts = _parts(text)
    if not parts or any(unit not in _SECONDS for _, unit in parts):
        raise UsageError(f"{option} {text!r} is not a length of time such as 30d, 12h or 10m")
    return sum(number * _SECONDS[unit] for number, unit in parts)


class Span:
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
