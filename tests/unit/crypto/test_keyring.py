"""Wrapped sessions and the keyring: which sessions open, how others are reported, and which are proven."""

from __future__ import annotations

import dataclasses
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pyrage
import pytest

from casfs.crypto import age, gpg, session_files
from casfs.crypto import keyring as keyring_module
from casfs.crypto.age import MAX_RECIPIENTS
from casfs.crypto.identities import Identities
from casfs.crypto.keyring import Keyring
from casfs.crypto.recipients import RecipientList, write_recipients
from casfs.crypto.session_files import (
    decode_session,
    encode_session,
    list_session_files,
    read_session,
    remove_session,
    session_ids,
    write_session,
)
from casfs.digest import digest_of
from casfs.errors import (
    KeyMissingError,
    NotFoundError,
    RefusedError,
    SessionError,
    WrongKeyError,
)
from casfs.format.config import CIPHER, EncryptionConfig, RepositoryConfig
from casfs.format.key_derivation import MAX_DOMAINS, DedupDomain, SessionId, WriteSession
from casfs.storage.local import LocalStorage
from tests.support.encryption import (
    DOMAIN,
    OTHER,
    OTHER_SECRET,
    PUBLIC,
    RECIPIENT,
    REPOSITORY,
    SESSION,
    identities,
)

CONFIG = RepositoryConfig(
    id=REPOSITORY.hex(),
    created="today",
    encryption=EncryptionConfig(CIPHER, SESSION.id.hex(), DOMAIN.id.hex()),
)
SECOND = DedupDomain(REPOSITORY, b"\x05" * 32)


class Counting(LocalStorage):
    """A storage that counts what is read."""

    reads = 0

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        self.reads += 1
        return super().read(name, offset, size)


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Counting]:
    (tmp_path / "tmp").mkdir()
    storage = Counting(tmp_path, writer="test", sync=False)
    write_recipients(storage, RecipientList.of([RECIPIENT]))
    yield storage
    storage.close()


def keyring(storage: LocalStorage, *secrets: str) -> Keyring:
    return Keyring(storage, CONFIG, identities(*secrets))


def put(storage: LocalStorage, session_id: bytes, data: bytes, suffix: str = "age") -> str:
    """Store a file of a session under the digest that it has."""
    name = f"sessions/{session_id.hex()}/{digest_of(data).hex()}.{suffix}"
    storage.write(name, data)
    return name


class TestSessionDocument:
    def test_a_session_document_is_decoded_as_it_was_encoded(self) -> None:
        session = WriteSession(REPOSITORY, bytes(32), (SECOND, DOMAIN))
        assert decode_session(encode_session(session), session.id, REPOSITORY) == session

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"casfs": "session 2"}, "form"),
            ({"repository": bytes(32).hex()}, "another repository"),
            ({"repository": "x"}, "has an invalid document"),
            ({"secret": bytes(32).hex()}, "the secrets of another session"),
            ({"secret": bytes(31).hex()}, "invalid number or size"),
            ({"domains": []}, "invalid number or size"),
            ({"domains": [bytes(32).hex()]}, "the secrets of another session"),
            ({"domains": [DOMAIN.secret.hex()] * 2}, "the secrets of another session"),
            ({"domains": ["00"]}, "invalid number or size"),
            ({"domains": [bytes(32).hex()] * 70_000}, "invalid number or size"),
            ({"domains": 5}, "has an invalid document"),
            ({"secret": None}, "has an invalid document"),
        ],
    )
    def test_a_changed_session_document_is_refused(
        self, change: dict[str, object], reason: str
    ) -> None:
        document = msgspec.json.decode(encode_session(SESSION)) | change
        with pytest.raises(SessionError, match=reason):
            decode_session(msgspec.json.encode(document), SESSION.id, REPOSITORY)

    @pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"{}", b"[" * 10_000])
    def test_data_that_is_no_session_document_is_refused(self, data: bytes) -> None:
        with pytest.raises(SessionError, match="has an invalid document"):
            decode_session(data, SESSION.id, REPOSITORY)

    def test_a_session_document_under_another_id_is_refused(self) -> None:
        with pytest.raises(SessionError, match="the secrets of another session"):
            decode_session(encode_session(SESSION), bytes(32), REPOSITORY)


