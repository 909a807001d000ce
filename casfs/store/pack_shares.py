"""The bytes of a pack that some of its blobs take: exact for single blobs, an estimate for blobs in groups.

The index does not record the plaintext size of a group. So the bytes of a pack's groups are divided among
their blobs by plaintext size, as if all groups of the pack were compressed equally well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from casfs.format.pack import BLOB_HEADER, ENTRY, HEADER, TRAILER
from casfs.index.index import Index
from casfs.index.schema import Location, PackRecord


@dataclass(slots=True)
class PackShare:
    """Some blobs of one pack.

    `single_bytes` counts payloads of one blob with their record headers, `grouped_plain_bytes` the plaintext
    of blobs in groups.
    """

    single_bytes: int = 0
    grouped_plain_bytes: int = 0

    def add(self, location: Location) -> None:
        """Count a blob."""
        if location.is_grouped:
            self.grouped_plain_bytes += location.plain_bytes
        else:
            self.single_bytes += location.stored_bytes + BLOB_HEADER.size

    def stored_bytes(self, indexed: PackShare, record: PackRecord) -> int:
        """Return the bytes of the pack that these blobs take.

        `indexed` are all blobs that the index locates in the pack. It may locate further blobs of the pack in
        other packs, so a blob in a group counts for at most its plaintext size.
        """
        if not self.grouped_plain_bytes:
            return self.single_bytes
        groups_bytes = record.pack_bytes - directory_bytes(record) - indexed.single_bytes
        ratio = groups_bytes / indexed.grouped_plain_bytes
        return self.single_bytes + round(self.grouped_plain_bytes * min(1.0, max(0.0, ratio)))


def directory_bytes(record: PackRecord) -> int:
    """Return the bytes of a pack that are no blob records: header, directory and trailer."""
    return HEADER.size + BLOB_HEADER.size + record.blobs * ENTRY.size + TRAILER.size


def indexed_shares(index: Index) -> dict[int, PackShare]:
    """Return the blobs that the index locates in each pack, by the pack's ordinal."""
    found: dict[int, PackShare] = {}
    for _, location in index.blobs():
        found.setdefault(location.pack, PackShare()).add(location)
    return found


def stored_bytes(index: Index, shares: Mapping[int, PackShare]) -> int:
    """Return the bytes that some blobs of each pack, by its ordinal, take in all packs."""
    indexed = indexed_shares(index)
    return sum(
        shares[record.ordinal].stored_bytes(indexed[record.ordinal], record)
        for record in index.packs()
        if record.ordinal in shares and record.ordinal in indexed
    )
