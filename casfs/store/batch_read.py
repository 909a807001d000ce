"""Batch reads of blobs: sorted by pack and offset, adjacent blobs in one read, decoded together.

For a single blob the interpreter's overhead exceeds the cost of the read and of the decompression; a batch
pays that overhead once.
"""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Mapping

from casfs.digest import Digest
from casfs.errors import CasfsError
from casfs.format.codec import Encoded
from casfs.index.schema import Location
from casfs.store.blob_store import BlobStore, pack_name

log = logging.getLogger(__name__)

_GAP_BYTES = 64 * 1024
"""Largest gap between two blobs that one read covers; beyond it a second read costs less."""

_THREADS = 2

_READ_BYTES = 4 * 1024 * 1024

_Place = tuple[int, int, Digest, Location]
"""Pack ordinal, offset, digest and location."""

_by_place = operator.itemgetter(0, 1)


def read_batch(store: BlobStore, wanted: Mapping[Digest, int]) -> dict[Digest, bytes]:
    """Return the verified plaintexts of the wanted blobs that are intact where the index locates them.

    `wanted` maps each digest to its plaintext size in bytes; a blob of another size is omitted. All returned
    plaintexts are in memory at once. For an omitted blob, `BlobStore.read` finds another copy or raises the
    reason.
    """
    digests = list(wanted)
    places: list[_Place] = [
        (at.pack, at.offset, digest, at)
        for digest, at in zip(digests, store.index.lookup_many(digests), strict=True)
        if at is not None and at.plain_bytes == wanted[digest]
    ]
    places.sort(key=_by_place)
    plains: dict[Digest, bytes] = {}
    begin = 0
    while begin < len(places):
        run = list(itertools.takewhile(_IsAdjacent(), itertools.islice(places, begin, None)))
        begin += len(run)
        try:
            _read_run(store, run, plains)
        except CasfsError as error:
            log.debug("%d blobs cannot be read at once: %s", len(run), error)
    return plains


def _read_run(store: BlobStore, run: list[_Place], plains: dict[Digest, bytes]) -> None:
    ordinal, begin, _, _ = run[0]
    last = run[-1][3]
    pack = store.index.pack_id(ordinal)
    size = last.offset + last.stored_bytes - begin
    data = store.storage.read(pack_name(pack), begin, size)
    encoded = [
        Encoded(
            digest,
            offset,
            at.codec,
            data[offset - begin : offset - begin + at.stored_bytes],
            at.plain_bytes,
        )
        for _, offset, digest, at in run
    ]
    for plain, (_, _, digest, at) in zip(
        store.decode_many(pack, encoded, _THREADS), run, strict=True
    ):
        if plain is not None:
            store.verified.mark(at)
            plains[digest] = plain


class _IsAdjacent:
    """A predicate on sorted places: whether the next is close enough for a read shared with the previous."""

    def __init__(self) -> None:
        self._pack = -1
        self._begin = self._end = 0

    def __call__(self, place: _Place) -> bool:
        pack, offset, _, at = place
        end = offset + at.stored_bytes
        if self._pack < 0:
            self._pack, self._begin = pack, offset
        elif (
            pack != self._pack or offset > self._end + _GAP_BYTES or end > self._begin + _READ_BYTES
        ):
            return False
        self._end = end
        return True