class TestSessionFiles:
    def test_a_session_file_is_named_by_its_bytes_and_shows_no_secret(
        self, storage: LocalStorage, tmp_path: Path
    ) -> None:
        (name,) = write_session(storage, SESSION, [RECIPIENT, OTHER])
        data = (tmp_path / name).read_bytes()
        assert name == f"sessions/{SESSION.id.hex()}/{digest_of(data).hex()}.age"
        assert SESSION.secret not in data and SESSION.secret.hex().encode() not in data
        assert [file.name for file in list_session_files(storage, SESSION.id)] == [name]
        assert session_ids(storage) == [SESSION.id]

    def test_files_that_are_no_session_files_are_ignored(self, storage: LocalStorage) -> None:
        write_session(storage, SESSION, [RECIPIENT])
        for name in (
            "sessions/x/y.age",
            f"sessions/{'z' * 64}/a.age",
            "sessions/a/b",
        ):
            storage.write(name, b"")
        storage.write(f"sessions/{SESSION.id.hex()}/notes.txt", b"")
        assert session_ids(storage) == [SESSION.id]
        assert len(list_session_files(storage, SESSION.id)) == 1

    def test_a_session_is_removed_with_all_its_files(self, storage: LocalStorage) -> None:
        (old,) = write_session(storage, SESSION, [RECIPIENT])
        (new,) = write_session(storage, SESSION, [OTHER])
        assert old != new
        remove_session(storage, SESSION.id)
        assert session_ids(storage) == []

    @pytest.mark.parametrize("given", [Identities(), identities(OTHER_SECRET)])
    def test_a_session_file_does_not_open_without_its_recipient(
        self, storage: LocalStorage, given: Identities
    ) -> None:
        write_session(storage, SESSION, [RECIPIENT])
        with pytest.raises(KeyMissingError) as caught:
            read_session(storage, SESSION.id, REPOSITORY, given.ages, given.use_gpg)
        assert ("give --identity" in str(caught.value)) == (not given)

    def test_a_missing_session_is_reported(self, storage: LocalStorage) -> None:
        with pytest.raises(SessionError, match="is missing: its packs and snapshots can no longer"):
            read_session(storage, SESSION.id, REPOSITORY, identities().ages, False)

    @pytest.mark.parametrize("place", [0, 30, -1])
    def test_a_changed_session_file_is_damaged_and_an_intact_one_beside_it_opens(
        self, storage: LocalStorage, tmp_path: Path, place: int
    ) -> None:
        (name,) = write_session(storage, SESSION, [RECIPIENT])
        changed = bytearray((tmp_path / name).read_bytes())
        changed[place] ^= 1
        (tmp_path / name).write_bytes(changed)
        with pytest.raises(SessionError, match="digest mismatch"):
            read_session(storage, SESSION.id, REPOSITORY, identities().ages, False)
        write_session(storage, SESSION, [RECIPIENT])
        found = read_session(storage, SESSION.id, REPOSITORY, identities().ages, False)
        assert found == SESSION

    def test_a_session_file_of_another_session_or_repository_is_refused(
        self, storage: LocalStorage
    ) -> None:
        other = WriteSession(REPOSITORY, bytes(32), (DOMAIN,))
        foreign = dataclasses.replace(SESSION, repository=bytes(32))
        for session, reason in ((other, "of another session"), (foreign, "another repository")):
            name = put(storage, SESSION.id, age.wrap(encode_session(session), [PUBLIC]))
            with pytest.raises(SessionError, match=reason):
                read_session(storage, SESSION.id, REPOSITORY, identities().ages, False)
            storage.delete(name)

    def test_foreign_files_beside_an_intact_session_file_do_no_harm(
        self, storage: LocalStorage
    ) -> None:
        write_session(storage, SESSION, [RECIPIENT])
        for number in range(4):
            put(storage, SESSION.id, b"not a file of age %d" % number)
        put(storage, SESSION.id, b"not a message", "gpg")
        put(storage, SESSION.id, age.wrap(b"{}", [PUBLIC]))
        found = read_session(storage, SESSION.id, REPOSITORY, identities().ages, False)
        assert found == SESSION


