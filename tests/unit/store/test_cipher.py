"""The cipher: a payload opens in its own place of its own pack, and nowhere else."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from casfs.digest import PackId, digest_of, keyed_digest
from casfs.errors import BlobError, NotFoundError, PackError, SessionError
from casfs.format.cipher import OVERHEAD_BYTES, PackCipher, decrypt_snapshot, encrypt_snapshot
from casfs.format.key_derivation import DedupDomain, SessionId, WriteSession
from casfs.format.pack import encode_header, encode_record_header, encode_session_header
from casfs.storage.local import LocalStorage
from casfs.store.cipher import PackCiphers
from tests.support.encryption import DOMAIN, REPOSITORY, SESSION, OneSession

SALT = b"\x0b" * 32
AT = 96
PLAIN = b"what is in the blob"
DIGEST = keyed_digest(PLAIN, DOMAIN.digest_key)


@pytest.fixture
def cipher() -> PackCipher:
    return PackCipher(SESSION, SALT)


@pytest.fixture
def stored(cipher: PackCipher) -> bytes:
    return cipher.encrypt(AT, 2, 1, 0, 77, PLAIN)


def test_a_payload_is_decrypted_with_its_metadata(cipher: PackCipher, stored: bytes) -> None:
    inner = cipher.decrypt(DIGEST, AT, stored)
    assert inner == (2, 1, 0, 77, PLAIN)
    assert cipher.digest_key(inner) == DOMAIN.digest_key
    assert len(stored) == len(PLAIN) + OVERHEAD_BYTES
    assert PLAIN not in stored


@pytest.mark.parametrize("offset", [0, 16, AT - 1, AT + 1, AT + 2**32])
def test_a_moved_payload_does_not_open(cipher: PackCipher, stored: bytes, offset: int) -> None:
    with pytest.raises(BlobError, match=r"changed or moved") as caught:
        cipher.decrypt(DIGEST, offset, stored)
    assert caught.value.digest == DIGEST


def test_a_payload_moved_to_another_pack_of_its_session_does_not_open(stored: bytes) -> None:
    with pytest.raises(BlobError, match="decryption failed"):
        PackCipher(SESSION, b"\x0c" * 32).decrypt(DIGEST, AT, stored)


@pytest.mark.parametrize(
    "session",
    [
        dataclasses.replace(SESSION, secret=bytes(32)),
        WriteSession.new([DOMAIN]),
    ],
    ids=["another secret", "a new one"],
)
def test_a_payload_of_another_session_does_not_open(stored: bytes, session: WriteSession) -> None:
    with pytest.raises(BlobError, match="decryption failed"):
        PackCipher(session, SALT).decrypt(DIGEST, AT, stored)


def test_any_changed_bit_of_a_payload_is_detected(cipher: PackCipher, stored: bytes) -> None:
    for bit in range(len(stored) * 8):
        changed = bytearray(stored)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BlobError, match="decryption failed"):
            cipher.decrypt(DIGEST, AT, bytes(changed))


def test_a_shorter_or_longer_payload_is_refused(cipher: PackCipher, stored: bytes) -> None:
    for wrong in (*(stored[:size] for size in range(len(stored))), stored + b"\0"):
        with pytest.raises(BlobError):
            cipher.decrypt(DIGEST, AT, wrong)


def test_the_record_header_is_authenticated_with_its_payload(
    cipher: PackCipher, stored: bytes
) -> None:
    header = encode_record_header(254, 16, len(stored), 0)
    aead = AESGCM(SESSION.pack_key(SALT))
    nonce = AT.to_bytes(12, "little")
    assert aead.decrypt(nonce, stored, header)[8:] == PLAIN
    for place in range(len(header)):
        changed = bytearray(header)
        changed[place] ^= 1
        with pytest.raises(InvalidTag):
            aead.decrypt(nonce, stored, bytes(changed))


def test_a_directory_does_not_pass_for_a_blob_nor_a_blob_for_a_directory(
    cipher: PackCipher, stored: bytes
) -> None:
    directory = cipher.encrypt_directory(AT, PLAIN)
    assert cipher.decrypt_directory(PackId(bytes(32)), AT, directory) == PLAIN
    with pytest.raises(BlobError):
        cipher.decrypt(DIGEST, AT, directory)
    with pytest.raises(PackError, match="directory decryption failed"):
        cipher.decrypt_directory(PackId(bytes(32)), AT, stored)
    with pytest.raises(PackError):
        cipher.decrypt_directory(PackId(bytes(32)), AT + 1, directory)


class TestHostilePayload:
    """Payloads that only a holder of the session's keys could have encrypted."""

    def sealed(self, inner: bytes) -> bytes:
        header = encode_record_header(254, 16, len(inner) + 16, 0)
        return AESGCM(SESSION.pack_key(SALT)).encrypt(AT.to_bytes(12, "little"), inner, header)

    @pytest.mark.parametrize("size", range(8))
    def test_a_decrypted_payload_that_is_too_short_is_refused(
        self, cipher: PackCipher, size: int
    ) -> None:
        with pytest.raises(BlobError, match="too short"):
            cipher.decrypt(DIGEST, AT, self.sealed(bytes(size)))

    @pytest.mark.parametrize("domain", [1, 2, 65535])
    def test_a_decrypted_payload_of_an_unknown_domain_is_refused(
        self, cipher: PackCipher, domain: int
    ) -> None:
        with pytest.raises(BlobError, match="domain"):
            cipher.decrypt(
                DIGEST, AT, self.sealed(struct.pack("<BBHI", 1, 0, domain, 5) + b"12345")
            )


