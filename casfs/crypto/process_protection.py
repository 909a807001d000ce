"""Keep other processes of the same user out of the memory of a process that holds keys."""

from __future__ import annotations

import functools
import logging

log = logging.getLogger(__name__)

_PR_SET_DUMPABLE = 4


@functools.cache
def forbid_inspection() -> None:
    """Let no other process of this user read the memory of this one, and the kernel write no core dump.

    The process still reaches its own entries in /proc; programs that it starts are not affected. The children
    that it forks are. Log a failure; raise nothing.
    """
    import ctypes  # slow to load, and only commands with keys need it

    try:
        failed = ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0
    except (OSError, AttributeError):
        failed = True
    if failed:
        log.info("the memory of this process can be read by other processes of this user")
