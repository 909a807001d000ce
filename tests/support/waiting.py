"""Waiting for a condition, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(
    condition: Callable[[], bool], what: str, limit: float = 60.0, every: float = 0.01
) -> None:
    """Return as soon as `condition` holds; fail, saying `what`, when it does not in time."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"waited {limit:.0f} s in vain: {what}"
        time.sleep(every)
