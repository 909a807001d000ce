"""Reading many blobs at once: in the order of their places, neighbours in one read, decoded together.

For one blob the interpreter does more than the disk and the decompressor; for many it does it once.
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
"""What is read for nothing sooner than another read is begun."""

_THREADS = 2

_READ_BYTES = 4 * 1024 * 1024

_Place = tuple[int, int, Digest, Location]
"""Pack, offset, and what is there."""

_by_place = operator.itemgetter(0, 1)


def read_batch(store: BlobStore, wanted: Mapping[Digest, int]) -> dict[Digest, bytes]:
    """Return the verified plaintexts of those blobs that are sound where the index looks for them.

    `wanted` tells the size of each; one of another size is left out. All are in memory together. For
    what is left out, `BlobStore.read` finds another copy or says what is wrong.
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
        run = list(itertools.takewhile(_Neighbourhood(), itertools.islice(places, begin, None)))
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
            store.coverage.mark(at)
            plains[digest] = plain


class _Neighbourhood:
    """Tells, of places in order, whether the next lies close enough behind those before for one read."""

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