def test_the_second_domain_of_a_session_keys_its_own_digests() -> None:
    second = DedupDomain(REPOSITORY, b"\x05" * 32)
    cipher = PackCipher(WriteSession(REPOSITORY, bytes(32), (DOMAIN, second)), SALT)
    inner = cipher.decrypt(DIGEST, AT, cipher.encrypt(AT, 1, 0, 1, 5, b"12345"))
    assert (inner.domain, cipher.digest_key(inner)) == (1, second.digest_key)


def test_no_two_packs_have_the_same_salt() -> None:
    salts = {PackCipher.new(SESSION).salt for _ in range(100)}
    assert len(salts) == 100 and all(len(salt) == 32 for salt in salts)


def test_a_snapshot_opens_with_its_own_header_salt_and_session_only() -> None:
    header = b"all that stands before it"
    stored = encrypt_snapshot(SESSION, SALT, PLAIN, header)
    assert decrypt_snapshot(SESSION, SALT, stored, header) == PLAIN
    other = dataclasses.replace(SESSION, secret=bytes(32))
    for session, salt, data, before in (
        (other, SALT, stored, header),
        (SESSION, bytes(32), stored, header),
        (SESSION, SALT, stored[:-1], header),
        (SESSION, SALT, stored[:3], header),
        (SESSION, SALT, b"", header),
        (SESSION, SALT, bytes([stored[0] ^ 1]) + stored[1:], header),
        (SESSION, SALT, stored, header + b"!"),
    ):
        with pytest.raises(BlobError, match="decryption failed"):
            decrypt_snapshot(session, salt, data, before)


class TestPackCiphers:
    @pytest.fixture
    def storage(self, tmp_path: Path) -> LocalStorage:
        for folder in ("packs", "tmp"):
            (tmp_path / folder).mkdir()
        return LocalStorage(tmp_path, writer="test", sync=False)

    PACK = PackId(digest_of(b"any"))

    def test_the_cipher_of_a_pack_is_the_one_its_header_names(self, storage: LocalStorage) -> None:
        storage.write("packs/one", encode_session_header(SESSION.id, SALT) + b"rest")
        ciphers = PackCiphers(storage, OneSession())
        assert not ciphers.is_cached("packs/one")
        cipher = ciphers.for_pack(self.PACK, "packs/one")
        assert (cipher.session, cipher.salt) == (SESSION, SALT)
        assert ciphers.is_cached("packs/one")
        storage.delete("packs/one")
        assert ciphers.for_pack(self.PACK, "packs/one") is cipher

    @pytest.mark.parametrize(
        "head",
        [
            encode_header() + bytes(100),
            encode_session_header(SESSION.id, SALT)[:79],
            b"CASFSPAK",
            b"",
            b"x" * 100,
        ],
        ids=["unencrypted", "cut", "very short", "empty", "another file"],
    )
    def test_a_pack_that_is_not_encrypted_is_refused(
        self, storage: LocalStorage, head: bytes
    ) -> None:
        storage.write("packs/one", head)
        with pytest.raises(PackError):
            PackCiphers(storage, OneSession()).for_pack(self.PACK, "packs/one")

    def test_a_missing_pack_has_no_cipher(self, storage: LocalStorage) -> None:
        with pytest.raises(NotFoundError):
            PackCiphers(storage, OneSession()).for_pack(self.PACK, "packs/one")

    def test_a_session_that_did_not_open_is_requested_again(self, storage: LocalStorage) -> None:
        class Failing(OneSession):
            fails = True

            def session(self, session_id: bytes) -> WriteSession:
                if self.fails:
                    raise SessionError("not now")
                return super().session(SessionId(session_id))

        storage.write("packs/one", encode_session_header(SESSION.id, SALT))
        sessions = Failing()
        ciphers = PackCiphers(storage, sessions)
        with pytest.raises(SessionError):
            ciphers.for_pack(self.PACK, "packs/one")
        sessions.fails = False
        assert ciphers.for_pack(self.PACK, "packs/one").session == SESSION
