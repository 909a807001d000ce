"""Packs and the store of an encrypted repository: salvage, wrong records, domains, closed packs."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from casfs.digest import Digest, PackId, digest_of, keyed_digest
from casfs.errors import BlobError, CasfsError, KeyMissingError, PackError, SessionError
from casfs.format.cipher import PackCipher
from casfs.format.codec import BlobCodec, BlobKind
from casfs.format.key_derivation import DedupDomain, WriteSession
from casfs.format.pack import (
    HEADER,
    PackEntry,
    encode_end,
    encode_record_header,
    encode_session_header,
    scan_records,
)
from casfs.index.index import Index
from casfs.storage.local import LocalStorage
from casfs.store.blob_store import BlobStore, pack_name
from casfs.store.cipher import PackCiphers
from casfs.store.writer import BlobWriter
from tests.support.encryption import DOMAIN, REPOSITORY, SESSION
from tests.support.stores import add_pack, flip, make_pack, noise, pack_paths

SECOND = DedupDomain(REPOSITORY, b"\x05" * 32)
BOTH = WriteSession(REPOSITORY, bytes(32), (DOMAIN, SECOND))
PLAINS = [b"short", noise("one", 5000), b"text that shrinks " * 300]


def keyed(plain: bytes, domain: DedupDomain = DOMAIN) -> Digest:
    return keyed_digest(plain, domain.digest_key)


class Keys:
    """Sessions by id; `error` is raised for any other."""

    def __init__(self, *sessions: WriteSession) -> None:
        self.sessions = {session.id: session for session in sessions}
        self.error: CasfsError = KeyMissingError("closed")

    def session(self, session_id: bytes) -> WriteSession:
        found = self.sessions.get(session_id)  # type: ignore[call-overload]
        if found is None:
            raise self.error
        assert isinstance(found, WriteSession)
        return found


@pytest.fixture
def keys() -> Keys:
    return Keys(SESSION, BOTH)


@pytest.fixture
def store(tmp_path: Path, keys: Keys) -> Iterator[BlobStore]:
    for folder in ("packs", "tmp"):
        (tmp_path / folder).mkdir()
    storage = LocalStorage(tmp_path, writer="test", sync=False)
    index = Index(tmp_path / "index", sync=False)
    codec = BlobCodec(3, digest_key=DOMAIN.digest_key)
    store = BlobStore(storage, index, codec, PackCiphers(storage, keys))
    store.reconcile()
    yield store
    index.close()
    storage.close()


def put(store: BlobStore, session: WriteSession, *blobs: tuple[Digest, bytes]) -> None:
    writer = BlobWriter(store, session=lambda: session)
    try:
        for digest, plain in blobs:
            writer.put(BlobKind.DATA, digest, plain)
        writer.finish()
    finally:
        writer.close()


def again(store: BlobStore, keys: Keys) -> BlobStore:
    """Return the store as another process sees it, which knows no pack yet."""
    return BlobStore(store.storage, store.index, store.codec, PackCiphers(store.storage, keys))


def test_encrypted_blobs_are_read_back_and_leave_no_plaintext_in_the_pack(
    store: BlobStore, tmp_path: Path
) -> None:
    put(store, SESSION, *((keyed(plain), plain) for plain in PLAINS))
    for plain in PLAINS:
        assert store.read(keyed(plain)) == plain
        assert store.read_nonblocking(keyed(plain), 1 << 20) == plain
    (path,) = pack_paths(tmp_path)
    data = path.read_bytes()
    assert data.startswith(encode_session_header(SESSION.id, data[48:80]))
    for plain in PLAINS:
        assert plain[:16] not in data
        for digest in (keyed(plain), digest_of(plain)):
            assert bytes(digest) not in data


def test_a_nonblocking_read_does_not_open_a_session(store: BlobStore, keys: Keys) -> None:
    put(store, SESSION, (keyed(PLAINS[0]), PLAINS[0]), (keyed(PLAINS[1]), PLAINS[1]))
    other = again(store, keys)
    # The pack's file is open and in memory, so that only the session is missing.
    assert store.read(keyed(PLAINS[0])) == PLAINS[0]
    assert other.read_nonblocking(keyed(PLAINS[0]), 1 << 20) is None
    assert other.read(keyed(PLAINS[1])) == PLAINS[1]
    assert other.read_nonblocking(keyed(PLAINS[0]), 1 << 20) == PLAINS[0]


def test_an_encrypted_store_is_the_same_after_a_rebuild_of_its_index(
    store: BlobStore, keys: Keys
) -> None:
    put(store, BOTH, *((keyed(plain), plain) for plain in PLAINS), (keyed(b"x", SECOND), b"x"))
    before = dict(store.index.blobs())
    store.rebuild()
    assert {digest: at.offset for digest, at in store.index.blobs()} == {
        digest: at.offset for digest, at in before.items()
    }
    assert again(store, keys).read(keyed(b"x", SECOND)) == b"x"


def test_a_damaged_directory_loses_no_blob_of_any_domain(
    store: BlobStore, tmp_path: Path, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    put(store, BOTH, *((keyed(plain), plain) for plain in PLAINS), (keyed(b"x", SECOND), b"x"))
    (path,) = pack_paths(tmp_path)
    flip(path, -100)
    (found,) = store.stored_packs()
    with pytest.raises(PackError, match="directory digest mismatch"):
        store.read_directory(*found)
    entries = store.salvage_directory(*found)
    assert {entry.digest for entry in entries} == {
        *(keyed(plain) for plain in PLAINS),
        keyed(b"x", SECOND),
    }
    assert {entry.kind for entry in entries} == {BlobKind.DATA}
    with caplog.at_level(logging.WARNING):
        store.rebuild()
    for plain in PLAINS:
        assert again(store, keys).read(keyed(plain)) == plain


def test_a_payload_moved_inside_its_pack_is_not_returned(store: BlobStore, tmp_path: Path) -> None:
    first, second = noise("first", 3000), noise("second", 3000)
    put(store, SESSION, (keyed(first), first), (keyed(second), second))
    (path,) = pack_paths(tmp_path)
    places = [store.locate(keyed(plain)) for plain in (first, second)]
    data = bytearray(path.read_bytes())
    payloads = [bytes(data[at.offset : at.offset + at.stored_bytes]) for at in places]
    for at, payload in zip(places, reversed(payloads), strict=True):
        data[at.offset : at.offset + at.stored_bytes] = payload
    path.write_bytes(data)
    for plain in (first, second):
        with pytest.raises(BlobError, match="changed or moved"):
            store.read(keyed(plain))


def test_a_payload_whose_size_or_codec_contradicts_the_index_is_not_returned(
    store: BlobStore,
) -> None:
    plain = noise("plain", 3000)
    put(store, SESSION, (keyed(plain), plain))
    (found,) = store.stored_packs()
    (entry,) = store.read_directory(*found)
    assert store.read_entry(found[0], entry) == plain
    for wrong in (entry._replace(plain_bytes=2999), entry._replace(codec=17)):
        with pytest.raises(BlobError, match="do not match the recorded ones"):
            store.read_entry(found[0], wrong)
    with pytest.raises(BlobError):
        store.read_entry(found[0], entry._replace(digest=keyed(b"another")))


def test_a_directory_with_wrong_digests_is_detected(store: BlobStore, tmp_path: Path) -> None:
    """Who has a session's keys, such as another host, can write any directory; no data is mistaken."""
    cipher = PackCipher(SESSION, bytes(32))
    body = bytearray(encode_session_header(SESSION.id, bytes(32)))
    offset = len(body) + 16
    payload = cipher.encrypt(offset, BlobKind.DATA, 0, 0, 5, b"wrong")
    body += encode_record_header(254, 16, len(payload), 0) + payload
    lie = PackEntry(keyed(b"right"), offset, len(payload), 5, BlobKind.DATA, 16)
    add_pack(tmp_path, bytes(body) + encode_end([lie], len(body), cipher.encrypt_directory))
    store.reconcile()
    with pytest.raises(BlobError, match="digest mismatch"):
        store.read(keyed(b"right"))


