"""Every key that is derived, and every way to encrypt, gives the bytes that it always gave.

With others nothing that was stored before could be read any more, or nothing would be found again.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable

import msgspec
import pytest
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from casfs.backup.file_cache import derive_entry
from casfs.crypto.passphrase import parse_wrapped, unwrap_identity, wrap_identity
from casfs.crypto.recipients import encode_recipients
from casfs.crypto.session_files import decode_session, encode_session
from casfs.digest import Digest, PackId, digest_of, keyed_digest
from casfs.format.cipher import PackCipher
from casfs.format.codec import BlobCodec, BlobKind, Codec
from casfs.format.delta import DeltaBuilder, DeltaName, DeltaPack
from casfs.format.key_derivation import DedupDomain, KeyContext, WriteSession, derive
from casfs.format.pack import (
    PackEntry,
    PackRef,
    encode_end,
    encode_record_header,
    encode_session_header,
)
from casfs.format.snapshot import Snapshot, decode_snapshot, encode_snapshot
from casfs.format.tree import Node, NodeType, TreeRef
from tests.support.encryption import (
    DOMAIN,
    GENERATION,
    PUBLIC,
    RECIPIENT,
    REPOSITORY,
    SECRET,
    SESSION,
    OneSession,
)

SALT = bytes(range(96, 128))
SECOND = DedupDomain(REPOSITORY, bytes(range(128, 160)))

KEYS: dict[str, tuple[Callable[[], bytes], str]] = {
    "session id": (
        lambda: SESSION.id,
        "ec5e00d988d9ac67cce966bf83423cafa32332aa6d8de05280dcec942be13b9e",
    ),
    "session id of two domains": (
        lambda: WriteSession(REPOSITORY, SESSION.secret, (DOMAIN, SECOND)).id,
        "d8fae331f466bf3dab5affc63efb70b5567e4cde4764dad1c75667f3cbc3833d",
    ),
    "domain id": (
        lambda: DOMAIN.id,
        "1d7cad9b6552f20e485d483ab272a8b05a55ea09c89aabbc97243726e2c98db4",
    ),
    "pack key": (
        lambda: SESSION.pack_key(SALT),
        "e57c862a489a0c16cdbd1cb5368b1b3a4947985bc27e1d237603cfe103db2541",
    ),
    "snapshot key": (
        lambda: SESSION.snapshot_key(SALT),
        "9699d76591485e097bf191e3d0b3c4ec49b22e2f0905730bee1e7f78ef7661f0",
    ),
    "delta key": (
        lambda: SESSION.delta_key(SALT),
        "2cd4c6dbdb7d55009b270f3adda8f4d4951ee2bd9ff0a28c61c76192aca6442b",
    ),
    "digest key": (
        lambda: DOMAIN.digest_key,
        "9fb6736823cfdfc08c84078272170ce4c8de02e9b04f14cda7f61a3f91881e47",
    ),
    "chunker key": (
        lambda: DOMAIN.chunker_key,
        "23dcf54569dae64e90c25f279e2fa39e5bd995d870969e4eaa8d801aa1fce791",
    ),
    "lock policy key": (
        lambda: DOMAIN.lock_policy_key,
        "c4febb9f04274c76ac9ee2b2c779f68b3bd0e8d6cc26ea47f50e3a694d638431",
    ),
    "generation key": (
        lambda: DOMAIN.generation_key,
        "504e721270c24a873e8536daad5f2ec2fce0e4a73c67694a0073cfc0254fc7f1",
    ),
    "file cache key": (
        lambda: DOMAIN.file_cache_key,
        "fcf1840966679a17c78beda0c6cdcd768e93ff454875e2e7480bc2edad557603",
    ),
}


class Uncompressed(BlobCodec):
    """A codec whose output is no matter of the compressor's version."""

    def encode_many(self, plains: list[bytes]) -> list[tuple[Codec, bytes]]:
        return [(Codec.RAW, plain) for plain in plains]


