"""The formats of a repository: packs, blobs, trees, lists, snapshots, index deltas, configuration."""

from __future__ import annotations

import msgspec

from casfs.digest import Digest, PackId, SnapshotId, digest_of
from casfs.errors import (
    BlobError,
    DeltaError,
    FormatError,
    IntegrityError,
    NotFoundError,
    PackError,
    TreeError,
)
from casfs.format import codec as blob_codec
from casfs.format.cipher import PackCipher, encrypt_snapshot
from casfs.format.codec import ENCRYPTED, BlobCodec, Codec
from casfs.format.config import decode_config, encode_config
from casfs.format.delta import (
    _HEADER as DELTA_HEADER,
)
from casfs.format.delta import (
    MAGIC as DELTA_MAGIC,
)
from casfs.format.delta import (
    Delta,
    DeltaBuilder,
    DeltaName,
    DeltaPack,
    decode_delta,
    parse_name,
    session_of,
)
from casfs.format.lock_policy import decode_policy, encode_policy, new_policy
from casfs.format.pack import (
    ENTRY,
    HEADER,
    SCAN_FACTOR,
    TRAILER,
    PackEntry,
    encode_end,
    parse_directory,
    parse_header,
    parse_session,
    parse_trailer,
    scan_records,
)
from casfs.format.signature import SigningKey
from casfs.format.snapshot import (
    _INNER,
    SIGNED_VERSION,
    Snapshot,
    decode_signed_snapshot,
    decode_snapshot,
    encode_snapshot,
    read_envelope,
)
from casfs.format.snapshot import (
    HEADER as SNAPSHOT_HEADER,
)
from casfs.format.snapshot import (
    MAGIC as SNAPSHOT_MAGIC,
)
from casfs.format.tree import Leaf, decode_piece, encode_piece
from casfs.trees.content import EXTENT, ContentReader, parse_records
from tests.fuzz.target import Target, real_objects
from tests.support.encryption import REPOSITORY, SESSION, OneSession

CODEC = BlobCodec(3)
PACK = PackId(bytes(32))
KEY = SigningKey(bytes(32))
_SALT = bytes(32)
_CIPHER = PackCipher(SESSION, _SALT)
_ENVELOPE = SESSION.id + _SALT + bytes(24)

PACKS = ("repository-v*/packs/*/*", "repository-v*/meta/*/*", "encrypted-v*/packs/*/*")


def _trailer(data: bytes) -> None:
    offset, size, count, digest = parse_trailer(PACK, data[-TRAILER.size :], len(data))
    assert size == count * ENTRY.size and 0 <= offset <= len(data) - size
    directory = data[offset : offset + size]
    if digest_of(directory) == digest:
        parse_directory(PACK, directory, digest, offset)


def _directory(data: bytes) -> None:
    """Parse a directory that its trailer seals; the first bytes say where it lies."""
    end, body = int.from_bytes(data[:4], "little"), data[4:]
    entries = parse_directory(PACK, body, digest_of(body), end)
    assert all(HEADER.size < one.offset <= end for one in entries)
    written = encode_end(entries, end)
    offset, size, _, digest = parse_trailer(PACK, written[-TRAILER.size :], end + len(written))
    again = written[offset - end : offset - end + size]
    assert parse_directory(PACK, again, digest, end) == entries


def _records(data: bytes) -> None:
    found = list(scan_records(data, 0))
    assert sum(stored for *_, stored, _ in found) <= SCAN_FACTOR * len(data)
    for begin, _, codec, stored, plain in found[:4]:
        if plain <= 1 << 20:
            try:
                CODEC.decompress(codec, data[begin : begin + stored], plain)
            except BlobError:
                continue


def _pack_header(data: bytes) -> None:
    parse_header(PACK, data)
    parse_session(PACK, data)


def _payload(data: bytes) -> None:
    """Decompress; one at a time and in a batch say the same."""
    plain_bytes, codec, payload = int.from_bytes(data[:3], "little"), data[3:4], data[4:]
    one = blob_codec.Encoded(Digest(bytes(32)), 0, codec[0] if codec else 0, payload, plain_bytes)
    try:
        plain = CODEC.decompress(one.codec, payload, plain_bytes)
    except BlobError:
        assert CODEC.decode_many([one]) == [None]
        raise
    assert len(plain) == plain_bytes
    assert CODEC.decode_many([one._replace(digest=digest_of(plain))]) == [plain]


def _payload_seeds() -> list[bytes]:
    plain = b"some text " * 50
    ((_, packed),) = CODEC.encode_many([plain])
    size = len(plain).to_bytes(3, "little")
    return [size + bytes([Codec.ZSTD]) + packed, size + bytes([Codec.RAW]) + plain]