def test_an_unencrypted_pack_is_refused_by_an_encrypted_repository(
    store: BlobStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, _ = make_pack([b"forged"])
    pack = add_pack(tmp_path, data)
    with caplog.at_level(logging.WARNING):
        store.reconcile()
    assert "not encrypted, although its repository is" in caplog.text
    assert store.index.lookup(digest_of(b"forged")) is None
    with pytest.raises(PackError):
        store.read_directory(pack, len(data))


@pytest.mark.parametrize("error", [KeyMissingError("closed"), SessionError("damaged")])
def test_a_pack_whose_session_does_not_open_affects_no_other(
    store: BlobStore, keys: Keys, error: CasfsError, caplog: pytest.LogCaptureFixture
) -> None:
    put(store, SESSION, (keyed(PLAINS[0]), PLAINS[0]))
    put(store, BOTH, (keyed(PLAINS[1]), PLAINS[1]))
    del keys.sessions[BOTH.id]
    keys.error = error
    other = again(store, keys)
    assert other.read(keyed(PLAINS[0])) == PLAINS[0]
    with pytest.raises(type(error)):
        other.read(keyed(PLAINS[1]))
    # A blob that is nowhere is looked for in all packs, also in those that do not open.
    with pytest.raises(BlobError, match="missing"):
        other.read(keyed(b"nowhere"))
    with caplog.at_level(logging.WARNING):
        other.rebuild()
    assert other.read(keyed(PLAINS[0])) == PLAINS[0]
    assert other.index.lookup(keyed(PLAINS[1])) is None


def test_a_damaged_blob_is_found_in_another_pack_although_a_third_does_not_open(
    store: BlobStore, tmp_path: Path, keys: Keys
) -> None:
    plain = noise("plain", 3000)
    digest = keyed(plain)
    put(store, SESSION, (digest, plain))
    (first,) = pack_paths(tmp_path)
    index = Index(tmp_path / "other index", sync=False)
    index.rebuild(tuple)
    put(BlobStore(store.storage, index, store.codec, None), SESSION, (digest, plain))
    put(BlobStore(store.storage, index, store.codec, None), BOTH, (keyed(b"y"), b"y"))
    index.close()
    del keys.sessions[BOTH.id]
    flip(first, store.locate(digest).offset)
    assert again(store, keys).read(digest) == plain


def test_a_write_only_host_keeps_its_other_entries_where_a_pack_is_lost(
    store: BlobStore, tmp_path: Path
) -> None:
    put(store, SESSION, (keyed(PLAINS[0]), PLAINS[0]))
    put(store, SESSION, (keyed(PLAINS[1]), PLAINS[1]))
    location = store.locate(keyed(PLAINS[0]))
    (tmp_path / pack_name(store.index.pack_ref(location.pack))).unlink()
    closed = again(store, Keys())
    closed.reconcile()
    assert closed.index.are_stored([keyed(PLAINS[0]), keyed(PLAINS[1])]) == [False, True]


def test_records_scanned_without_a_key_reveal_nothing_of_their_content(
    store: BlobStore, tmp_path: Path
) -> None:
    put(store, SESSION, *((keyed(plain), plain) for plain in PLAINS))
    (path,) = pack_paths(tmp_path)
    found = list(scan_records(path.read_bytes(), HEADER.size))
    assert [(kind, codec, plain) for _, kind, codec, _, plain in found] == [(254, 16, 0)] * 3


def test_an_encrypted_payload_begins_with_kind_codec_domain_and_size(
    store: BlobStore, tmp_path: Path
) -> None:
    put(store, BOTH, (keyed(PLAINS[2], SECOND), PLAINS[2]))
    (path,) = pack_paths(tmp_path)
    data = path.read_bytes()
    at = store.locate(keyed(PLAINS[2], SECOND))
    stored = data[at.offset : at.offset + at.stored_bytes]
    aead = AESGCM(BOTH.pack_key(data[48:80]))
    inner = aead.decrypt(at.offset.to_bytes(12, "little"), stored, data[at.offset - 16 : at.offset])
    assert struct.unpack("<BBHI", inner[:8]) == (1, 1, 1, len(PLAINS[2]))
    assert PackId(digest_of(data)).hex() == path.name
