"""Index deltas: which packs a session stored and removed, as bytes, without I/O (FORMAT.md, "Index deltas").

A delta carries the directories of packs, so that a host can fill its index without reading any pack. It is
derived from the packs, and believed for no more than the directory of a pack is: a reader recomputes every
digest. A delta may hold 32 MiB of entries, so its packs are parsed one at a time.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from casfs.digest import PackId, digest_of
from casfs.errors import BlobError, DeltaError
from casfs.format.codec import MAX_PLAIN_BYTES, TAG_BYTES, BlobKind
from casfs.format.group import MAX_GROUP_BLOBS
from casfs.format.key_derivation import SALT_BYTES, SessionId, Sessions, WriteSession
from casfs.format.pack import (
    BLOB_HEADER,
    ENTRY,
    HEADER,
    MAX_PACK_BLOBS,
    MAX_PACK_BYTES,
    MAX_STORED_BYTES,
    PackEntry,
    PackRef,
)

FOLDER = "deltas"
MAGIC = b"CASFSDLT"
VERSION = 1

_HEADER = struct.Struct("<8sHHIQ")
assert _HEADER.size == 24
_SESSION = struct.Struct("<32s32s")
SESSION_HEADER = _HEADER.size + _SESSION.size
"""Size in bytes of an encrypted delta's header."""

_BODY = struct.Struct("<IIIIII")
assert _BODY.size == 24
_REPLACED = struct.Struct("<Q32s")
assert _REPLACED.size == 40
_PACK = struct.Struct("<32sQIIII")
assert _PACK.size == 56

_COMPLETE = 1
_METADATA = 2
"""The flag of a metadata pack, as in the index."""

REPLACED_BYTES = _REPLACED.size
MAX_REPLACED = 100_000
"""The most deltas that a writer lets one delta replace."""

MAX_DELTA_BYTES = 32 * 1024 * 1024
"""A reader refuses a larger delta; a writer begins another before this size."""

_NAME = re.compile(r"([0-9a-f]{12})-([0-9a-f]{64})")


class DeltaName(NamedTuple):
    """A delta's time, in milliseconds since 1970 by the storage's clock, and the digest of its bytes."""

    time_ms: int
    digest: bytes

    def __str__(self) -> str:
        return f"{FOLDER}/{self.key}"

    @property
    def key(self) -> str:
        """The last part of the object's name; keys sort by time."""
        return f"{self.time_ms:012x}-{self.digest.hex()}"


def parse_key(key: str) -> DeltaName | None:
    """Return the parts of the last part of a name, or None where it is no delta's."""
    found = _NAME.fullmatch(key)
    return DeltaName(int(found.group(1), 16), bytes.fromhex(found.group(2))) if found else None


def parse_name(name: str) -> DeltaName | None:
    """Return the parts of an object's name, or None for an object that is no delta."""
    folder, _, key = name.partition("/")
    return parse_key(key) if folder == FOLDER else None


@dataclass(frozen=True, slots=True)
class DeltaPack:
    """A stored pack, its size in bytes, and its directory's entries."""

    pack: PackRef
    pack_bytes: int
    entries: Sequence[PackEntry]


