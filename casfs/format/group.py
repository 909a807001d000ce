"""Groups: several small blobs that are compressed as one payload, without I/O (FORMAT.md, "Groups").

The plaintext of a group is a table of sizes followed by the blobs without gaps. So no two blobs overlap, and
the pack's directory is not needed to separate them. The size of a group and the number of its blobs are
bounded, which bounds the cost of reading one blob and the loss that a damaged byte causes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate, pairwise

from casfs.digest import Digest, keyed_digest
from casfs.errors import BlobError

MAX_GROUP_BYTES = 512 * 1024
"""The largest plaintext of a group, with its table, that a reader accepts; a writer stays below it."""

MAX_GROUP_BLOBS = 256

_SIZE = struct.Struct("<I")


def group_bytes(sizes: Sequence[int]) -> int:
    """Return the size in bytes of the plaintext of a group of blobs of these sizes."""
    return _SIZE.size * (1 + len(sizes)) + sum(sizes)


def join_group(plains: Sequence[bytes]) -> bytes:
    """Return the plaintext of a group."""
    sizes = [len(plain) for plain in plains]
    return b"".join([struct.pack(f"<{1 + len(sizes)}I", len(sizes), *sizes), *plains])


class Group:
    """The plaintext of a group, which no digest has verified yet. `key` is that of its blobs' digests.

    Threads may share it. The constructor raises BlobError where the table contradicts the size.
    """

    def __init__(self, plain: bytes, key: bytes | None = None) -> None:
        if not _SIZE.size <= len(plain) <= MAX_GROUP_BYTES:
            raise BlobError(b"", "its group has an invalid size")
        (count,) = _SIZE.unpack_from(plain)
        if count > MAX_GROUP_BLOBS or _SIZE.size * (1 + count) > len(plain):
            raise BlobError(b"", "its group has an invalid number of blobs")
        sizes = struct.unpack_from(f"<{count}I", plain, _SIZE.size)
        self.plain = plain
        self._key = key
        self._bounds = list(accumulate(sizes, initial=_SIZE.size * (1 + count)))
        if self._bounds[-1] != len(plain):
            raise BlobError(b"", "the sizes of the blobs in its group contradict the group's size")

    @property
    def blob_count(self) -> int:
        """The number of its blobs."""
        return len(self._bounds) - 1

    def blob(self, digest: Digest, position: int, plain_bytes: int) -> bytes:
        """Return the verified plaintext of the blob at a position; raise BlobError."""
        if position >= self.blob_count:
            raise BlobError(digest, "its group has too few blobs")
        begin, end = self._bounds[position], self._bounds[position + 1]
        if end - begin != plain_bytes:
            raise BlobError(
                digest, f"it has {end - begin} bytes instead of the recorded {plain_bytes}"
            )
        plain = self.plain[begin:end]
        if keyed_digest(plain, self._key) != digest:
            raise BlobError(digest, "digest mismatch")
        return plain

    def digests(self) -> list[tuple[Digest, int]]:
        """Return the digest and the size in bytes of each blob in the order of the positions."""
        return [
            (keyed_digest(self.plain[begin:end], self._key), end - begin)
            for begin, end in pairwise(self._bounds)
        ]
