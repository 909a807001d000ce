"""Names of the users and groups that own the entries of a snapshot. They are for display only."""

from __future__ import annotations

import getpass
import grp
import os
import pwd
from collections.abc import Callable, Set

MAX_OWNER_NAMES = 65_536
MAX_OWNER_NAMES_BYTES = 2 * 1024 * 1024
"""Limits of the names of users, and of groups, in one snapshot; further owners keep only their number."""

_OWNER_BYTES = 16
"""Upper bound of the encoded size of an owner without the name."""


def user_names(uids: Set[int]) -> tuple[tuple[int, str], ...]:
    """Return the names of users by number, within the limits."""
    return _names_of(uids, lambda number: pwd.getpwuid(number).pw_name)


def group_names(gids: Set[int]) -> tuple[tuple[int, str], ...]:
    """Return the names of groups by number, within the limits."""
    return _names_of(gids, lambda number: grp.getgrgid(number).gr_name)


def _names_of(numbers: Set[int], name_of: Callable[[int], str]) -> tuple[tuple[int, str], ...]:
    found: list[tuple[int, str]] = []
    room_bytes = MAX_OWNER_NAMES_BYTES
    for number in sorted(numbers)[:MAX_OWNER_NAMES]:
        try:
            name = _unicode(name_of(number))
        except (KeyError, OverflowError):
            continue
        room_bytes -= _OWNER_BYTES + len(name.encode())
        if room_bytes < 0:
            break
        found.append((number, name))
    return tuple(found)


def user_name() -> str:
    """Return the name of the user of this process, or the number of one without a name."""
    try:
        return _unicode(getpass.getuser())
    except (KeyError, OSError):
        return str(os.getuid())


def _unicode(name: str) -> str:
    """Return the name of an account with bytes that are not UTF-8 escaped; it is for display only."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