class Delta:
    """A parsed delta. `removed` are packs that no longer exist, `replaced` deltas that it makes superfluous.

    `is_complete` means that this delta and the earlier ones name every pack that its writer found when it
    listed the packs.
    """

    def __init__(self, name: DeltaName, body: bytes | memoryview) -> None:
        self.name = name
        if len(body) < _BODY.size:
            raise DeltaError(str(name), "too short")
        flags, replaced, removed, self._records, entries, _ = _BODY.unpack_from(body)
        sizes = (
            replaced * _REPLACED.size,
            removed * 32,
            self._records * _PACK.size,
            entries * ENTRY.size,
        )
        if _BODY.size + sum(sizes) != len(body):
            raise DeltaError(str(name), "its counts contradict its size")
        self.is_complete = bool(flags & _COMPLETE)
        begin = _BODY.size
        end = begin + sizes[0]
        self.replaced = tuple(
            DeltaName(time_ms, digest)
            for time_ms, digest in _REPLACED.iter_unpack(body[begin:end])
            if time_ms < 1 << 48
        )
        begin, end = end, end + sizes[1]
        self.removed = tuple(PackId(bytes(body[at : at + 32])) for at in range(begin, end, 32))
        self._records_at = end
        self._entries_at = end + sizes[2]
        self._body = body

    def packs(self) -> Iterator[DeltaPack]:
        """Yield the stored packs, one in memory at a time; raise DeltaError where one is invalid."""
        records = memoryview(self._body)[self._records_at : self._entries_at]
        at = self._entries_at
        current: tuple[PackRef, int] | None = None
        entries: list[PackEntry] = []
        for pack, pack_bytes, count, first, flags, _ in _PACK.iter_unpack(records):
            end = at + count * ENTRY.size
            if end > len(self._body):
                raise DeltaError(str(self.name), "its counts contradict each other")
            # A pack whose directory was damaged has a record for each run of entries without a gap.
            if current is None or current[0].id != pack:
                if current is not None:
                    yield DeltaPack(*current, entries)
                ref = PackRef(PackId(pack), bool(flags & _METADATA))
                current, entries = (ref, pack_bytes), []
            if pack_bytes > MAX_PACK_BYTES or len(entries) + count > MAX_PACK_BLOBS:
                raise DeltaError(str(self.name), "it names a pack that is too large")
            entries += self._parse_entries(self._body[at:end], first, pack_bytes)
            at = end
        if at != len(self._body):
            raise DeltaError(str(self.name), "its counts contradict each other")
        if current is not None:
            yield DeltaPack(*current, entries)

    def _parse_entries(
        self, data: bytes | memoryview, offset: int, pack_bytes: int
    ) -> list[PackEntry]:
        entries: list[PackEntry] = []
        for digest, stored_bytes, plain_bytes, kind, codec, position in ENTRY.iter_unpack(data):
            if entries and not position:
                offset += entries[-1].stored_bytes + BLOB_HEADER.size
            entry = PackEntry(digest, offset, stored_bytes, plain_bytes, kind, codec, position)
            if (
                stored_bytes > MAX_STORED_BYTES
                or plain_bytes > MAX_PLAIN_BYTES
                or offset + stored_bytes > pack_bytes
                or offset < HEADER.size + BLOB_HEADER.size
                or not BlobKind.DATA <= kind <= BlobKind.CONTENT
                or position >= MAX_GROUP_BLOBS
                or (position and not entry.is_grouped)
                or (position and entries and not entry.shares_group(entries[-1]))
            ):
                raise DeltaError(str(self.name), "it has an invalid entry")
            entries.append(entry)
        return entries


