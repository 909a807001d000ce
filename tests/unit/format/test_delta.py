"""The index delta's format: what is written comes back, and hostile bytes are refused with a sentence."""

from __future__ import annotations

import struct
import tracemalloc

import pytest

from casfs.digest import Digest, PackId, digest_of
from casfs.errors import DeltaError, KeyMissingError
from casfs.format.codec import BlobKind
from casfs.format.delta import (
    MAX_DELTA_BYTES,
    SESSION_HEADER,
    Delta,
    DeltaBuilder,
    DeltaName,
    DeltaPack,
    decode_delta,
    parse_name,
    session_of,
)
from casfs.format.key_derivation import SessionId, WriteSession
from casfs.format.pack import ENTRY, MAX_PACK_BLOBS, PackEntry, PackRef
from tests.support.encryption import DOMAIN, SESSION, OneSession

TIME_MS = 0x18F_1234_5678


def entries(label: str, count: int, first: int = 32) -> list[PackEntry]:
    found = []
    offset = first
    for number in range(count):
        digest = digest_of(f"{label} {number}".encode())
        found.append(PackEntry(digest, offset, 100 + number, 200 + number, BlobKind.DATA, 1))
        offset += 100 + number + 16
    return found


def pack(label: str, count: int = 3, is_metadata: bool = False) -> DeltaPack:
    pack_id = PackId(digest_of(label.encode()))
    return DeltaPack(PackRef(pack_id, is_metadata), 1_000_000, entries(label, count))


def encoded(*packs: DeltaPack, session: WriteSession | None = None) -> tuple[DeltaName, bytes]:
    builder = DeltaBuilder()
    for one in packs:
        builder.add(one)
    return builder.encode(TIME_MS, session)


def renamed(data: bytes) -> DeltaName:
    """Return the name that fits forged bytes."""
    return DeltaName(TIME_MS, digest_of(data))


def patched(data: bytes, offset: int, layout: str, value: int) -> bytes:
    return data[:offset] + struct.pack(layout, value) + data[offset + struct.calcsize(layout) :]


def test_packs_removals_and_replaced_deltas_come_back() -> None:
    builder = DeltaBuilder()
    packs = [pack("one"), pack("two", 0), pack("three", 5, is_metadata=True)]
    for one in packs:
        builder.add(one)
    builder.removed += [PackId(digest_of(b"gone")), PackId(digest_of(b"also gone"))]
    builder.replaced.append(DeltaName(7, digest_of(b"earlier")))
    builder.is_complete = True
    most_bytes = builder.size_bytes
    name, data = builder.encode(TIME_MS)
    assert len(data) <= most_bytes
    assert parse_name(str(name)) == name
    found = decode_delta(name, data)
    assert list(found.packs()) == packs
    assert list(found.packs()) == packs, "a second walk yields the same"
    assert found.removed == tuple(builder.removed)
    assert found.replaced == (DeltaName(7, digest_of(b"earlier")),)
    assert found.is_complete


def test_entries_with_gaps_keep_their_offsets() -> None:
    gappy = [*entries("a", 2), *entries("b", 1, first=5000), *entries("c", 3, first=9000)]
    damaged = DeltaPack(PackRef(PackId(digest_of(b"p")), False), 20_000, gappy)
    name, data = encoded(pack("before"), damaged, pack("after"))
    assert list(decode_delta(name, data).packs()) == [pack("before"), damaged, pack("after")]


def test_room_for_a_pack_counts_the_worst_gaps() -> None:
    builder = DeltaBuilder()
    scattered = [entries(str(n), 1, first=1000 * n + 32)[0] for n in range(50)]
    worst = DeltaPack(PackRef(PackId(digest_of(b"p")), False), 1_000_000, scattered)
    while builder.has_room(50, 40_000):
        builder.add(worst)
    _, data = builder.encode(TIME_MS, SESSION)
    assert 30_000 < len(data) <= 40_000


def test_names_sort_by_time_and_foreign_names_are_no_deltas() -> None:
    early, late = DeltaName(5, bytes(32)), DeltaName(1 << 40, bytes(32))
    assert str(early) < str(late)
    for name in ("deltas/x", f"packs/{early.key}", f"deltas/{early.key}x", f"deltas/{'A' * 12}"):
        assert parse_name(name) is None


def test_an_encrypted_delta_shows_no_digest_and_comes_back() -> None:
    secret = pack("secret", 4)
    name, data = encoded(secret, session=SESSION)
    assert bytes(secret.pack.id) not in data
    assert all(bytes(entry.digest) not in data for entry in secret.entries)
    assert session_of(data) == SESSION.id
    assert list(decode_delta(name, data, OneSession()).packs()) == [secret]


def test_two_encrypted_deltas_with_the_same_packs_share_no_bytes_after_the_session() -> None:
    (_, one), (_, two) = (encoded(pack("a"), session=SESSION) for _ in range(2))
    assert one[56:88] != two[56:88]
    assert one[88:] != two[88:]


class OtherSessions:
    def session(self, session_id: SessionId) -> WriteSession:
        raise KeyMissingError("no identity decrypts it")


