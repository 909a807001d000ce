"""The types of the command line's values: each kind of value has one parser, and one message."""

from __future__ import annotations

import os
import re
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from casfs.errors import UsageError

if TYPE_CHECKING:
    from casfs.maintenance.retention import CalendarSpan
    from casfs.patterns import Pattern

_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)\s*([kmgtp]?)(?:i?b)?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_COUNT = re.compile("[0-9]{1,18}")
_OWNER = re.compile(r"(\d{1,10}):(\d{1,10})")
_MAX_SECONDS = 9_200_000_000
"""Before and after 1970: a snapshot's time is a signed number of nanoseconds in 64 bits."""

_MAX_OWNER = 0xFFFFFFFE
"""The number above it, -1 as 32 bits, means "leave the owner as it is" to chown(2)."""


def _bytes_of(size: re.Match[str]) -> int:
    """Return the bytes of a match of `_SIZE`, rounded down."""
    from fractions import Fraction

    return int(Fraction(size.group(1)) * 1024 ** _POWERS[size.group(2).lower()])


class SizeType(click.ParamType[int]):
    """A size in bytes: `1048576`, `1024K`, `1M` and `1MiB` are equal."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a size such as 500K, 10M or 2G", param, ctx)
        return _bytes_of(match)


class RateType(click.ParamType[int]):
    """Bytes per second: `500K`, `10M` and `10MiB/s` are rates."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes per second; at least one."""
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value).strip().removesuffix("/s"))
        rate = _bytes_of(match) if match is not None else 0
        if rate < 1:
            self.fail(
                f"{value!r} is not a rate such as 500K or 10M, in bytes per second", param, ctx
            )
        return rate


class PatternType(click.ParamType["Pattern"]):
    """A pattern in gitignore syntax, parsed from the bytes that the user typed."""

    name = "pattern"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Pattern:
        """Return the pattern."""
        from casfs.patterns import InvalidPatternError, Pattern, parse_pattern

        if isinstance(value, Pattern):
            return value
        try:
            return parse_pattern(os.fsencode(value))
        except InvalidPatternError as error:
            self.fail(str(error), param, ctx)


class TagsType(click.ParamType[frozenset[str]]):
    """Tags, separated by commas; a tag that is empty or only spaces is refused.

    Every option that takes tags splits them in this way, so that no snapshot gets a tag that cannot be
    searched for.
    """

    name = "tags"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> frozenset[str]:
        """Return the set of tags."""
        if isinstance(value, frozenset):
            return value
        tags = frozenset(str(value).split(","))
        if not all(tag.strip() for tag in tags):
            self.fail(f"{value!r} contains an empty tag; separate tags by one comma", param, ctx)
        return tags


class CountType(click.ParamType[int]):
    """How many snapshots a rule keeps: a number, or `unlimited` (restic's -1)."""

    name = "N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number, `retention.UNLIMITED` for `unlimited`."""
        from casfs.maintenance.retention import UNLIMITED

        text = str(value)
        if text in ("unlimited", str(UNLIMITED)):
            return UNLIMITED
        if not _COUNT.fullmatch(text):
            self.fail(f"{text!r} is neither a number of snapshots nor unlimited", param, ctx)
        return int(text)


class PercentType(click.ParamType[float]):
    """A percentage from 0% to 100%; the sign may be left out."""

    name = "percent"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the share, from 0 to 1."""
        if isinstance(value, float):
            return value
        try:
            share = float(str(value).removesuffix("%")) / 100
        except ValueError:
            self.fail(f"{value!r} is not a percentage such as 25%", param, ctx)
        if not 0 <= share <= 1:
            self.fail(f"{value!r} is not between 0% and 100%", param, ctx)
        return share


class DurationType(click.ParamType[int]):
    """A length of time: s, m or min (minutes), h, d and w, together as in 1h30m."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of seconds."""
        from casfs.maintenance.retention import parse_duration

        if isinstance(value, int):
            return value
        return parse_duration(str(value), _option_name(param))


class SpanType(click.ParamType["CalendarSpan"]):
    """A length of time by the calendar: y, m (months), w, d, h and min, together as in 1y6m."""

    name = "span"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> CalendarSpan:
        """Return the span."""
        from casfs.maintenance.retention import CalendarSpan

        if isinstance(value, CalendarSpan):
            return value
        return CalendarSpan(str(value), _option_name(param))


class OwnerType(click.ParamType[tuple[int, int]]):
    """A user and a group as numbers: `1000:1000`."""

    name = "owner"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Return user and group."""
        if isinstance(value, tuple):
            return value
        match = _OWNER.fullmatch(str(value))
        if match is None or max(map(int, match.groups())) > _MAX_OWNER:
            self.fail(f"{value!r} is not UID:GID, two numbers", param, ctx)
        return int(match.group(1)), int(match.group(2))


def _option_name(param: click.Parameter | None) -> str:
    return param.opts[0] if param is not None else "the value"


def parse_time(text: str, option: str) -> int:
    """Return a time in nanoseconds since 1970, with exactly the digits that the user gave.

    Raises UsageError for a text that is neither ISO 8601 nor @SECONDS.
    """
    from decimal import Decimal

    try:
        if text.startswith("@"):
            seconds = Decimal(text[1:])
        else:
            moment = datetime.fromisoformat(text)
            seconds = Decimal(int(moment.replace(microsecond=0).timestamp()))
            seconds += Decimal(moment.microsecond).scaleb(-6)
        if not -_MAX_SECONDS < seconds < _MAX_SECONDS:
            raise UsageError(f"{option} {text!r} is not between the years 1678 and 2261")
    except (ValueError, ArithmeticError) as error:
        raise UsageError(f"{option} {text!r} is neither ISO 8601 nor @SECONDS") from error
    return int(seconds.scaleb(9))


class SizeRangeType(click.ParamType[tuple[int, int | None]]):
    """Sizes: `+10M` is larger than that, `-10M` smaller, `10M` exactly that."""

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int | None]:
        """Return the smallest and the largest number of bytes; None without an upper limit."""
        if isinstance(value, tuple):
            return value
        text = str(value)
        size = SIZE.convert(text.lstrip("+-") if text[:1] in "+-" else text, param, ctx)
        if text.startswith("+"):
            return size + 1, None
        return (0, size - 1) if text.startswith("-") else (size, size)


SIZE = SizeType()
RATE = RateType()
SIZE_RANGE = SizeRangeType()
PATTERN = PatternType()
TAGS = TagsType()
COUNT = CountType()
PERCENT = PercentType()
DURATION = DurationType()
SPAN = SpanType()
OWNER = OwnerType()
