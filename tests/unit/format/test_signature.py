"""Signatures of snapshots: who made one, who published it, and what each signature covers."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from casfs.digest import SnapshotId, digest_of
from casfs.errors import BlobError, TreeError
from casfs.format.cipher import decrypt_snapshot, encrypt_snapshot
from casfs.format.codec import BlobCodec
from casfs.format.signature import BLOCK_BYTES, Author, SigningKey, verify_block
from casfs.format.snapshot import (
    HEADER,
    SIGNED_VERSION,
    decode_signed_snapshot,
    encode_snapshot,
    padded_size,
    read_envelope,
)
from tests.support.encryption import REPOSITORY, SESSION, OneSession
from tests.unit.format.test_snapshot import FULL

HOST = SigningKey(bytes(range(32)))
ADMIN = SigningKey(bytes(range(32, 64)))

# RFC 8032, section 7.1, test 1.
RFC_SEED = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
RFC_PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")

HEADER_BYTES = HEADER.size + 88


@pytest.fixture
def codec() -> BlobCodec:
    return BlobCodec(3)


def test_a_seed_gives_the_public_key_of_rfc_8032() -> None:
    assert SigningKey(RFC_SEED).public == RFC_PUBLIC


def test_a_signed_snapshot_names_its_author_who_is_its_publisher(codec: BlobCodec) -> None:
    made = encode_snapshot(FULL, codec, SESSION, HOST)
    snapshot, signers = decode_signed_snapshot(*made, codec, OneSession())
    assert snapshot == FULL
    assert HEADER.unpack_from(made[1])[1] == SIGNED_VERSION
    assert signers is not None
    assert signers.author.key == signers.publisher == HOST.public


def test_a_snapshot_without_a_key_has_no_signature(codec: BlobCodec) -> None:
    made = encode_snapshot(FULL, codec, SESSION)
    assert decode_signed_snapshot(*made, codec, OneSession())[1] is None


def test_another_machine_changes_the_tags_and_the_author_stays(codec: BlobCodec) -> None:
    made = encode_snapshot(FULL, codec, SESSION, HOST)
    _, signers = decode_signed_snapshot(*made, codec, OneSession())
    assert signers is not None
    tagged = msgspec.structs.replace(FULL, tags=("kept",), replaces=made[0])
    changed = encode_snapshot(tagged, codec, SESSION, ADMIN, signers.author)
    found, both = decode_signed_snapshot(*changed, codec, OneSession())
    assert found == tagged
    assert both is not None
    assert (both.author.key, both.publisher) == (HOST.public, ADMIN.public)


@pytest.mark.parametrize(
    "changed",
    [
        {"host": "another"},
        {"time_ns": FULL.time_ns + 1},
        {"paths": (b"/etc",)},
        {"user": "root"},
        {"stats": msgspec.structs.replace(FULL.stats, files=7)},
        {"root": msgspec.structs.replace(FULL.root, mode=0o700)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_an_author_signed_no_other_content(codec: BlobCodec, changed: dict[str, object]) -> None:
    """A former recipient publishes what it likes in the name of the host, whose signature it has."""
    _, signers = decode_signed_snapshot(
        *encode_snapshot(FULL, codec, SESSION, HOST), codec, OneSession()
    )
    assert signers is not None
    forged = msgspec.structs.replace(FULL, **changed)
    made = encode_snapshot(forged, codec, SESSION, ADMIN, signers.author)
    with pytest.raises(TreeError, match="its signature does not match"):
        decode_signed_snapshot(*made, codec, OneSession())


def _opened(data: bytes) -> bytes:
    """Return the decrypted payload of a snapshot's file."""
    envelope = read_envelope(SnapshotId(digest_of(data)), data)
    assert envelope is not None
    return decrypt_snapshot(SESSION, envelope.salt, data[HEADER_BYTES:], data[:HEADER_BYTES])


def test_an_author_who_publishes_signs_as_the_author_too(codec: BlobCodec) -> None:
    """Junk there would pass for a signature until another machine carries it on with other tags."""
    junk = Author(HOST.public, bytes(64))
    with pytest.raises(TreeError, match="its signature does not match"):
        made = encode_snapshot(FULL, codec, SESSION, HOST, junk)
        decode_signed_snapshot(*made, codec, OneSession())


