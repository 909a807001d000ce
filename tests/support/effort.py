"""How long the tests that could go on forever do so: `make soak` asks for more than `make test`."""

from __future__ import annotations

import os
import random

EFFORT = int(os.environ.get("CASFS_EFFORT", "1"))
"""By how much the rounds of such tests are multiplied."""


def dice() -> random.Random:
    """Return the dice of a test: the same in every short run, and others in every long one."""
    seed = int(os.environ.get("CASFS_SEED", "1" if EFFORT == 1 else random.getrandbits(32)))
    print(f"CASFS_SEED={seed}")
    return random.Random(seed)