def _encrypted_payload(data: bytes) -> None:
    _CIPHER.decrypt(bytes(32), 16, data)


def _encrypted_payloads() -> list[bytes]:
    return [_CIPHER.encrypt(16, 1, Codec.RAW, 0, 4, b"blob")]


def _tree(data: bytes) -> None:
    piece = decode_piece(data)
    assert decode_piece(encode_piece(piece)) == piece


def _plain_blobs() -> list[bytes]:
    """Return the plaintexts of the metadata of the frozen repositories, snapshots' maps first."""
    found = []
    for data in real_objects("repository-v*/meta/*/*", "repository-v1/packs/*/*"):
        for begin, _, codec, stored, plain in scan_records(data, 0):
            try:
                found.append(CODEC.decompress(codec, data[begin : begin + stored], plain)[:8192])
            except BlobError:
                continue
    return found


def _trees() -> list[bytes]:
    found = []
    for plain in _plain_blobs():
        try:
            decode_piece(plain)
        except TreeError:
            continue
        found.append(plain)
    assert any(isinstance(decode_piece(one), Leaf) for one in found)
    return found


def _content(data: bytes) -> None:
    """Read a file all of whose lists are what follows its own records."""
    levels, count = (data[0] % 6, data[1]) if len(data) > 1 else (0, 0)
    end = 2 + count * EXTENT.size
    reader = ContentReader(data[2:end], levels, lambda _: data[end:])
    at = 0
    for number, extent in enumerate(reader.extents()):
        assert extent.begin == at and extent.length > 0
        at += extent.length
        if number > 100:
            break
    for number, _ in enumerate(reader.blobs()):
        if number > 100:
            break


def _record_seeds() -> list[bytes]:
    return [EXTENT.pack(8192, bytes(range(32))) * 3]


def _content_seeds() -> list[bytes]:
    record = EXTENT.pack(8192, bytes(range(32)))
    both = EXTENT.pack(16384, bytes(range(32)))
    return [b"\0\3" + record * 3, b"\1\1" + both + record * 2, b"\5\2" + record * 2 + record]


def _content_records(data: bytes) -> None:
    records = parse_records(data)
    assert b"".join(EXTENT.pack(*one) for one in records) == data


def _snapshot_file(data: bytes) -> None:
    snapshot_id = SnapshotId(digest_of(data))
    read_envelope(snapshot_id, data)
    decode_snapshot(snapshot_id, data, CODEC)


def _snapshot(data: bytes) -> None:
    """Decode a snapshot whose map is the input."""
    file = SNAPSHOT_HEADER.pack(SNAPSHOT_MAGIC, 1, Codec.RAW, 0, len(data)) + data
    _must_come_back(decode_snapshot(SnapshotId(digest_of(file)), file, CODEC))


def _must_come_back(snapshot: Snapshot) -> None:
    if not -(1 << 63) <= snapshot.time_ns < 1 << 63:
        return  # a reader shows it; no writer makes it
    snapshot_id, file = encode_snapshot(snapshot, CODEC)
    assert decode_snapshot(snapshot_id, file, CODEC) == snapshot


def _signed_snapshot(data: bytes) -> None:
    """Decode what a recipient of the repository encrypted and signed: any bytes as the map."""
    inner = bytes([Codec.RAW, 0, 0, 0]) + len(data).to_bytes(4, "little") + data
    header = SNAPSHOT_HEADER.pack(SNAPSHOT_MAGIC, SIGNED_VERSION, ENCRYPTED, 0, 0) + _ENVELOPE
    try:
        author = KEY.author_of(REPOSITORY, data)
    except (msgspec.DecodeError, RecursionError, ValueError):
        author = KEY.author_of(REPOSITORY, b"\x80")
    block = KEY.encode_block(author, REPOSITORY, header + inner)
    file = header + encrypt_snapshot(SESSION, _SALT, block + inner, header)
    decode_signed_snapshot(SnapshotId(digest_of(file)), file, CODEC, OneSession())


def _decrypted_snapshot(data: bytes) -> None:
    """Decode a snapshot that a recipient encrypted without care for what is inside."""
    version = 1
    header = SNAPSHOT_HEADER.pack(SNAPSHOT_MAGIC, version, ENCRYPTED, 0, 0) + _ENVELOPE
    file = header + encrypt_snapshot(SESSION, _SALT, data, header)
    decode_signed_snapshot(SnapshotId(digest_of(file)), file, CODEC, OneSession())


def _insides_of_snapshots() -> list[bytes]:
    return [_INNER.pack(Codec.RAW, len(one)) + one for one in _snapshot_maps()]


