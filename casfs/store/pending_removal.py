"""Removal notices: what a prune publishes about packs before it removes them (FORMAT.md, "Pending removal").

A notice is a small object in the storage, named by the digest of its bytes. A writer that opens the
repository after a notice is published stores the blobs of its packs again when it meets them. So a prune may
remove the packs once all earlier writers have ended and no snapshot needs the packs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from casfs.digest import PackId, digest_of
from casfs.errors import IntegrityError, NotFoundError
from casfs.format.pack import PackRef
from casfs.json_document import parse_json
from casfs.storage.base import Storage
from casfs.storage.concurrency import in_order

log = logging.getLogger(__name__)

FOLDER = "condemned"
MAX_NOTICE_BYTES = 64 * 1024 * 1024
MAX_NOTICE_PACKS = 200_000
"""The most packs that a prune names in one notice, in some 13 MiB; a reader takes what fits in the bytes."""

MAX_NOTICES = 10_000
MAX_NOTICES_BYTES = 128 * 1024 * 1024
"""Limits of all notices together: a writer with create-only credentials could add any number, and each
takes memory."""

_READ_AHEAD = 4
"""How many notices are read at the same time, of 13 MiB each at most in an honest repository."""


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


def notices_of(time_s: int, packs: Iterable[PackRef]) -> Iterator[RemovalNotice]:
    """Yield notices that together name these packs, each small enough for every reader."""
    rest = iter(sorted(packs))
    while part := list(islice(rest, MAX_NOTICE_PACKS)):
        yield RemovalNotice.of(time_s, part)


def encode_notice(notice: RemovalNotice) -> tuple[str, bytes]:
    """Return the name and the bytes of a notice's object."""
    data = msgspec.json.encode(notice) + b"\n"
    return f"{FOLDER}/{digest_of(data).hex()}", data


def publish_notice(storage: Storage, notice: RemovalNotice) -> str:
    """Store a notice durably and return its object's name."""
    name, data = encode_notice(notice)
    storage.write(name, data)
    return name


def replace_notice(storage: Storage, name: str, notice: RemovalNotice) -> None:
    """Replace a stored notice; a new notice without packs only deletes the old one."""
    if (notice.packs or notice.meta) and publish_notice(storage, notice) == name:
        return
    storage.delete(name)


class ListedNotice(NamedTuple):
    """A stored notice and the time at which it was stored: nanoseconds by the storage's clock."""

    mtime_ns: int
    notice: RemovalNotice


class TooManyNoticesError(IntegrityError):
    """The storage has more notices than casfs reads."""

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.place = place

    def __str__(self) -> str:
        return (
            f"{self.place} has more removal notices than casfs reads, {MAX_NOTICES} of together "
            f"{MAX_NOTICES_BYTES >> 20} MiB, so which packs a prune removes is unknown; nothing was removed "
            f"or published. Delete the objects below {FOLDER}/ that no prune of yours has written"
        )


class DamagedNoticeError(IntegrityError):
    """An object in the place of a notice is not what its name says."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"{self.name} is damaged ({self.reason}), so which packs another prune removes is unknown; "
            "nothing was removed. Delete this object, and run `casfs prune` again after an hour"
        )


def list_notices(
    storage: Storage,
    known: Mapping[str, ListedNotice] = MappingProxyType({}),
    *,
    refuse_damaged: bool = False,
) -> dict[str, ListedNotice]:
    """Return every intact notice by its object's name; those in `known` are not read again.

    A damaged notice is logged and ignored, or raises DamagedNoticeError. Raise TooManyNoticesError where the
    limits leave some unread.
    """
    found = {}
    listed = list(islice(storage.list(FOLDER), MAX_NOTICES + 1))
    total_bytes = sum(min(one.size, MAX_NOTICE_BYTES) for one in listed)
    if len(listed) > MAX_NOTICES or total_bytes > MAX_NOTICES_BYTES:
        raise TooManyNoticesError(storage.url)
    new = (one.name for one in listed if one.name not in known)
    read = in_order(storage, partial(_read_notice, storage), new, _READ_AHEAD)
    for name, _, mtime_ns in listed:
        notice = known[name].notice if name in known else next(read)
        if isinstance(notice, ValueError):
            if refuse_damaged:
                raise DamagedNoticeError(name, str(notice)) from notice
            log.warning("%s is damaged (%s); ignored", name, notice)
        elif notice is not None:
            found[name] = ListedNotice(mtime_ns, notice)
    return found


def _read_notice(storage: Storage, name: str) -> RemovalNotice | ValueError | None:
    """Return a notice, the reason why it is damaged, or None where it is gone."""
    try:
        data = storage.read(name, 0, MAX_NOTICE_BYTES)
        if digest_of(data).hex() != name.rpartition("/")[2]:
            raise ValueError("digest mismatch")
        notice = parse_json(data, RemovalNotice)
        notice.pack_refs()
    except NotFoundError:
        return None
    except ValueError as error:
        return error
    return notice


def read_notices(storage: Storage) -> dict[str, RemovalNotice]:
    """Return every intact notice by its object's name.

    A damaged notice is logged and ignored: its packs count as ordinary packs, and the next prune marks those
    that are not needed again.
    """
    return {name: listed.notice for name, listed in list_notices(storage).items()}


def packs_pending_removal(storage: Storage) -> set[PackRef]:
    """Return all packs that are marked for removal."""
    found: set[PackRef] = set()
    for notice in read_notices(storage).values():
        found |= notice.pack_refs()
    return found
