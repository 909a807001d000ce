"""Sizes as arguments: a number with an optional binary unit."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import click

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