def _snapshot_maps() -> list[bytes]:
    found = []
    for data in real_objects("repository-v*/snapshots/*"):
        _, _, kind, _, plain_bytes = SNAPSHOT_HEADER.unpack_from(data)
        found.append(CODEC.decompress(kind, data[SNAPSHOT_HEADER.size :], plain_bytes))
    return found


def _delta_file(data: bytes) -> None:
    time_ms = int.from_bytes(data[16:24], "little") & ((1 << 48) - 1)
    session_of(data)
    _must_repeat(decode_delta(DeltaName(time_ms, digest_of(data)), data))


def _delta(data: bytes) -> None:
    """Decode a delta whose header and name fit its body."""
    file = DELTA_HEADER.pack(DELTA_MAGIC, 1, DELTA_HEADER.size, 0, 1) + data
    _must_repeat(decode_delta(DeltaName(1, digest_of(file)), file))


def _must_repeat(delta: Delta) -> None:
    packs = list(delta.packs())
    builder = DeltaBuilder()
    builder.is_complete = delta.is_complete
    builder.removed, builder.replaced = list(delta.removed), list(delta.replaced)
    for pack in packs:
        builder.add(pack)
    name, data = builder.encode(1)
    again = decode_delta(name, data)
    assert again.removed == delta.removed and again.replaced == delta.replaced
    assert _entries(list(again.packs())) == _entries(packs)


def _entries(packs: list[DeltaPack]) -> list[PackEntry]:
    return [entry for pack in packs for entry in pack.entries]


def _delta_name(data: bytes) -> None:
    name = parse_name(data.decode("utf-8", "replace"))
    assert name is None or parse_name(str(name)) == name


def _config(data: bytes) -> None:
    """Decode a configuration whose digest fits."""
    for file in (data, data + b"blake3 %s\n" % digest_of(data).hex().encode()):
        try:
            config = decode_config(file, "here")
        except (IntegrityError, FormatError, NotFoundError):
            continue
        assert decode_config(encode_config(config), "here") == config


def _config_seeds() -> list[bytes]:
    whole = real_objects("*/config")
    return [one[: one.rindex(b"blake3 ")] for one in whole]


def _policy(data: bytes) -> None:
    name = f"lock-policies/{digest_of(data).hex()}"
    policy = decode_policy(name, data, REPOSITORY.hex())
    policy.is_authentic(bytes(32))
    assert decode_policy(*encode_policy(policy), REPOSITORY.hex()) == policy


def _policy_seeds() -> list[bytes]:
    return [encode_policy(new_policy(REPOSITORY.hex(), 3600, 1, key))[1] for key in (None, _SALT)]


TARGETS = [
    Target("pack trailer", _trailer, lambda: real_objects(*PACKS), (PackError,)),
    Target(
        "pack directory",
        _directory,
        lambda: [bytes([0, 16, 0, 0]) + ENTRY.pack(_SALT, 9, 9, 1, 0, 0) * 3],
        (PackError,),
    ),
    Target("pack records", _records, lambda: real_objects(*PACKS), ()),
    Target("pack header", _pack_header, lambda: real_objects(*PACKS, most_bytes=96), (PackError,)),
    Target("payload", _payload, _payload_seeds, (BlobError,)),
    Target("encrypted payload", _encrypted_payload, _encrypted_payloads, (BlobError,)),
    Target("tree", _tree, _trees, (TreeError,)),
    Target("content", _content, _content_seeds, (TreeError,)),
    Target("content records", _content_records, _record_seeds, (TreeError,)),
    Target(
        "snapshot file",
        _snapshot_file,
        lambda: real_objects("repository-v*/snapshots/*"),
        (TreeError,),
    ),
    Target("snapshot", _snapshot, _snapshot_maps, (TreeError,)),
    Target("signed snapshot", _signed_snapshot, _snapshot_maps, (TreeError,), cost=4),
    Target("decrypted snapshot", _decrypted_snapshot, _insides_of_snapshots, (TreeError,)),
    Target("delta file", _delta_file, lambda: real_objects("*/deltas/*"), (DeltaError,)),
    Target(
        "delta",
        _delta,
        lambda: [
            one[DELTA_HEADER.size :]
            for one in real_objects("repository-v2/deltas/*", most_bytes=1 << 17)
        ],
        (DeltaError,),
    ),
    Target("delta name", _delta_name, lambda: [str(DeltaName(7, _SALT)).encode()], ()),
    Target("config", _config, _config_seeds, ()),
    Target("lock policy", _policy, _policy_seeds, (IntegrityError,)),
]
