"""Identities: each kind of file that holds one, the passphrases of a repository, and what goes wrong."""

from __future__ import annotations

import base64
import json
import logging
import subprocess
from pathlib import Path

import msgspec
import pytest

from casfs.crypto import age
from casfs.crypto import identities as identities_module
from casfs.crypto import passphrase as passphrase_module
from casfs.crypto.identities import (
    IDENTITIES,
    MAX_FILES,
    MAX_FILES_BYTES,
    MAX_TRIES,
    Identities,
    add_passphrase,
    change_passphrase,
    read_identity_file,
    unlock_by_gpg,
    unlock_by_passphrase,
    wrapped_identities,
    write_identity,
)
from casfs.crypto.passphrase import (
    WrappedIdentity,
    parse_wrapped,
    unwrap_identity,
    wrap_identity,
)
from casfs.crypto.recipients import Recipient, RecipientKind
from casfs.digest import digest_of
from casfs.errors import KeyMissingError, SessionError, StorageError, WrongKeyError
from casfs.storage.local import LocalStorage
from tests.support.encryption import OTHER_SECRET, PUBLIC, REPOSITORY, SECRET, identities

pytestmark = pytest.mark.usefixtures("own_home")

SEALED = age.wrap(b"for me", [PUBLIC])

ENCRYPTED = base64.b64decode(
    "YWdlLWVuY3J5cHRpb24ub3JnL3YxCi0+IHNjcnlwdCBPaGJ1S3pYS0k3U0RJRGRBTW45UGdnIDQKTHhkZ2htMDN2"
    "YllBaTFkVUNIN0szTk1SN0M1SHhxYU9zTndtSVNaSlJ6SQotLS0gNWE0RytlYzZGc1RJMFZjWnJaOFVaU004VW1I"
    "SG83R1oreXoxZ0ZjUVJ4bwoEPMaLzaoQgqkNbPmFiWl2qjZl7Zd06n8/GLbOoELsLqYtzwej5hN5vC/5/a6w+deY"
    "RyjYKJ8tUJDL75D23SEKJeRd0G4jHG+e4+mr4bRTJ/tO9m6ewfOefXY+x5QrSXjeEpY/YxtBgQ9g8g=="
)
"""The identity as age encrypts it to a passphrase, "secret", with far less work than it asks for."""


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    folder = tmp_path / "storage"
    (folder / "tmp").mkdir(parents=True)
    return LocalStorage(folder, writer="test", sync=False)


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little work for a passphrase; the golden vectors hold the real amount."""
    monkeypatch.setattr(passphrase_module, "_MEMORY_KIB", 64)
    monkeypatch.setattr(passphrase_module, "_LEAST_MEMORY_KIB", 64)
    monkeypatch.setattr(passphrase_module, "_ITERATIONS", 1)


def no_prompt(what: str) -> None:
    return None


def read(path: Path, data: bytes, passphrase: str | None = None) -> list[age.AgeIdentity]:
    path.write_bytes(data)
    return read_identity_file(path, lambda what: passphrase)


class TestIdentityFile:
    def test_an_age_keygen_file_is_read(self, tmp_path: Path) -> None:
        data = f"# created: today\n# public key: {PUBLIC}\n{SECRET}\n".encode()
        assert age.unwrap(SEALED, read(tmp_path / "id", data)) == b"for me"

    def test_an_identity_file_may_hold_several_identities(self, tmp_path: Path) -> None:
        found = read(tmp_path / "id", f"{OTHER_SECRET}\r\n\r\n  {SECRET}\r\n".encode())
        assert len(found) == 2
        assert age.unwrap(SEALED, found) == b"for me"

    def test_an_age_encrypted_identity_file_asks_for_its_passphrase(self, tmp_path: Path) -> None:
        asked = []

        def ask(what: str) -> str:
            asked.append(what)
            return "secret"

        path = tmp_path / "id.age"
        path.write_bytes(ENCRYPTED)
        assert age.unwrap(SEALED, read_identity_file(path, ask)) == b"for me"
        assert asked == [str(path)]
        for wrong in ("other", "\udcff"):
            with pytest.raises(WrongKeyError, match=r"the passphrase of .*id\.age is wrong"):
                read(path, ENCRYPTED, wrong)
        with pytest.raises(KeyMissingError, match="no terminal to ask"):
            read_identity_file(path, no_prompt)

    @pytest.mark.parametrize("passphrase", ["", "gehe\u0301im \N{KEY}"])
    def test_an_ssh_key_is_read_with_its_passphrase(self, tmp_path: Path, passphrase: str) -> None:
        path = tmp_path / "id_ed25519"
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", path], check=True
        )
        public = age.canonical_recipient((tmp_path / "id_ed25519.pub").read_text())
        sealed = age.wrap(b"for ssh", [public])
        found = read_identity_file(path, lambda what: passphrase)
        assert age.unwrap(sealed, found) == b"for ssh"
        if passphrase:
            with pytest.raises(WrongKeyError, match=r"the passphrase of .*id_ed25519 is wrong"):
                read_identity_file(path, lambda what: "other")
            with pytest.raises(KeyMissingError, match="needs a passphrase"):
                read_identity_file(path, no_prompt)

    def test_an_ssh_key_of_an_unsupported_type_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "id_ecdsa"
        subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-f", path], check=True)
        with pytest.raises(WrongKeyError, match="not an SSH key that age can use"):
            read_identity_file(path, no_prompt)

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"", "contains no identity"),
            (b"# nothing\n\n", "contains no identity"),
            (PUBLIC.encode(), "line 1: not an age identity"),
            (SECRET.encode()[:-1], "line 1: not an age identity"),
            (f"\n{SECRET}x".encode(), "line 2: not an age identity"),
            (b"\xff\xfe\x00", "not text"),
            (b"-----BEGIN OPENSSH PRIVATE KEY-----\nx\n", "not a usable SSH key"),
            (
                b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
                "not a usable SSH key",
            ),
            (b"-----BEGIN AGE ENCRYPTED FILE-----\nx\n", "armored"),
            (b"age-encryption.org/v1\nx\n", "wrong"),
        ],
    )
    def test_a_file_without_an_identity_is_refused(
        self, tmp_path: Path, data: bytes, reason: str
    ) -> None:
        with pytest.raises(WrongKeyError, match=reason) as caught:
            read(tmp_path / "id", data, "secret")
        assert SECRET[16:40] not in str(caught.value)
        assert str(tmp_path / "id") in str(caught.value)

    def test_an_unreadable_identity_file_is_a_storage_error(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none", tmp_path):
            with pytest.raises(StorageError, match="read the identity file"):
                read_identity_file(path, no_prompt)


class TestRepositoryPassphrase:
    def test_a_passphrase_opens_what_is_wrapped_to_its_recipient(
        self, storage: LocalStorage
    ) -> None:
        one = add_passphrase(storage, "secret", REPOSITORY)
        assert one.kind == RecipientKind.PASSPHRASE
        sealed = age.wrap(b"data", [one.public_key])
        found = unlock_by_passphrase(storage, REPOSITORY, "secret", [one])
        assert age.unwrap(sealed, found) == b"data"

    def test_a_wrong_passphrase_opens_nothing(self, storage: LocalStorage) -> None:
        with pytest.raises(WrongKeyError, match="has no passphrase; give --identity"):
            unlock_by_passphrase(storage, REPOSITORY, "secret", [])
        one = add_passphrase(storage, "secret", REPOSITORY)
        for wrong in ("Secret", "secret ", "", "\udcff"):
            with pytest.raises(WrongKeyError, match="the passphrase is"):
                unlock_by_passphrase(storage, REPOSITORY, wrong, [one])

    def test_a_passphrase_opens_only_the_repository_it_was_made_for(
        self, storage: LocalStorage
    ) -> None:
        one = add_passphrase(storage, "secret", REPOSITORY)
        with pytest.raises(WrongKeyError, match="the passphrase is wrong"):
            unlock_by_passphrase(storage, bytes(32), "secret", [one])

    def test_each_of_several_passphrases_opens_its_own_identity(
        self, storage: LocalStorage
    ) -> None:
        recipients = [add_passphrase(storage, text, REPOSITORY) for text in ("one", "two")]
        for text, one in zip(("one", "two"), recipients, strict=True):
            (found,) = unlock_by_passphrase(storage, REPOSITORY, text, recipients)
            assert age.unwrap(age.wrap(b"x", [one.public_key]), [found]) == b"x"

    def test_a_changed_passphrase_replaces_the_old_one(self, storage: LocalStorage) -> None:
        one = add_passphrase(storage, "old", REPOSITORY)
        both = [one, add_passphrase(storage, "another", REPOSITORY)]
        with pytest.raises(WrongKeyError, match="nothing was changed"):
            change_passphrase(storage, "wrong", "new", REPOSITORY, both)
        assert change_passphrase(storage, "old", "new", REPOSITORY, both) == 1
        with pytest.raises(WrongKeyError):
            unlock_by_passphrase(storage, REPOSITORY, "old", both)
        for text in ("new", "another"):
            assert len(unlock_by_passphrase(storage, REPOSITORY, text, both)) == 1
        assert one.value in {wrapped.recipient for _, wrapped in wrapped_identities(storage, both)}

    def test_an_identity_is_wrapped_to_other_bytes_every_time(self) -> None:
        files = {wrap_identity(SECRET, PUBLIC, "secret", REPOSITORY) for _ in range(3)}
        assert len(files) == 3
        for data in files:
            assert SECRET.encode() not in data and b"secret" not in data

    def test_a_passphrase_does_not_open_an_identity_with_another_recipient(self) -> None:
        wrapped = parse_wrapped(wrap_identity(SECRET, PUBLIC, "secret", REPOSITORY), "it")
        other = msgspec.structs.replace(wrapped, recipient="age1other")
        with pytest.raises(WrongKeyError):
            unwrap_identity(other, "secret", REPOSITORY)


PASSPHRASE_RECIPIENT = Recipient(RecipientKind.PASSPHRASE, PUBLIC)


class TestHostileIdentityFile:
    def test_a_passphrase_is_tried_on_no_identity_outside_the_list_of_recipients(
        self, storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = add_passphrase(storage, "secret", REPOSITORY)
        for _ in range(3):
            add_passphrase(storage, "secret", REPOSITORY)
        tried = []

        def record(wrapped: WrappedIdentity, passphrase: str, repository: bytes) -> str:
            tried.append(wrapped.recipient)
            return unwrap_identity(wrapped, passphrase, repository)

        monkeypatch.setattr(identities_module, "unwrap_identity", record)
        assert len(unlock_by_passphrase(storage, REPOSITORY, "secret", [one])) == 1
        assert tried == [one.value]
        listed_otherwise = Recipient(RecipientKind.AGE, one.value)
        with pytest.raises(WrongKeyError, match="has no passphrase"):
            unlock_by_passphrase(storage, REPOSITORY, "secret", [listed_otherwise])

    def test_a_passphrase_is_tried_on_few_identities_only(self, storage: LocalStorage) -> None:
        for _ in range(MAX_TRIES + 1):
            write_identity(storage, wrap_identity(SECRET, PUBLIC, "guess", REPOSITORY), "json")
        with pytest.raises(WrongKeyError, match="more than the 16 that are tried"):
            unlock_by_passphrase(storage, REPOSITORY, "secret", [PASSPHRASE_RECIPIENT])

    def test_more_identities_than_are_read_are_refused_by_a_sentence(
        self, storage: LocalStorage
    ) -> None:
        recipient = add_passphrase(storage, "right", REPOSITORY)
        for number in range(MAX_FILES):
            storage.write(f"{IDENTITIES}/{number:064x}.junk", b"")
        wanted = (
            "more than 1000 identities.*remove those below identities/ that no machine of yours"
        )
        with pytest.raises(WrongKeyError, match=wanted):
            unlock_by_passphrase(storage, REPOSITORY, "right", [recipient])

    def test_identities_that_are_large_together_are_not_read(
        self, storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(MAX_FILES_BYTES // (1 << 20) + 1):
            storage.write(f"{IDENTITIES}/{number:064x}.json", bytes(1 << 20))
        read: list[str] = []

        def read_one(name: str, *_: int) -> bytes:
            read.append(name)
            return b""

        monkeypatch.setattr(storage, "read", read_one)
        with pytest.raises(WrongKeyError, match=r"more than .* 16 MiB of them"):
            wrapped_identities(storage, [])
        assert len(read) == 16

    def test_an_identity_with_another_public_half_than_the_recorded_one_does_not_open(self) -> None:
        forged = parse_wrapped(wrap_identity(OTHER_SECRET, PUBLIC, "secret", REPOSITORY), "it")
        with pytest.raises(WrongKeyError, match="the passphrase is wrong"):
            unwrap_identity(forged, "secret", REPOSITORY)

    def test_an_identity_commits_to_the_key_of_its_passphrase(self) -> None:
        good = parse_wrapped(wrap_identity(SECRET, PUBLIC, "secret", REPOSITORY), "it")
        assert len(good.commitment) == 32
        assert unwrap_identity(good, "secret", REPOSITORY) == SECRET
        other = msgspec.structs.replace(good, commitment=bytes(32))
        with pytest.raises(WrongKeyError):
            unwrap_identity(other, "secret", REPOSITORY)
        earlier = msgspec.structs.replace(good, commitment=b"")
        assert unwrap_identity(earlier, "secret", REPOSITORY) == SECRET

    GOOD = json.loads(wrap_identity(SECRET, PUBLIC, "secret", REPOSITORY))

    @pytest.mark.parametrize(
        "change",
        [
            {"casfs": "identity 2"},
            {"kdf": "none"},
            {"iterations": 0},
            {"iterations": 1_000_000_000},
            {"iterations": -1},
            {"lanes": 0},
            {"lanes": 1 << 24},
            {"memory_kib": 8},
            {"memory_kib": 32},
            {"wrapped": "A" * 176},
            {"memory_kib": 1 << 40},
            {"salt": "AAAA"},
            {"nonce": ""},
            {"nonce": 5},
            {"wrapped": "AAAA" * 10_000},
            {"wrapped": None},
        ],
        ids=str,
    )
    def test_a_wrapped_identity_that_asks_for_too_much_is_refused(
        self, storage: LocalStorage, caplog: pytest.LogCaptureFixture, change: dict[str, object]
    ) -> None:
        data = json.dumps(self.GOOD | change).encode()
        with pytest.raises(SessionError):
            parse_wrapped(data, "it")
        write_identity(storage, data, "json")
        with caplog.at_level(logging.WARNING):
            assert wrapped_identities(storage, [PASSPHRASE_RECIPIENT]) == []
        assert digest_of(data).hex() in caplog.text

    @pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"[" * 10_000, b"{}"])
    def test_a_wrapped_identity_that_does_not_parse_is_refused(self, data: bytes) -> None:
        with pytest.raises(SessionError, match="it cannot be parsed"):
            parse_wrapped(data, "it")

    @pytest.mark.parametrize("wrapped", [b"", b"x" * 15, b"x" * 16, b"x" * 100])
    def test_a_wrapped_identity_without_a_valid_ciphertext_does_not_open(
        self, wrapped: bytes
    ) -> None:
        good = parse_wrapped(wrap_identity(SECRET, PUBLIC, "secret", REPOSITORY), "it")
        with pytest.raises(WrongKeyError):
            unwrap_identity(msgspec.structs.replace(good, wrapped=wrapped), "secret", REPOSITORY)

    def test_a_wrapped_identity_with_a_digest_mismatch_is_skipped(
        self, storage: LocalStorage, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        one = add_passphrase(storage, "secret", REPOSITORY)
        (path,) = (tmp_path / "storage" / "identities").iterdir()
        path.write_bytes(path.read_bytes() + b" ")
        with pytest.raises(WrongKeyError, match="has no passphrase"):
            unlock_by_passphrase(storage, REPOSITORY, "secret", [one])
        assert "digest mismatch" in caplog.text

    def test_a_replaced_gpg_identity_opens_nothing(self, storage: LocalStorage) -> None:
        write_identity(storage, b"no message at all", "gpg")
        found = unlock_by_gpg(storage, [Recipient(RecipientKind.GPG, "A" * 40, PUBLIC, b"key")])
        assert not found


def test_printing_an_identity_shows_no_secret() -> None:
    found = identities()
    shown = f"{found!r} {found.ages[0]!r} {found}"
    assert SECRET[16:30] not in shown.upper()
    assert repr(Identities()) == "Identities(0, use_gpg=False)"


class TestHostileAgeFile:
    """What the storage gives back in the place of a session's file."""

    def test_an_age_file_with_any_changed_byte_does_not_open(self) -> None:
        for place in range(len(SEALED)):
            changed = SEALED[:place] + bytes([SEALED[place] ^ 1]) + SEALED[place + 1 :]
            with pytest.raises(KeyMissingError):
                age.unwrap(changed, identities().ages)

    def test_an_age_file_that_is_cut_or_extended_does_not_open(self) -> None:
        for size in range(len(SEALED)):
            with pytest.raises(KeyMissingError):
                age.unwrap(SEALED[:size], identities().ages)
        with pytest.raises(KeyMissingError):
            age.unwrap(SEALED + b"x", identities().ages)