def test_every_byte_under_the_publishers_signature_counts(codec: BlobCodec) -> None:
    """A recipient can decrypt and encrypt the file again, but not sign it."""
    _, data = encode_snapshot(FULL, codec, SESSION, HOST)
    envelope = read_envelope(SnapshotId(digest_of(data)), data)
    assert envelope is not None
    header, inner = data[:HEADER_BYTES], _opened(data)
    for place in range(len(inner)):
        forged = inner[:place] + bytes([inner[place] ^ 1]) + inner[place + 1 :]
        file = header + encrypt_snapshot(SESSION, envelope.salt, forged, header)
        with pytest.raises(TreeError):
            decode_signed_snapshot(SnapshotId(digest_of(file)), file, codec, OneSession())
    for size in (0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 7, len(inner) - 1):
        file = header + encrypt_snapshot(SESSION, envelope.salt, inner[:size], header)
        with pytest.raises(TreeError):
            decode_signed_snapshot(SnapshotId(digest_of(file)), file, codec, OneSession())


def test_the_clear_header_is_signed_too(codec: BlobCodec) -> None:
    _, data = encode_snapshot(FULL, codec, SESSION, HOST)
    envelope = read_envelope(SnapshotId(digest_of(data)), data)
    assert envelope is not None
    header = bytearray(data[:HEADER_BYTES])
    header[HEADER.size + 64] ^= 1  # the time
    file = bytes(header) + encrypt_snapshot(SESSION, envelope.salt, _opened(data), bytes(header))
    with pytest.raises(TreeError, match="its signature does not match"):
        decode_signed_snapshot(SnapshotId(digest_of(file)), file, codec, OneSession())


def test_a_signature_holds_for_one_repository_only() -> None:
    plain = msgspec.msgpack.encode({"host": "here", "tags": [], "replaces": None})
    block = HOST.encode_block(HOST.author_of(REPOSITORY, plain), REPOSITORY, b"signed")
    assert verify_block(block, REPOSITORY, b"signed", plain).publisher == HOST.public
    with pytest.raises(BlobError):
        verify_block(block, bytes(32), b"signed", plain)


def test_a_public_key_that_is_no_point_verifies_nothing() -> None:
    plain = msgspec.msgpack.encode({})
    author = dataclasses.replace(HOST.author_of(REPOSITORY, plain), key=b"\xff" * 32)
    with pytest.raises(BlobError):
        verify_block(HOST.encode_block(author, REPOSITORY, b""), REPOSITORY, b"", plain)


def test_fields_of_a_later_version_stay_under_the_authors_signature() -> None:
    fields = {"host": "here", "tags": ["a"], "replaces": None, "later": [1, {"x": b"y"}, 1.5]}
    author = HOST.author_of(REPOSITORY, msgspec.msgpack.encode(fields))
    retagged = msgspec.msgpack.encode(fields | {"tags": ["b"], "replaces": bytes(32)})
    block = ADMIN.encode_block(author, REPOSITORY, b"")
    assert verify_block(block, REPOSITORY, b"", retagged).author == Author(
        HOST.public, author.signature
    )
    changed = msgspec.msgpack.encode(fields | {"later": [1, {"x": b"z"}, 1.5]})
    with pytest.raises(BlobError):
        verify_block(block, REPOSITORY, b"", changed)


@pytest.mark.parametrize(
    ("size", "padded"),
    [(0, 0), (1, 1), (2, 2), (9, 10), (100, 104), (1000, 1024), (1 << 20, 1 << 20)],
)
def test_padding_rounds_up_as_padme_does(size: int, padded: int) -> None:
    assert padded_size(size) == padded


def test_padding_costs_at_most_an_eighth_and_leaves_few_sizes() -> None:
    sizes = range(1, 1 << 16)
    padded = [padded_size(size) for size in sizes]
    assert all(size <= found <= size * 1.12 + 1 for size, found in zip(sizes, padded, strict=True))
    assert padded == sorted(padded)
    assert len(set(padded)) < 400


def test_a_signed_snapshot_shows_only_padded_sizes_without_a_key(codec: BlobCodec) -> None:
    envelope = read_envelope(*encode_snapshot(FULL, codec, SESSION, HOST))
    assert envelope is not None
    assert envelope.total_bytes == padded_size(100) == 104
    assert envelope.new_stored_bytes == padded_size(FULL.stats.new_stored_bytes)