@pytest.mark.parametrize("name", KEYS)
def test_a_derived_key_keeps_its_golden_value(name: str) -> None:
    derived, expected = KEYS[name]
    assert derived().hex() == expected


def test_derived_seeds_keep_their_golden_values() -> None:
    assert DOMAIN.chunker_seed == 4015598431371700807
    assert DOMAIN.tree_seed == 1884299190
    assert DOMAIN.chunker_seed < 1 << 63


def test_key_derivation_reproduces_the_published_blake3_vectors() -> None:
    # From the published test vectors: the context, and the bytes 0 to 250 again and again.
    context = "BLAKE3 2019-12-27 16:29:52 test vectors context"
    assert derive(context, b"").hex() == (
        "2cc39783c223154fea8dfb7c1b1660f2ac2dcbd1c1de8277b0b0dd39b7e50d7d"
    )
    parts = (bytes(range(251)), bytes(range(251)), bytes(range(251)), bytes(range(251)))
    data = b"".join(parts)[:1000] + bytes(i % 251 for i in range(1000, 1024))
    assert derive(context, data[:500], data[500:]).hex() == (
        "7356cd7720d5b66b6d0697eb3177d9f8d73a4a5c5e968896eb6a689684302706"
    )


def test_no_two_purposes_share_a_key() -> None:
    contexts = [value for name, value in vars(KeyContext).items() if name.isupper()]
    assert len(contexts) == len(set(contexts)) == 12
    assert len({derive(context, SESSION.secret) for context in contexts}) == 12


def test_a_keyed_digest_keeps_its_golden_value() -> None:
    data = bytes(range(251)) * 10
    expected = "98ad33b22f13fdd868940ae24810f54402cc69d1493023e34b1c703047734db6"
    assert keyed_digest(data, DOMAIN.digest_key).hex() == expected
    assert BlobCodec(3, digest_key=DOMAIN.digest_key).digest(data).hex() == expected
    assert blake3(data, key=DOMAIN.digest_key).hexdigest() == expected
    # The first of the published vectors for a keyed digest.
    whats = b"whats the Elvish word for friend"
    assert keyed_digest(b"", whats).hex() == (
        "92b2b75604ed3c761f9d6f62392c8a9227ad0ea3f09573e783f1498a4ed60d26"
    )


def test_a_session_document_keeps_its_golden_bytes() -> None:
    text = encode_session(SESSION)
    assert text == (
        b'{"casfs":"session 1","repository":"%s","id":"%s","secret":"%s","domains":["%s"]}\n'
        % tuple(
            part.hex().encode() for part in (REPOSITORY, SESSION.id, SESSION.secret, DOMAIN.secret)
        )
    )
    assert decode_session(text, SESSION.id, REPOSITORY) == SESSION


def test_an_encrypted_pack_keeps_its_golden_bytes() -> None:
    cipher = PackCipher(SESSION, SALT)
    plains = [b"", b"short", hashlib.shake_128(b"casfs pack").digest(3000)]
    pack = bytearray(encode_session_header(SESSION.id, SALT))
    entries = []
    for plain in plains:
        offset = len(pack) + 16
        payload = cipher.encrypt(offset, BlobKind.DATA, 0, 0, len(plain), plain)
        pack += encode_record_header(254, 16, len(payload), 0) + payload
        digest = keyed_digest(plain, DOMAIN.digest_key)
        entries.append(PackEntry(digest, offset, len(payload), len(plain), BlobKind.DATA, 16))
    end = len(pack)
    pack += encode_end(entries, end, cipher.encrypt_directory)
    assert len(pack) == 3433
    assert (
        digest_of(pack).hex() == "19ff4bc583b39668dacf1edf08116ac899fa56ff3d60da8e0690dd8684662858"
    )
    # The same by hand: a reader that was written with the document and without the code.
    key = blake3(SESSION.secret + SALT, derive_key_context="casfs 2026-11-23 pack key").digest()
    at = 80
    for plain in plains:
        header, size = bytes(pack[at : at + 16]), int.from_bytes(pack[at + 8 : at + 12], "little")
        nonce = (at + 16).to_bytes(12, "little")
        inner = AESGCM(key).decrypt(nonce, bytes(pack[at + 16 : at + 16 + size]), header)
        assert inner == bytes([1, 0, 0, 0]) + len(plain).to_bytes(4, "little") + plain
        at += 16 + size
    header, stored = bytes(pack[at : at + 16]), bytes(pack[at + 16 : -64])
    directory = AESGCM(key).decrypt((at + 16).to_bytes(12, "little"), stored, header)
    assert directory[:32] == keyed_digest(b"", DOMAIN.digest_key)
    assert len(directory) == 44 * len(plains)
    assert cipher.decrypt_directory(PackId(bytes(32)), at + 16, stored) == directory