class DeltaBuilder:
    """Collects packs for one delta as encoded bytes; used by one thread at a time."""

    def __init__(self) -> None:
        self.packs: list[PackId] = []
        self.removed: list[PackId] = []
        self.replaced: list[DeltaName] = []
        self.is_complete = False
        self._records = bytearray()
        self._entries = bytearray()

    @property
    def size_bytes(self) -> int:
        """An upper bound of the delta's size."""
        fixed = SESSION_HEADER + _BODY.size + TAG_BYTES
        lists = len(self.removed) * 32 + len(self.replaced) * _REPLACED.size
        return fixed + lists + len(self._records) + len(self._entries)

    def has_room(self, entries: int, max_bytes: int = MAX_DELTA_BYTES) -> bool:
        """Return whether a pack with that many entries fits into `max_bytes`, whatever its gaps."""
        return self.size_bytes + entries * (ENTRY.size + _PACK.size) + _PACK.size <= max_bytes

    def add(self, pack: DeltaPack) -> None:
        """Add a stored pack; the caller has asked `has_room`."""
        self.packs.append(pack.pack.id)
        runs = list(_runs(pack.entries)) or [pack.entries]
        for run in runs:
            first = run[0].offset if run else 0
            flags = _METADATA * pack.pack.is_meta
            self._records += _PACK.pack(pack.pack.id, pack.pack_bytes, len(run), first, flags, 0)
            for e in run:
                self._entries += e.pack()

    def encode(self, time_ms: int, session: WriteSession | None = None) -> tuple[DeltaName, bytes]:
        """Return the name and the bytes of the delta, encrypted in `session` if given.

        The packs leave the builder, since they can be as large as the delta.
        """
        body = _BODY.pack(
            _COMPLETE * self.is_complete,
            len(self.replaced),
            len(self.removed),
            len(self._records) // _PACK.size,
            len(self._entries) // ENTRY.size,
            0,
        )
        parts: list[bytes | bytearray] = [
            body,
            *(_REPLACED.pack(*name) for name in self.replaced),
            *self.removed,
            self._records,
            self._entries,
        ]
        self._records, self._entries = bytearray(), bytearray()
        if session is None:
            header = _HEADER.pack(MAGIC, VERSION, _HEADER.size, 0, time_ms)
            data = b"".join([header, *parts])
        else:
            from casfs.format.cipher import encrypt_delta

            plain = b"".join(parts)
            parts.clear()
            salt = os.urandom(SALT_BYTES)
            header = _HEADER.pack(MAGIC, VERSION, SESSION_HEADER, 0, time_ms)
            header += _SESSION.pack(session.id, salt)
            data = header + encrypt_delta(session, salt, plain, header)
        return DeltaName(time_ms, digest_of(data)), data


def _runs(entries: Sequence[PackEntry]) -> Iterator[Sequence[PackEntry]]:
    """Yield parts of entries without a gap between two payloads but for the record header.

    A run may lack blobs of a group; it begins every payload after its first with the blob at position 0.
    """
    begin = 0
    for at in range(1, len(entries)):
        before, entry = entries[at - 1], entries[at]
        is_next = entry.offset == before.offset + before.stored_bytes + BLOB_HEADER.size
        if not (entry.shares_group(before) or (is_next and not entry.position)):
            yield entries[begin:at]
            begin = at
    if entries:
        yield entries[begin:]


def decode_delta(name: DeltaName, data: bytes, sessions: Sessions | None = None) -> Delta:
    """Parse a delta; raise DeltaError when it does not match its name or breaks the format's rules.

    In an encrypted repository `sessions` provides the keys; its errors are passed on.
    """
    if digest_of(data) != name.digest:
        raise DeltaError(str(name), "digest mismatch")
    if not _HEADER.size <= len(data) <= MAX_DELTA_BYTES:
        raise DeltaError(str(name), "its size is invalid")
    magic, version, header_bytes, _, time_ms = _HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise DeltaError(str(name), "its format is unknown; use a newer casfs")
    if time_ms != name.time_ms:
        raise DeltaError(str(name), "its time differs from its name's")
    expected_bytes = _HEADER.size if sessions is None else SESSION_HEADER
    if header_bytes != expected_bytes or len(data) < header_bytes:
        is_not = "" if sessions is None else " not"
        raise DeltaError(str(name), f"it is{is_not} encrypted, unlike its repository")
    body: bytes | memoryview = memoryview(data)[header_bytes:]
    if sessions is not None:
        from casfs.format.cipher import decrypt_delta

        session_id, salt = _SESSION.unpack_from(data, _HEADER.size)
        session = sessions.session(SessionId(session_id))
        try:
            body = decrypt_delta(session, salt, body, data[:header_bytes])
        except BlobError as error:
            raise DeltaError(str(name), error.reason) from error
    return Delta(name, body)


def session_of(data: bytes) -> bytes | None:
    """Return the session id in an encrypted delta's first bytes, None where they hold none."""
    if len(data) < SESSION_HEADER or data[:8] != MAGIC:
        return None
    session_id: bytes = _SESSION.unpack_from(data, _HEADER.size)[0]
    return session_id
