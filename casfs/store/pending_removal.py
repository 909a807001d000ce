"""Removal notices: what a prune publishes about packs before it removes them (FORMAT.md, "Pending removal").

A notice is a small object in the storage, named by the digest of its bytes. A writer that opens the
repository after a notice is published stores the blobs of its packs again when it meets them. So a prune may
remove the packs once all earlier writers have ended and no snapshot needs the packs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import msgspec

from casfs.digest import PackId, digest_of
from casfs.errors import NotFoundError
from casfs.format.pack import PackRef
from casfs.storage.base import Storage

log = logging.getLogger(__name__)

FOLDER = "condemned"
MAX_NOTICE_BYTES = 64 * 1024 * 1024


class RemovalNotice(msgspec.Struct, frozen=True):
    """Packs that no snapshot needed at `time_s`, in seconds since 1970.

    `packs` are the names of data packs in hexadecimal, `meta` those of metadata packs.

    `writers` and `readers` are the names of the locks that were held once the notice was readable by every
    process. None means that no prune has listed the locks yet.
    """

    time_s: int
    packs: tuple[str, ...]
    writers: tuple[str, ...] | None = None
    readers: tuple[str, ...] = ()
    meta: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET

    @classmethod
    def of(cls, time_s: int, packs: Iterable[PackRef]) -> RemovalNotice:
        """Return a notice of these packs, before any prune has listed the locks."""
        return cls(time_s, ()).naming(packs)

    def naming(self, packs: Iterable[PackRef]) -> RemovalNotice:
        """Return a notice with the same times and holders that names these packs instead."""
        found = sorted(packs)
        data = tuple(pack.id.hex() for pack in found if not pack.is_meta)
        meta = tuple(pack.id.hex() for pack in found if pack.is_meta)
        return msgspec.structs.replace(self, packs=data, meta=meta or msgspec.UNSET)

    def pack_refs(self) -> set[PackRef]:
        """Return the packs; raise ValueError for a name that is not hexadecimal."""
        meta = self.meta or ()
        return {
            PackRef(PackId(bytes.fromhex(name)), is_meta)
            for names, is_meta in ((self.packs, False), (meta, True))
            for name in names
        }

    def only(self, packs: Iterable[PackRef]) -> RemovalNotice:
        """Return a notice of only those of its packs that are in `packs`."""
        return self.naming(self.pack_refs().intersection(packs))


_decoder = msgspec.json.Decoder(RemovalNotice)


def publish_notice(storage: Storage, notice: RemovalNotice) -> str:
    """Store a notice durably and return its object's name."""
    data = msgspec.json.encode(notice) + b"\n"
    name = f"{FOLDER}/{digest_of(data).hex()}"
    storage.write(name, data)
    return name


def replace_notice(storage: Storage, name: str, notice: RemovalNotice) -> None:
    """Replace a stored notice; a new notice without packs only deletes the old one."""
    if (notice.packs or notice.meta) and publish_notice(storage, notice) == name:
        return
    storage.delete(name)


def read_notices(storage: Storage) -> dict[str, RemovalNotice]:
    """Return every intact notice by its object's name.

    A damaged notice is logged and ignored: its packs count as ordinary packs, and the next prune marks those
    that are not needed again.
    """
    found = {}
    for name, _, _ in storage.list(FOLDER):
        try:
            data = storage.read(name, 0, MAX_NOTICE_BYTES)
            if digest_of(data).hex() != name.rpartition("/")[2]:
                raise msgspec.ValidationError("digest mismatch")
            notice = _decoder.decode(data)
            notice.pack_refs()
        except NotFoundError:
            continue
        except (msgspec.DecodeError, ValueError) as error:
            log.warning("%s is damaged (%s); ignored", name, error)
            continue
        found[name] = notice
    return found


def packs_pending_removal(storage: Storage) -> set[PackRef]:
    """Return all packs that are marked for removal."""
    found: set[PackRef] = set()
    for notice in read_notices(storage).values():
        found |= notice.pack_refs()
    return found