def test_an_encrypted_snapshot_keeps_its_golden_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Node(
        *(b"", NodeType.DIRECTORY, 0o755, 0, 0, 1, 2, 3, 2),
        tree=TreeRef(bytes(range(160, 192)), 5, 100, 1),
    )
    snapshot = Snapshot(root, 1_700_000_000_123_456_789, "host", "user", (b"/home",), ("tag",))
    monkeypatch.setattr(os, "urandom", lambda size: SALT[:size])
    snapshot_id, data = encode_snapshot(snapshot, Uncompressed(3), SESSION)
    assert snapshot_id.hex() == "dd373c90aa30fdc48acda197f1bab46ed9405d31e0679101538141593368561e"
    assert decode_snapshot(snapshot_id, data, BlobCodec(3), OneSession()) == snapshot
    # The same by hand.
    assert data[:16] == b"CASFSNAP" + bytes([1, 0, 16, 0, 0, 0, 0, 0])
    assert data[16:80] == SESSION.id + SALT
    reported = [int.from_bytes(data[at : at + 8], "little") for at in (80, 88, 96)]
    assert reported == [1_700_000_000_123_456_789, 100, 0]
    key = blake3(SESSION.secret + SALT, derive_key_context="casfs 2026-11-23 snapshot key").digest()
    inner = AESGCM(key).decrypt(bytes(12), data[104:], data[:104])
    assert inner[:8] == bytes(4) + (len(inner) - 8).to_bytes(4, "little")
    assert msgspec.msgpack.decode(inner[8:])["host"] == "host"


def _delta_builder(blobs: list[bytes]) -> DeltaBuilder:
    builder = DeltaBuilder()
    entries = [
        PackEntry(Digest(blobs[0]), 32, 100, 200, BlobKind.DATA, 1),
        PackEntry(Digest(blobs[1]), 148, 10, 20, BlobKind.TREE, 0),
    ]
    builder.add(DeltaPack(PackRef(PackId(bytes([3]) * 32), True), 600, entries))
    builder.removed.append(PackId(bytes([4]) * 32))
    builder.replaced.append(DeltaName(5, bytes([5]) * 32))
    builder.is_complete = True
    return builder


def test_an_index_delta_keeps_its_golden_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = [bytes([n]) * 32 for n in (1, 2)]
    name, data = _delta_builder(blobs).encode(0x18F123456789)
    assert str(name) == f"deltas/18f123456789-{digest_of(data).hex()}"
    # By hand, with the document's tables.
    body = bytes.fromhex("01000000 01000000 01000000 01000000 02000000 00000000")
    body += (5).to_bytes(8, "little") + bytes([5]) * 32 + bytes([4]) * 32
    body += bytes([3]) * 32 + bytes.fromhex("5802000000000000 02000000 20000000 02000000 00000000")
    body += blobs[0] + bytes.fromhex("64000000 c8000000 01 01 0000")
    body += blobs[1] + bytes.fromhex("0a000000 14000000 02 00 0000")
    time = (0x18F123456789).to_bytes(8, "little")
    assert data == b"CASFSDLT" + bytes.fromhex("0100 1800 00000000") + time + body
    assert name.digest == digest_of(data)
    monkeypatch.setattr(os, "urandom", lambda size: SALT[:size])
    name, data = _delta_builder(blobs).encode(0x18F123456789, SESSION)
    assert data[:24] == b"CASFSDLT" + bytes.fromhex("0100 5800 00000000") + time
    assert data[24:88] == SESSION.id + SALT
    key = blake3(SESSION.secret + SALT, derive_key_context="casfs 2026-11-23 delta key").digest()
    assert AESGCM(key).decrypt(bytes(12), data[88:], data[:88]) == body
    assert name.digest.hex() == "c80534a33fc39724e318511b1d8ce2a56941bbd4e1a279273a8804d2894f4eb2"


