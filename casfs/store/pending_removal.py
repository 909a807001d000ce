"""Condemned packs: what a prune says of packs before it removes them (FORMAT.md, "Condemned packs").

A condemnation is a small object in the storage, named by the digest of its bytes. Whoever opens the
repository for writing after it is there stores the blobs of such packs anew when it sees them again;
so the packs can go when those who were writing before have ended and no snapshot needs them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import msgspec

from casfs.digest import PackId, digest_of
from casfs.errors import NotFoundError
from casfs.storage.base import Storage

log = logging.getLogger(__name__)

FOLDER = "condemned"
MAX_NOTICE_BYTES = 64 * 1024 * 1024


class RemovalNotice(msgspec.Struct, frozen=True):
    """Packs (names in hexadecimal) that nothing needed at `time_s`, in seconds since 1970.

    `writers` and `readers` are the names of the locks that were held when it could be read by all; None
    says that nobody had asked yet.
    """

    time_s: int
    packs: tuple[str, ...]
    writers: tuple[str, ...] | None = None
    readers: tuple[str, ...] = ()

    def pack_ids(self) -> set[PackId]:
        """Return the names of the packs."""
        return {PackId(bytes.fromhex(pack)) for pack in self.packs}

    def only(self, packs: Iterable[PackId]) -> RemovalNotice:
        """Return the condemnation of those of its packs that are among `packs`."""
        wanted = {pack.hex() for pack in packs}
        kept = tuple(pack for pack in self.packs if pack in wanted)
        return msgspec.structs.replace(self, packs=kept)


_decoder = msgspec.json.Decoder(RemovalNotice)


def publish_notice(storage: Storage, condemnation: RemovalNotice) -> str:
    """Make a condemnation durable and return its object's name."""
    data = msgspec.json.encode(condemnation) + b"\n"
    name = f"{FOLDER}/{digest_of(data).hex()}"
    storage.write(name, data)
    return name


def replace_notice(storage: Storage, name: str, condemnation: RemovalNotice) -> None:
    """Put a condemnation in the place of one that has a name; one without packs is just removed."""
    if condemnation.packs and publish_notice(storage, condemnation) == name:
        return
    storage.delete(name)


def read_notices(storage: Storage) -> dict[str, RemovalNotice]:
    """Return every condemnation by its object's name.

    One that is damaged is logged and left out: its packs are packs like all others then, and what
    is not needed of them is condemned again.
    """
    found = {}
    for name, _, _ in storage.list(FOLDER):
        try:
            data = storage.read(name, 0, MAX_NOTICE_BYTES)
            if digest_of(data).hex() != name.rpartition("/")[2]:
                raise msgspec.ValidationError("it does not have its digest")
            condemnation = _decoder.decode(data)
            condemnation.pack_ids()
        except NotFoundError:
            continue
        except (msgspec.DecodeError, ValueError) as error:
            log.warning("%s is damaged (%s); it is not heeded", name, error)
            continue
        found[name] = condemnation
    return found


def packs_pending_removal(storage: Storage) -> set[PackId]:
    """Return the names of all packs that are condemned."""
    found: set[PackId] = set()
    for condemnation in read_notices(storage).values():
        found |= condemnation.pack_ids()
    return found
