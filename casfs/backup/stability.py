"""Decide from metadata and sizes whether a file changed while it was read, and whether to read it again.

The functions are pure: they do no I/O and read no clock. RetryBudget is state of one thread.
"""

from __future__ import annotations

import os

from casfs.format.tree import ChangeReason

DEFAULT_PATIENCE_S = 60.0
"""Seconds that one backup spends in total on pauses and further attempts."""

_TICK_NS = 20_000_000
"""Two ticks of a kernel with HZ=100: file systems take timestamps from the clock of the last tick."""
_COARSE_NS = 2_000_000_000
"""The timestamp granularity of FAT. Timestamps in whole seconds are taken as a sign of such a clock."""


class RetryBudget:
    """The seconds that a backup may spend on pauses and further attempts.

    Half of the budget is reserved until `release_reserve`: at the end of the backup, writers have had the
    most time to finish. The speed of earlier attempts predicts whether a further attempt fits.
    """

    def __init__(self, seconds: float = DEFAULT_PATIENCE_S) -> None:
        self._left_s = seconds
        self._reserve_s = seconds / 2
        self._read_bytes = 0
        self._read_s = 0.0

    def can_spend(self, seconds: float) -> bool:
        """Return whether the budget has more than `seconds` left, apart from the reserve."""
        return seconds < self._left_s - self._reserve_s

    def spend(self, seconds: float) -> None:
        """Subtract `seconds` from the budget."""
        self._left_s -= seconds

    def release_reserve(self) -> None:
        """Make the reserve available."""
        self._reserve_s = 0.0

    def record(self, read_bytes: int, seconds: float) -> None:
        """Record the size and duration of an unsuccessful attempt."""
        self._read_bytes += read_bytes
        self._read_s += seconds

    def estimate(self, read_bytes: int) -> float:
        """Return the seconds that an attempt at a file of `read_bytes` is expected to take."""
        return read_bytes * self._read_s / max(self._read_bytes, 1)


def is_same(before: os.stat_result, after: os.stat_result) -> bool:
    """Return whether identity, size and timestamps of a file are equal in two `stat` results."""
    return (
        before.st_ctime_ns == after.st_ctime_ns
        and before.st_mtime_ns == after.st_mtime_ns
        and before.st_size == after.st_size
        and before.st_ino == after.st_ino
        and before.st_dev == after.st_dev
    )


def is_racy(st: os.stat_result, began_ns: int) -> bool:
    """Return whether a write after `began_ns` could leave the timestamps in `st` as they are.

    That is so where they lie within the granularity of the file system's clock: the racy case of git's
    index.
    """
    ctime_ns, mtime_ns = st.st_ctime_ns, st.st_mtime_ns
    if ctime_ns <= began_ns - _COARSE_NS and mtime_ns <= began_ns - _COARSE_NS:
        return False
    whole_seconds = mtime_ns % 1_000_000_000 == 0 and ctime_ns % 1_000_000_000 == 0
    grain_ns = _COARSE_NS if whole_seconds else _TICK_NS
    return ctime_ns > began_ns - grain_ns or abs(mtime_ns - began_ns) < grain_ns


def classify_by_metadata(
    before: os.stat_result, after: os.stat_result, read_bytes: int
) -> ChangeReason:
    """Return how a file changed during a read of `read_bytes`, from metadata alone."""
    if after.st_size < before.st_size or read_bytes < before.st_size:
        return ChangeReason.SHRANK
    if after.st_size > before.st_size:
        return ChangeReason.GREW
    return ChangeReason.NONE if after.st_mtime_ns == before.st_mtime_ns else ChangeReason.REWRITTEN


def classify_by_reread(before: os.stat_result, read_bytes: int, reread_bytes: int) -> ChangeReason:
    """Return how a file changed of which a read and a second read saw different bytes."""
    if reread_bytes < read_bytes or read_bytes < before.st_size:
        return ChangeReason.SHRANK
    return ChangeReason.GREW if reread_bytes > read_bytes else ChangeReason.REWRITTEN
