"""Snapshots: what is published comes back, and a file that is not what its name says is refused."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
import zstandard

from casfs.digest import SnapshotId, digest_of
from casfs.errors import TreeError, UsageError
from casfs.format.codec import MAX_PLAIN_BYTES, BlobCodec
from casfs.format.key_derivation import WriteSession
from casfs.format.snapshot import (
    HEADER,
    MAGIC,
    MAX_SNAPSHOT_BYTES,
    Snapshot,
    SnapshotStats,
    decode_snapshot,
    encode_snapshot,
    read_envelope,
    require_encodable,
)
from casfs.format.tree import NodeType, TreeRef
from tests.support.builders import entry, file
from tests.support.encryption import SESSION, OneSession

ROOT = entry(b"", NodeType.DIRECTORY, tree=TreeRef(b"\x07" * 32, 5, 100, 1))
SMALL = Snapshot(root=ROOT, time_ns=0, host="h", user="u", paths=())
FULL = Snapshot(
    root=ROOT,
    time_ns=1_700_000_000_123_456_789,
    host="häst",
    user="me",
    paths=(b"/home/a", b"\xff\n"),
    tags=("daily", "keep"),
    users=((0, "root"), (4_294_967_294, "nobody")),
    groups=((0, "wheel"),),
    parent=b"\x01" * 32,
    replaces=b"\x02" * 32,
    program="casfs 1",
    stats=SnapshotStats(files=3, seconds=1.5),
    directory=b"/home",
)


@pytest.fixture
def codec() -> BlobCodec:
    return BlobCodec(3)


def made(payload: bytes, plain_bytes: int, codec: int = 0, **header: Any) -> bytes:
    """Return a file with this payload and a correct header by default."""
    fields = {"magic": MAGIC, "version": 1} | header
    return HEADER.pack(fields["magic"], fields["version"], codec, 0, plain_bytes) + payload


def read(data: bytes, codec: BlobCodec) -> Snapshot:
    return decode_snapshot(SnapshotId(digest_of(data)), data, codec)


@pytest.mark.parametrize("snapshot", [SMALL, FULL], ids=["small", "full"])
def test_a_snapshot_comes_back_as_it_was_published(codec: BlobCodec, snapshot: Snapshot) -> None:
    snapshot_id, data = encode_snapshot(snapshot, codec)
    assert decode_snapshot(snapshot_id, data, codec) == snapshot
    assert snapshot_id == SnapshotId(digest_of(data))
    assert encode_snapshot(snapshot, BlobCodec(3)) == (snapshot_id, data)


def test_a_short_snapshot_is_raw_and_a_long_one_is_compressed(codec: BlobCodec) -> None:
    _, data = encode_snapshot(SMALL, codec)
    long = msgspec.structs.replace(SMALL, paths=tuple(b"/a/path/%d" % n for n in range(1000)))
    long_id, packed = encode_snapshot(long, codec)
    assert HEADER.unpack_from(packed)[2] == 1
    assert len(packed) < 10_000
    assert decode_snapshot(long_id, packed, codec) == long
    assert HEADER.unpack_from(data)[4] >= len(data) - HEADER.size


def test_any_changed_byte_is_noticed(codec: BlobCodec) -> None:
    snapshot_id, data = encode_snapshot(FULL, codec)
    for place in range(len(data)):
        changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with pytest.raises(TreeError, match="digest mismatch"):
            decode_snapshot(snapshot_id, changed, codec)
    with pytest.raises(TreeError, match=snapshot_id.hex()[:12]):
        decode_snapshot(snapshot_id, data + b"\0", codec)


class TestHostileSnapshotFile:
    """Files whose digest fits their name, but that no casfs has written."""

    PLAIN = msgspec.msgpack.encode(SMALL)

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"", "too short"),
            (made(b"", 0)[:-1], "too short"),
            (made(PLAIN, len(PLAIN), magic=b"CASFSPAK"), "form"),
            (made(PLAIN, len(PLAIN), version=2), "form"),
            (made(b"", MAX_PLAIN_BYTES + 1), "form"),
            (made(PLAIN, len(PLAIN) - 1), "damaged"),
            (made(PLAIN, len(PLAIN) + 1), "damaged"),
            (made(PLAIN, len(PLAIN), codec=1), "damaged"),
            (made(PLAIN, len(PLAIN), codec=9), "codec 9"),
            (made(b"", 0), "parse"),
            (made(b"\xc1", 1), "parse"),
            (made(b"\x91" * 5000, 5000), "parse"),
            (made(b"\x80", 1), "parse"),
        ],
    )
    def test_a_snapshot_file_that_breaks_the_format_is_refused(
        self, codec: BlobCodec, data: bytes, reason: str
    ) -> None:
        with pytest.raises(TreeError, match=reason):
            read(data, codec)

    def test_a_snapshot_file_that_expands_beyond_its_declared_size_is_refused(
        self, codec: BlobCodec
    ) -> None:
        bomb = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 20))
        with pytest.raises(TreeError, match="another size"):
            read(made(bomb, 1000, codec=1), codec)

    @pytest.mark.parametrize(
        "fields",
        [
            {"root": file(b"")},
            {"root": entry(b"", NodeType.DIRECTORY)},
            {"root": entry(b"", NodeType.DIRECTORY, tree=TreeRef(b"short", 0, 0, 0))},
            {"root": entry(b"", NodeType.DIRECTORY, uid=-1, tree=ROOT.tree)},
            {"root": None},
            {"time_ns": "now"},
            {"time_ns": 1.5},
            {"host": b"\xff\xfe"},
            {"paths": ["text"]},
            {"tags": "text"},
            {"users": [[1]]},
            {"stats": []},
            {"stats": {"seconds": math.nan}},
            {"stats": {"seconds": math.inf}},
            {"stats": {"seconds": -math.inf}},
        ],
    )
    def test_a_snapshot_file_with_impossible_fields_is_refused(
        self, codec: BlobCodec, fields: dict[str, Any]
    ) -> None:
        known = {name: getattr(FULL, name) for name in FULL.__struct_fields__}
        plain = msgspec.msgpack.encode(known | fields)
        with pytest.raises(TreeError):
            read(made(plain, len(plain)), codec)

    def test_a_snapshot_file_with_invalid_unicode_is_refused(self, codec: BlobCodec) -> None:
        plain = msgspec.msgpack.encode(FULL).replace("häst".encode(), b"h\xff\xffst")
        with pytest.raises(TreeError, match="parse"):
            read(made(plain, len(plain)), codec)


class TestSnapshotCompatibility:
    def test_a_snapshot_with_fields_of_a_later_version_is_read(self, codec: BlobCodec) -> None:
        known = {name: getattr(FULL, name) for name in FULL.__struct_fields__}
        stats = msgspec.to_builtins(FULL.stats) | {"later": 1}
        plain = msgspec.msgpack.encode(known | {"later": ["x"], "stats": stats})
        assert read(made(plain, len(plain)), codec) == FULL

    def test_a_snapshot_without_a_directory_is_stored_as_by_older_versions(self) -> None:
        assert b"directory" in msgspec.msgpack.encode(FULL)
        assert b"directory" not in msgspec.msgpack.encode(SMALL)

    def test_a_snapshot_with_missing_fields_has_their_defaults(self, codec: BlobCodec) -> None:
        known = {"root": ROOT, "time_ns": 0, "host": "h", "user": "u", "paths": []}
        plain = msgspec.msgpack.encode(known)
        assert read(made(plain, len(plain)), codec) == SMALL


class TestUnreadableSnapshot:
    def test_a_snapshot_with_too_many_paths_is_not_published(self, codec: BlobCodec) -> None:
        paths = tuple(b"/a/rather/long/path/%09d" % n + b"x" * 200 for n in range(80_000))
        with pytest.raises(UsageError, match="name fewer paths"):
            encode_snapshot(msgspec.structs.replace(SMALL, paths=paths), codec)

    def test_room_for_what_is_not_known_yet_is_kept(self, codec: BlobCodec) -> None:
        paths = tuple(b"/a/rather/long/path/%09d" % n + b"x" * 200 for n in range(60_000))
        big = msgspec.structs.replace(SMALL, paths=paths)
        require_encodable(big, 1 << 20)
        with pytest.raises(UsageError, match="name fewer paths"):
            require_encodable(big, 4 << 20)
        with pytest.raises(UsageError, match="not UTF-8"):
            require_encodable(msgspec.structs.replace(SMALL, host="h\udcff"), 0)

    def test_a_snapshot_with_invalid_unicode_is_not_published(self, codec: BlobCodec) -> None:
        for fields in ({"host": "h\udcff"}, {"tags": ("\udcff",)}, {"user": "\udcff"}):
            with pytest.raises(UsageError, match="not UTF-8"):
                encode_snapshot(msgspec.structs.replace(SMALL, **fields), codec)

    def test_a_snapshot_of_the_greatest_size_is_published_and_read(self, codec: BlobCodec) -> None:
        paths = tuple(b"/a/rather/long/path/%09d" % n + b"x" * 200 for n in range(60_000))
        big = msgspec.structs.replace(SMALL, paths=paths)
        snapshot_id, data = encode_snapshot(big, codec)
        assert len(data) < MAX_SNAPSHOT_BYTES
        assert decode_snapshot(snapshot_id, data, codec) == big


class TestEncryptedSnapshot:
    """A snapshot of an encrypted repository: what it shows without a key, and what opens it."""

    @pytest.fixture
    def made(self, codec: BlobCodec) -> tuple[SnapshotId, bytes]:
        return encode_snapshot(FULL, codec, SESSION)

    def test_an_encrypted_snapshot_is_decoded_with_its_session(
        self, codec: BlobCodec, made: tuple[SnapshotId, bytes]
    ) -> None:
        assert decode_snapshot(*made, codec, OneSession()) == FULL
        assert bytes(made[0]) == digest_of(made[1])

    def test_an_encrypted_snapshot_shows_only_its_time_and_sizes_without_a_key(
        self, made: tuple[SnapshotId, bytes]
    ) -> None:
        envelope = read_envelope(*made)
        assert envelope is not None
        assert envelope.session == SESSION.id
        assert (envelope.time_ns, envelope.total_bytes) == (FULL.time_ns, 100)
        for secret in ("häst".encode(), b"/home/a", b"daily", b"wheel", b"casfs 1", b"\x07" * 32):
            assert secret not in made[1]

    def test_an_unencrypted_snapshot_has_no_envelope(self, codec: BlobCodec) -> None:
        assert read_envelope(*encode_snapshot(FULL, codec)) is None

    def test_an_encrypted_snapshot_has_other_bytes_every_time(self, codec: BlobCodec) -> None:
        assert len({encode_snapshot(FULL, codec, SESSION)[0] for _ in range(3)}) == 3

    def test_an_encrypted_snapshot_with_any_changed_byte_does_not_open_under_its_new_id(
        self, codec: BlobCodec, made: tuple[SnapshotId, bytes]
    ) -> None:
        data = made[1]
        for place in range(len(data)):
            changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
            new_id = SnapshotId(digest_of(changed))
            with pytest.raises(TreeError, match="snapshot "):
                decode_snapshot(new_id, changed, codec, AnySession())

    def test_an_encrypted_snapshot_that_is_cut_does_not_open_under_its_new_id(
        self, codec: BlobCodec, made: tuple[SnapshotId, bytes]
    ) -> None:
        for size in (0, 15, 16, 50, 103, 104, 119, 120, len(made[1]) - 1):
            data = made[1][:size]
            with pytest.raises(TreeError):
                decode_snapshot(SnapshotId(digest_of(data)), data, codec, AnySession())

    def test_an_encrypted_snapshot_and_an_unencrypted_repository_exclude_each_other(
        self, codec: BlobCodec, made: tuple[SnapshotId, bytes]
    ) -> None:
        with pytest.raises(TreeError, match="is encrypted, unlike its repository"):
            decode_snapshot(*made, codec)
        with pytest.raises(TreeError, match="is not encrypted, unlike its repository"):
            decode_snapshot(*encode_snapshot(FULL, codec), codec, OneSession())


class AnySession(OneSession):
    """What takes any session's id for the one that it knows."""

    def session(self, session_id: bytes) -> WriteSession:
        return SESSION