def test_a_missing_key_is_reported_as_such() -> None:
    name, data = encoded(pack("a"), session=SESSION)
    with pytest.raises(KeyMissingError):
        decode_delta(name, data, OtherSessions())


class AnySession:
    """A session of another repository under the id that the delta names."""

    def session(self, session_id: SessionId) -> WriteSession:
        return WriteSession(bytes(32), bytes(32), (DOMAIN,))


def test_an_encrypted_delta_is_bound_to_its_session_its_time_and_its_header() -> None:
    name, data = encoded(pack("a"), session=SESSION)
    with pytest.raises(DeltaError, match="decryption failed"):
        decode_delta(name, data, AnySession())
    later = patched(data, 16, "<Q", TIME_MS + 1)
    with pytest.raises(DeltaError, match="decryption failed"):
        decode_delta(DeltaName(TIME_MS + 1, digest_of(later)), later, OneSession())
    for offset in (12, 60, SESSION_HEADER, len(data) - 1):
        changed = data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]
        with pytest.raises(DeltaError):
            decode_delta(renamed(changed), changed, OneSession())


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_a_delta_under_another_time_is_refused(is_encrypted: bool) -> None:
    name, data = encoded(pack("a"), session=SESSION if is_encrypted else None)
    moved = DeltaName(name.time_ms + 1, name.digest)
    with pytest.raises(DeltaError, match="its time differs"):
        decode_delta(moved, data, OneSession() if is_encrypted else None)


def test_a_delta_whose_encryption_is_not_that_of_its_repository_is_refused() -> None:
    name, data = encoded(pack("a"))
    with pytest.raises(DeltaError, match="not encrypted"):
        decode_delta(name, data, OneSession())
    name, data = encoded(pack("a"), session=SESSION)
    with pytest.raises(DeltaError, match="it is encrypted"):
        decode_delta(name, data)


def test_a_damaged_or_cut_delta_is_refused() -> None:
    name, data = encoded(pack("a"))
    for bad in (b"", data[:-1], data + b"\0", data[:50] + b"?" + data[51:]):
        with pytest.raises(DeltaError, match="digest mismatch"):
            decode_delta(name, bad)


@pytest.mark.parametrize(
    ("offset", "layout", "value"),
    [
        (0, "<Q", 0),  # magic
        (8, "<H", 2),  # version
        (10, "<H", 25),  # header length
        (28, "<I", 1),  # replaced
        (28, "<I", 0xFFFFFFFF),
        (32, "<I", 1),  # removed
        (32, "<I", 0xFFFFFFFF),
        (36, "<I", 0),  # pack records
        (36, "<I", 0xFFFFFFFF),
        (40, "<I", 0xFFFFFFFF),  # entries
        (80, "<Q", 1 << 32),  # pack size
        (80, "<Q", 50),
        (88, "<I", 2),  # entries of the pack
        (88, "<I", 4),
        (88, "<I", 0xFFFFFFFF),
        (92, "<I", 0),  # first offset
        (92, "<I", 0xFFFFFFFF),
        (104 + 32, "<I", 0xFFFFFFFF),  # stored bytes
        (104 + 36, "<I", 0xFFFFFFFF),  # plain bytes
        (104 + 40, "<B", 0),  # kind
        (104 + 40, "<B", 255),
    ],
)
def test_forged_fields_are_refused(offset: int, layout: str, value: int) -> None:
    _, data = encoded(pack("a"))
    forged = patched(data, offset, layout, value)
    with pytest.raises(DeltaError):
        list(decode_delta(renamed(forged), forged).packs())


def test_a_delta_over_the_limit_is_refused_before_it_is_parsed() -> None:
    data = bytes(MAX_DELTA_BYTES + 1)
    with pytest.raises(DeltaError, match="its size is invalid"):
        decode_delta(renamed(data), data)


def test_a_pack_with_too_many_entries_is_refused() -> None:
    run = entries("x", 1)
    scattered = [run[0]._replace(offset=32 + 1000 * (n % 7)) for n in range(MAX_PACK_BLOBS + 1)]
    builder = DeltaBuilder()
    builder.add(DeltaPack(PackRef(PackId(bytes(32)), False), 1_000_000, scattered))
    name, data = builder.encode(TIME_MS)
    with pytest.raises(DeltaError, match="too large"):
        list(decode_delta(name, data).packs())


@pytest.mark.slow
def test_a_large_delta_is_parsed_a_pack_at_a_time() -> None:
    builder = DeltaBuilder()
    number = 0
    while builder.has_room(2_000):
        number += 1
        digest = Digest(number.to_bytes(32, "big"))
        run = [PackEntry(digest, 32 + n * 116, 100, 100, BlobKind.DATA, 1) for n in range(2_000)]
        builder.add(DeltaPack(PackRef(PackId(digest), False), 1_000_000, run))
    name, data = builder.encode(TIME_MS)
    del builder
    assert len(data) > MAX_DELTA_BYTES // 3
    delta: Delta = decode_delta(name, data)
    tracemalloc.start()
    try:
        count = sum(len(one.entries) for one in delta.packs())
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == number * 2_000
    assert count * ENTRY.size < len(data)
    assert peak_bytes < 4_000_000
