"""Filling a restored file: chunks of a node, verified one by one and then together.

Holes stay holes: nothing is written where the node has none.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from blake3 import blake3

from casfs.digest import Digest, update_zeros
from casfs.errors import IntegrityError, TreeError
from casfs.format.tree import Node, captured_digest
from casfs.repository.repository import Repository
from casfs.trees.content import Extent, check_chunk_length

Ranges = list[tuple[int, int]]
"""Begin and end, in bytes, of parts of a file."""

_READ_BYTES = 1 << 20


class Filler:
    """Fill files from one repository; with `salvage` what is lost is left as zeros.

    Safe to share between threads.
    """

    def __init__(self, repository: Repository, salvage: bool) -> None:
        self._repository = repository
        self._salvage = salvage

    def fill(self, fd: int, node: Node, read: Callable[[Digest], bytes]) -> Ranges:
        """Write the content of a file into an empty one and return what was lost of it.

        `read` returns a chunk's verified plaintext, or raises BlobError. Raises BlobError or TreeError
        unless all of it verifies; with salvage only for what no zeros can stand for.
        """
        whole = blake3()
        done = written = 0
        lost: Ranges = []
        for extent in self._repository.content(node).extents(lost_lists=self._salvage):
            done = extent.begin + extent.length
            if done > node.size:
                break
            data = self._read(extent, lost, read)
            if data is None:
                update_zeros(whole, extent.length)
                continue
            whole.update(data)
            _write_at(fd, data, extent.begin)
            written = done
        if written < node.size:
            os.ftruncate(fd, node.size)
        if done > node.size or (done < node.size and not lost):
            raise TreeError(f"its list tells {done} bytes where {node.size} were captured")
        if lost:
            return lost
        if whole.digest() != captured_digest(node):
            raise TreeError("all its chunks verify, but together they do not have its digest")
        return lost

    def _read(self, extent: Extent, lost: Ranges, read: Callable[[Digest], bytes]) -> bytes | None:
        if extent.digest is None:
            return None
        try:
            if not extent.lost:
                return _chunk(extent, extent.digest, read)
        except IntegrityError:
            if not self._salvage:
                raise
        lost.append((extent.begin, extent.begin + extent.length))
        return None


def _chunk(extent: Extent, digest: Digest, read: Callable[[Digest], bytes]) -> bytes:
    check_chunk_length(extent)
    data = read(digest)
    if len(data) != extent.length:
        raise TreeError("a chunk does not have the length that is recorded for it")
    return data


def reads_back(fd: int, node: Node) -> bool:
    """Tell whether an open file has the content of a node."""
    whole = blake3()
    while data := os.read(fd, _READ_BYTES):
        whole.update(data)
    return whole.digest() == captured_digest(node)


def _write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        offset += written
        view = view[written:]
