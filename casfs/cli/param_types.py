"""Sizes as arguments: a number with an optional binary unit."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import click

from casfs.errors import UsageError
from casfs.patterns import InvalidPatternError, Pattern, parse_pattern


def parse_tags(texts: Iterable[str]) -> set[str]:
    """Return the tags that a snapshot is to have, or has where it is to be kept.

    A comma parts them everywhere, so that no snapshot gets a tag which could not be asked for. Raises
    UsageError for one without a name.
    """
    found = {tag for text in texts for tag in text.split(",")}
    if "" in found:
        raise UsageError("a tag without a name cannot be given")
    return found


_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtp]?)(?:i?b)?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}


class SizeType(click.ParamType[int]):
    """A size in bytes: `1048576`, `1024K`, `1M`, `1MiB` are the same."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        if isinstance(value, int):
            return value
        match = _PATTERN.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a size such as 500K, 10M or 2G", param, ctx)
        return int(Fraction(match.group(1)) * 1024 ** _POWERS[match.group(2).lower()])


SIZE = SizeType()


class PatternType(click.ParamType[Pattern]):
    """A pattern in gitignore syntax, as the bytes that were typed."""

    name = "pattern"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Pattern:
        """Return the pattern."""
        if isinstance(value, Pattern):
            return value
        try:
            return parse_pattern(os.fsencode(value))
        except InvalidPatternError as error:
            self.fail(str(error), param, ctx)


PATTERN = PatternType()


def parse_share(text: str, option: str, example: str) -> float:
    """Return a percentage from 0% to 100% that was given on the command line as 0 to 1."""
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError as error:
        raise UsageError(f"{option} {text!r} is not a percentage such as {example}") from error
    if not 0 <= share <= 1:
        raise UsageError(f"{option} {text!r} is not between 0% and 100%")
    return share