class TestHostileSessionFile:
    def test_a_session_file_with_many_recipients_is_refused_before_any_is_tried(
        self, storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        header = b"age-encryption.org/v1\n" + b"-> X25519 %s\n%s\n" % (b"A" * 43, b"B" * 43) * 1000
        put(storage, SESSION.id, header + b"--- mac\n" + bytes(32))
        put(storage, SESSION.id, header)
        put(storage, SESSION.id, b"-----BEGIN AGE ENCRYPTED FILE-----\nAAAA\n")

        def decrypt(data: bytes, identities: object) -> bytes:
            raise AssertionError("the file was tried")

        with monkeypatch.context() as patch:
            patch.setattr(pyrage, "decrypt", decrypt)
            with pytest.raises(SessionError, match=r"more than 100 recipients|is armored"):
                read_session(storage, SESSION.id, REPOSITORY, identities().ages, False)
        write_session(storage, SESSION, [RECIPIENT])
        found = read_session(storage, SESSION.id, REPOSITORY, identities().ages, False)
        assert found == SESSION

    @pytest.mark.parametrize("limit", ["MAX_READ_FILES", "MAX_READ_BYTES"])
    def test_junk_beside_the_files_of_a_session_costs_bounded_reads(
        self, storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, limit: str
    ) -> None:
        write_session(storage, SESSION, [RECIPIENT])
        junk = b"age-encryption.org/v1\n" + bytes(2000)
        for number in range(20):
            put(storage, SESSION.id, junk + bytes([number]))
        monkeypatch.setattr(session_files, limit, 5 if limit == "MAX_READ_FILES" else 11_000)
        reads: list[str] = []
        read = LocalStorage.read

        def counted(self: LocalStorage, name: str, *more: int) -> bytes:
            reads.append(name)
            return read(self, name, *more)

        monkeypatch.setattr(LocalStorage, "read", counted)
        found = read_session(storage, SESSION.id, REPOSITORY, identities().ages, False)
        assert found == SESSION, "the smallest file is read first"
        reads.clear()
        with pytest.raises(SessionError, match="has 21 files, more than are read; remove those"):
            read_session(storage, SESSION.id, REPOSITORY, identities(OTHER_SECRET).ages, False)
        assert 4 <= len(reads) <= 6

    def test_a_session_is_not_written_for_more_recipients_than_a_reader_accepts(
        self, storage: LocalStorage
    ) -> None:
        write_session(storage, SESSION, [RECIPIENT] * MAX_RECIPIENTS)
        found = read_session(storage, SESSION.id, REPOSITORY, identities().ages, False)
        assert found == SESSION
        with pytest.raises(WrongKeyError, match="the limit is 100"):
            write_session(storage, SESSION, [RECIPIENT] * (MAX_RECIPIENTS + 1))

    def test_a_session_is_not_written_for_more_domains_than_a_reader_accepts(
        self, storage: LocalStorage
    ) -> None:
        """Sessions that everyone can add would otherwise make one that no reader accepts."""
        numbers = range(MAX_DOMAINS)
        domains = [DedupDomain(REPOSITORY, number.to_bytes(32, "big")) for number in numbers]
        largest = WriteSession.new(domains)
        write_session(storage, largest, [RECIPIENT])
        ring = keyring(storage)
        assert ring.domains(domains[0]) == domains
        write_session(storage, SESSION, [RECIPIENT])
        with pytest.raises(RefusedError, match=f"sessions/{largest.id.hex()} alone has 65,536"):
            ring.domains(DOMAIN)
        with pytest.raises(RefusedError, match="a reader accepts at most 65,536"):
            write_session(storage, WriteSession.new([DOMAIN, *domains]), [RECIPIENT])

    def test_the_domains_of_a_session_with_many_come_after_those_of_others(
        self, storage: LocalStorage
    ) -> None:
        """A blob's domain is searched in order, at the cost of a digest for each."""
        many = [DedupDomain(REPOSITORY, bytes([number]) * 32) for number in range(100, 150)]
        flood = min((WriteSession.new(many) for _ in range(64)), key=lambda one: one.id)
        other = max((WriteSession.new([SECOND]) for _ in range(64)), key=lambda one: one.id)
        for session in (flood, other):
            write_session(storage, session, [RECIPIENT])
        assert session_ids(storage) == [flood.id, other.id]
        assert keyring(storage).domains(DOMAIN) == [DOMAIN, SECOND, *many]

    def test_a_gpg_message_that_expands_beyond_the_limit_is_refused(self, gpg_home: Path) -> None:
        sealed = gpg.wrap(bytes(gpg.MAX_PLAIN_BYTES * 4), [(gpg_home / "key").read_bytes()])
        assert len(sealed) < gpg.MAX_PLAIN_BYTES // 16
        with pytest.raises(KeyMissingError, match="gpg cannot decrypt it"):
            gpg.unwrap(sealed)
        sealed = gpg.wrap(b"small", [(gpg_home / "key").read_bytes()])
        assert gpg.unwrap(sealed) == b"small"

    def test_a_gpg_message_that_is_not_encrypted_is_refused(self, gpg_home: Path) -> None:
        stored = subprocess.run(
            ["gpg", "--quiet", "--batch", "--store"], input=b"x", capture_output=True, check=True
        )
        with pytest.raises(KeyMissingError, match="gpg cannot decrypt it"):
            gpg.unwrap(stored.stdout)


@pytest.fixture
def gpg_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A GPG home with one key, which is also in the file `key`; its agent listens on a short path."""
    with tempfile.TemporaryDirectory(prefix="ck") as folder:
        monkeypatch.setenv("GNUPGHOME", folder)
        quiet = ["gpg", "--quiet", "--batch", "--passphrase", ""]
        make = ("--quick-gen-key", "Ann <ann@example.org>", "default", "default", "never")
        subprocess.run([*quiet, *make], check=True, capture_output=True)
        exported = subprocess.run([*quiet, "--export"], check=True, capture_output=True)
        (Path(folder) / "key").write_bytes(exported.stdout)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["gpgconf", "--kill", "all"], check=False)


class TestKeyring:
    def test_the_keyring_opens_each_session_once(self, storage: Counting) -> None:
        write_session(storage, SESSION, [RECIPIENT])
        ring = keyring(storage)
        assert ring.session(SESSION.id) == SESSION
        reads = storage.reads
        assert ring.session(SESSION.id) is ring.session(SESSION.id)
        assert storage.reads == reads

    def test_the_keyring_keeps_few_domains_in_memory_and_every_session_of_its_own(
        self, storage: Counting, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(keyring_module, "_MAX_KEPT_DOMAINS", 8)
        ring = Keyring(storage, CONFIG, identities(), RecipientList.of([OTHER]))
        own = ring.begin([DOMAIN, SECOND])
        sessions = [
            WriteSession.new([DedupDomain.new(REPOSITORY) for _ in range(4)]) for _ in range(3)
        ]
        for session in sessions:
            write_session(storage, session, [RECIPIENT])
            assert ring.session(session.id) == session
        reads = storage.reads
        assert [ring.session(one.id) for one in (*sessions[1:], own)] == [*sessions[1:], own]
        assert storage.reads == reads
        assert ring.session(sessions[0].id) == sessions[0]
        assert storage.reads > reads

    def test_the_keyring_does_not_retry_a_session_that_did_not_open(
        self, storage: Counting
    ) -> None:
        write_session(storage, SESSION, [OTHER])
        ring = keyring(storage)
        with pytest.raises(KeyMissingError):
            ring.session(SESSION.id)
        reads = storage.reads
        with pytest.raises(KeyMissingError):
            ring.session(SESSION.id)
        assert storage.reads == reads

    def test_the_keyring_begins_a_session_that_the_recipients_open(self, storage: Counting) -> None:
        recipients = RecipientList.of([OTHER])
        session = Keyring(storage, CONFIG, Identities(), recipients).begin([SECOND])
        assert keyring(storage, OTHER_SECRET).session(session.id) == session
        with pytest.raises(KeyMissingError):
            keyring(storage).session(session.id)

    def test_the_keyring_trusts_only_sessions_with_the_first_domain_of_the_repository(
        self, storage: Counting
    ) -> None:
        ring = keyring(storage)
        assert ring.is_from_trusted_writer(SESSION)
        assert not ring.is_from_trusted_writer(
            WriteSession(REPOSITORY, bytes(32), (SECOND, DOMAIN))
        )

    def test_the_keyring_finds_the_domain_of_the_repository_in_any_proven_session(
        self, storage: Counting
    ) -> None:
        unproven = WriteSession(REPOSITORY, bytes(32), (SECOND,))
        write_session(storage, unproven, [RECIPIENT])
        proven = WriteSession.new([DOMAIN])
        with pytest.raises(KeyMissingError):
            keyring(storage).own_domain()
        write_session(storage, proven, [RECIPIENT])
        assert keyring(storage).own_domain() == DOMAIN
        write_session(storage, SESSION, [RECIPIENT])
        assert keyring(storage).own_domain() == DOMAIN

    def test_the_keyring_lists_every_domain_once_with_the_requested_one_first(
        self, storage: Counting
    ) -> None:
        for domains in ((DOMAIN,), (SECOND, DOMAIN), (SECOND,)):
            write_session(storage, WriteSession.new(domains), [RECIPIENT])
        ring = keyring(storage)
        assert ring.domains(SECOND) == [SECOND, DOMAIN]
        assert ring.domains(DOMAIN) == [DOMAIN, SECOND]

    def test_a_keyring_needs_an_encrypted_repository(self, storage: Counting) -> None:
        with pytest.raises(ValueError, match="not encrypted"):
            Keyring(storage, RepositoryConfig("a", "b"), Identities())

    def test_the_keyring_reports_whether_it_can_read(self, storage: Counting) -> None:
        assert keyring(storage).can_read
        assert not Keyring(storage, CONFIG, Identities()).can_read
        assert Keyring(storage, CONFIG, Identities(use_gpg=True)).can_read


def test_a_session_that_is_removed_while_it_is_read_is_missing(
    storage: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_session(storage, SESSION, [RECIPIENT])

    def gone(name: str, offset: int, size: int) -> bytes:
        raise NotFoundError(name)

    monkeypatch.setattr(storage, "read", gone)
    with pytest.raises(SessionError, match="is missing"):
        keyring(storage).session(SessionId(SESSION.id))
