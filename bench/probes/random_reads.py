"""Read 4 KiB at random offsets of one file and print the duration of the reads in seconds.

Runs as a program of its own: a server that hangs must not hang the harness with it.
"""

from __future__ import annotations

import os
import random
import sys
import time

BLOCK_BYTES = 4096


def read_at_random(path: str, count: int, seed: str) -> float:
    """Return the seconds that `count` reads at different aligned offsets take."""
    descriptor = os.open(path, os.O_RDONLY)
    blocks = os.fstat(descriptor).st_size // BLOCK_BYTES
    offsets = [block * BLOCK_BYTES for block in random.Random(seed).sample(range(blocks), count)]
    started = time.perf_counter()
    for offset in offsets:
        if len(os.pread(descriptor, BLOCK_BYTES, offset)) != BLOCK_BYTES:
            raise OSError(f"short read at {offset} of {path}")
    return time.perf_counter() - started


if __name__ == "__main__":
    print(read_at_random(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