def test_a_wrapped_identity_keeps_its_golden_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = itertools.count(1)
    monkeypatch.setattr(os, "urandom", lambda size: bytes([next(numbers)]) * size)
    data = wrap_identity(SECRET, PUBLIC, "correct horse", REPOSITORY)
    assert (
        digest_of(data).hex() == "829ee52b2f8e7c2b3de3fee230a00a37da89864205fc82f4f357a5c82b3443b9"
    )
    # Without the commitment they are the bytes that earlier versions wrote.
    earlier = data[: data.index(b',"commitment"')] + b"}\n"
    assert (
        digest_of(earlier).hex()
        == "4723dace25b4acabbc7202e8dc6fddef4481318078b21ba4d91ea178210dd113"
    )
    assert unwrap_identity(parse_wrapped(earlier, "it"), "correct horse", REPOSITORY) == SECRET
    wrapped = parse_wrapped(data, "it")
    assert (wrapped.iterations, wrapped.lanes, wrapped.memory_kib) == (3, 4, 65536)
    assert unwrap_identity(wrapped, "correct horse", REPOSITORY) == SECRET


def test_the_key_of_a_passphrase_reproduces_the_published_vector() -> None:
    # RFC 9106, section 5.3.
    kdf = Argon2id(
        salt=b"\x02" * 16,
        length=32,
        iterations=3,
        lanes=4,
        memory_cost=32,
        ad=b"\x04" * 12,
        secret=b"\x03" * 8,
    )
    assert kdf.derive(b"\x01" * 32).hex() == (
        "0d640df58d78766c08c037a34a8b53c9d01ef0452d75b65eb52520e96b01e659"
    )


def test_a_file_cache_record_keeps_its_golden_name_and_key() -> None:
    name, key = derive_entry(DOMAIN.file_cache_key, b"home/file", 7, 11, 13, 17)
    assert (name + key).hex() == (
        "45680e09316eade02f1887edd5fa129ffd2cb37e207198820e147ecbc25d9482"
        "59ddb4f716ff865c663a4280e11358d56bdbff1e03c7abcb77b16dd05b7b5a3b"
    )


def test_the_record_of_a_replaced_domain_keeps_its_golden_bytes() -> None:
    assert msgspec.json.encode(GENERATION).decode() == (
        '{"number":1,"domain":"4cfa645b84783f7a271b026af6589e99fcc073da88de9d0c6162599a4b68ee8c",'
        '"session":"fe03ea45caa05ac11b4a94d10517651e318cefaf57150051bd4b40ba3d54caf9","snapshots"'
        ':"000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f","key":"dde3bccec7f3a'
        '66a1115f45d720f4dc135c3ae7c4e22dca38fdb1efd6a495ff8","code":"1737cb0eeba4e0e5f6019f18600'
        'cc358c0d5751cf05d036a5e498c02bdc898f6","signature":"bab64a3e4829373b37a35cbd73763f59f0ab'
        "975816a6a1378480730d2bce3a2cc8c8b9e61f0b466db82b3f2ee378125da7c5c0bfda1a39ee058732f4b294"
        'dc0d"}'
    )
    assert encode_recipients([RECIPIENT], [GENERATION]).startswith(
        b'casfs recipients 2\n{\n "recip'
    )
    digest = digest_of(encode_recipients([RECIPIENT], [GENERATION])).hex()
    assert digest == "1c087d800972d8a8f1a0e55d57ebc80c987fc158959eaaec886fcbf7e2234915"
