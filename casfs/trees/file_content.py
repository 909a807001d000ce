"""The content of one file, verified: every chunk by its digest, then all of them together.

Restore, dump and repair read files through this module; the mount verifies ranges instead
(`casfs_mount.file_reader`), with the same check of each chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from blake3 import blake3

from casfs.digest import Digest, update_zeros
from casfs.errors import IntegrityError, TreeError
from casfs.format.codec import MAX_PLAIN_BYTES
from casfs.format.tree import Node, captured_digest
from casfs.trees.content import (
    EXTENT,
    HOLE,
    MAX_HOLE_BYTES,
    ContentReader,
    Extent,
    check_chunk_length,
)

Ranges = list[tuple[int, int]]
"""Begin and end, in bytes, of parts of a file."""


@dataclass(frozen=True, slots=True)
class Part:
    """A run of a file; `data` is None for a hole and for lost data, both of which read as zeros.

    `digest` names the chunk, or the list of a lost run; it is None for a hole.
    """

    begin: int
    length: int
    digest: Digest | None
    data: bytes | None
    is_lost: bool = False


class FileContent:
    """One pass over the content of a file; use each instance once.

    `read` returns the verified plaintext of a chunk. With `salvage` lost data raises no error: it is yielded
    as a lost part and listed in `lost`. After the pass, `digest` is the digest of the yielded data.
    """

    def __init__(
        self,
        node: Node,
        extents: ContentReader,
        read: Callable[[Digest], bytes],
        salvage: bool = False,
    ) -> None:
        self.lost: Ranges = []
        self._node = node
        self._extents = extents
        self._read = read
        self._salvage = salvage
        self._whole = blake3()

    @property
    def digest(self) -> Digest:
        """The plain BLAKE3-256 of the yielded data, with zeros for holes and lost data."""
        return Digest(self._whole.digest())

    def parts(self) -> Iterator[Part]:
        """Yield the parts of the file in order, each chunk after it has been verified.

        Raise IntegrityError for a damaged chunk, unless it is salvaged. Raise TreeError where the list does
        not cover the file or has holes beyond MAX_HOLE_BYTES, or where all chunks verify but the digest of
        the whole file does not match.
        """
        size = self._node.size
        done = hole_bytes = 0
        for extent in self._extents.extents(lost_lists=self._salvage):
            done = extent.begin + extent.length
            if done > size:
                raise TreeError(f"its list of chunks covers {done} bytes, captured were {size}")
            part = self._part(extent)
            if part.data is not None:
                self._whole.update(part.data)
            else:
                hole_bytes += extent.length
                if hole_bytes > MAX_HOLE_BYTES:
                    raise TreeError(
                        f"it has holes of more than {MAX_HOLE_BYTES >> 40} TiB, whose zeros no reader digests"
                    )
                update_zeros(self._whole, extent.length)
            yield part
        if done < size:
            raise TreeError(f"its list of chunks covers {done} bytes, captured were {size}")
        if not self.lost and self.digest != captured_digest(self._node):
            raise TreeError("every chunk verifies, but the digest of the whole file does not match")

    def _part(self, extent: Extent) -> Part:
        if extent.digest is None:
            return Part(extent.begin, extent.length, None, None)
        try:
            if not extent.lost:
                data = read_chunk(extent, extent.digest, self._read)
                return Part(extent.begin, extent.length, extent.digest, data)
        except IntegrityError:
            if not self._salvage:
                raise
        self.lost.append((extent.begin, extent.begin + extent.length))
        return Part(extent.begin, extent.length, extent.digest, None, is_lost=True)


def read_only_chunk(node: Node, read: Callable[[Digest], bytes]) -> bytes | None:
    """Return the content of a file that is one chunk with an unkeyed digest, which is that of the file too.

    `read` returns the verified plaintext of a chunk, so that nothing is left to verify; its errors are passed
    on. Return None for other files, and where the chunk has another length than recorded: `FileContent` reads
    the former, and raises what is wrong with the latter.
    """
    content = node.content
    if node.captured is not None or node.levels or len(content) != EXTENT.size:
        return None
    size, digest = EXTENT.unpack(content)
    if size != node.size or size > MAX_PLAIN_BYTES or digest == HOLE:
        return None
    data = read(Digest(digest))
    return data if len(data) == size else None


def read_chunk(extent: Extent, digest: Digest, read: Callable[[Digest], bytes]) -> bytes:
    """Return the chunk of an extent; raise TreeError where its length is not the recorded one.

    Errors of `read` are passed on.
    """
    check_chunk_length(extent)
    data = read(digest)
    if len(data) != extent.length:
        raise TreeError(
            f"chunk {digest.hex()} has {len(data)} bytes where {extent.length} are recorded"
        )
    return data
