"""Print the BLAKE3 of files on one core, as `b3sum --num-threads 1` does."""

from __future__ import annotations

import os
import sys

from blake3 import blake3

READ_BYTES = 1 << 20


def digest_of(path: str) -> str:
    """Return the hexadecimal BLAKE3 of a file."""
    hasher = blake3()
    buffer = bytearray(READ_BYTES)
    view = memoryview(buffer)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while count := os.readv(descriptor, [buffer]):
            hasher.update(view[:count])
    finally:
        os.close(descriptor)
    return hasher.hexdigest()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(digest_of(name), name)
