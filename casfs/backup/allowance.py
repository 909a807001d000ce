"""Limit what the files of one user may cost a backup: seconds of waiting for leases, and bytes of holes.

An ordinary user can hold leases on as many files as he likes, and a file of exabytes costs him nothing. The
files of one owner therefore share an allowance, so that they cannot keep the files of others from being
backed up. Nothing else in a file takes a reader time that its owner did not take to write it. One thread.
"""

from __future__ import annotations

import errno
import os

from casfs.display import format_size

DEFAULT_MAX_HOLE_BYTES = 4 << 40
"""About 15 minutes at the 5 GiB/s at which one core digests zeros."""

LEASE_WAIT_S = 10.0
"""Two files whose leases are not released in time."""

_SUBORDINATE_UIDS = 100_000
"""The first of the user ids that a user may take for his containers: all of them share one allowance."""


class Allowances:
    """The allowances of all owners in one backup. Holes of root and of the own user have no limit."""

    def __init__(
        self, max_hole_bytes: int = DEFAULT_MAX_HOLE_BYTES, lease_wait_s: float = LEASE_WAIT_S
    ) -> None:
        self._max_hole_bytes = max_hole_bytes
        self._lease_wait_s = lease_wait_s
        self._hole_bytes: dict[int, int] = {}
        self._waited_s: dict[int, float] = {}
        self._trusted = {0, os.geteuid()}

    def may_wait(self, uid: int, seconds: float) -> bool:
        """Return whether to wait for a lease on a file of this owner, and count the seconds if so."""
        owner = min(uid, _SUBORDINATE_UIDS)
        total_s = self._waited_s.get(owner, 0.0) + seconds
        if total_s > self._lease_wait_s:
            return False
        self._waited_s[owner] = total_s
        return True

    def take_hole(self, uid: int, length: int) -> None:
        """Count a hole in a file of this owner; raise OSError where the allowance is spent."""
        if uid in self._trusted:
            return
        owner = min(uid, _SUBORDINATE_UIDS)
        total_bytes = self._hole_bytes.get(owner, 0) + length
        if total_bytes > self._max_hole_bytes:
            raise OSError(
                errno.EFBIG,
                f"with its hole of {format_size(length)} the sparse files of user {uid} exceed the "
                f"{format_size(self._max_hole_bytes)} that one backup reads of them (--max-holes)",
            )
        self._hole_bytes[owner] = total_bytes
