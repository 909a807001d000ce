"""The lock policy of a repository: which one a machine follows, and what it says of a changed one."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from casfs.crypto.trust_state import (
    WriterState,
    pin_generations,
    pinned_lock_policy,
    save_state,
    state_folder,
)
from casfs.errors import RefusedError, TrustError, UsageError
from casfs.format.config import EncryptionConfig, RepositoryConfig, new_config
from casfs.format.generation import new_generation
from casfs.format.key_derivation import DedupDomain, WriteSession
from casfs.format.lock_policy import FOLDER, MAX_SET_NS, encode_policy, new_policy
from casfs.format.signature import SigningKey
from casfs.repository.lock_policy import (
    accept_policy,
    find_policy,
    lock_duration_s,
    own_domain,
    renew_policy,
    require_locking_bucket,
    set_policy,
)
from casfs.storage.memory import MemoryStorage
from tests.support.versioned_memory import VersionedMemoryStorage

DAY_S = 86_400
pytestmark = pytest.mark.usefixtures("own_home")


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000

    def __call__(self) -> int:
        return self.now_s * 1_000_000_000


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def storage(clock: Clock) -> VersionedMemoryStorage:
    return VersionedMemoryStorage(now_ns=clock)


@pytest.fixture
def config() -> RepositoryConfig:
    return new_config("2026-11-28T00:00:00Z")


@pytest.fixture
def encrypted(own_home: Path) -> tuple[RepositoryConfig, DedupDomain]:
    """An encrypted repository whose own domain this machine knows."""
    config = new_config("2026-11-28T00:00:00Z")
    domain = DedupDomain.new(bytes.fromhex(config.id))
    save_state(WriterState(config.id, domain.secret.hex(), ""))
    encryption = EncryptionConfig("aes-256-gcm", "00" * 32, domain.id.hex())
    return RepositoryConfig(config.id, config.created, encryption=encryption), domain


def forget_machine() -> None:
    for path in state_folder().iterdir():
        path.unlink()


def test_without_a_policy_nothing_is_locked(
    storage: VersionedMemoryStorage, config: RepositoryConfig
) -> None:
    assert lock_duration_s(storage, config) == 0
    assert lock_duration_s(MemoryStorage(), config) == 0


def test_a_place_without_a_bucket_asks_for_nothing(config: RepositoryConfig) -> None:
    lock_duration_s(MemoryStorage(), config)
    assert pinned_lock_policy(config.id) is None


def test_the_machine_that_sets_a_policy_follows_it(
    storage: VersionedMemoryStorage, config: RepositoryConfig
) -> None:
    for days in (30, 40, 10, 0, 5):
        set_policy(storage, config, days * DAY_S, None)
        assert lock_duration_s(storage, config) == days * DAY_S
    assert len(list(storage.list(FOLDER))) == 5


def test_a_machine_follows_the_policy_that_it_sees_first(
    storage: VersionedMemoryStorage, config: RepositoryConfig
) -> None:
    set_policy(storage, config, 30 * DAY_S, None)
    forget_machine()
    assert lock_duration_s(storage, config) == 30 * DAY_S


@pytest.mark.parametrize("days", [0, 10, 3000])
def test_a_change_without_proof_is_not_followed_until_it_is_accepted(
    storage: VersionedMemoryStorage,
    config: RepositoryConfig,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    days: int,
) -> None:
    set_policy(storage, config, 30 * DAY_S, None)
    assert lock_duration_s(storage, config) == 30 * DAY_S
    clock.now_s += 60
    storage.create(*encode_policy(new_policy(config.id, days * DAY_S, 1 << 62, None)))
    assert lock_duration_s(storage, config) == 30 * DAY_S
    (record,) = caplog.records
    assert "and this machine knows a lock policy of 30 d" in record.message
    assert "run `casfs key accept`" in record.message
    caplog.clear()
    accept_policy(storage, config)
    assert lock_duration_s(storage, config) == days * DAY_S
    assert caplog.records == []


def test_a_policy_that_appears_later_is_not_followed_without_proof(
    storage: VersionedMemoryStorage, config: RepositoryConfig, caplog: pytest.LogCaptureFixture
) -> None:
    assert lock_duration_s(storage, config) == 0
    storage.create(*encode_policy(new_policy(config.id, 3000 * DAY_S, 5, None)))
    assert lock_duration_s(storage, config) == 0
    assert "this machine knows no lock policy" in caplog.text


def test_a_hidden_policy_is_noticed(
    storage: VersionedMemoryStorage, config: RepositoryConfig, caplog: pytest.LogCaptureFixture
) -> None:
    set_policy(storage, config, 30 * DAY_S, None)
    for entry in list(storage.list(FOLDER)):
        storage.delete(entry.name)
    assert lock_duration_s(storage, config) == 30 * DAY_S
    assert "the repository shows no lock policy" in caplog.text


def test_an_authentic_change_is_followed_and_an_older_one_shown_again_is_not(
    storage: VersionedMemoryStorage,
    encrypted: tuple[RepositoryConfig, DedupDomain],
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, domain = encrypted
    old = set_policy(storage, config, 10 * DAY_S, domain)
    assert lock_duration_s(storage, config) == 10 * DAY_S
    newer = new_policy(config.id, 30 * DAY_S, old.set_ns + 1, domain.lock_policy_key)
    clock.now_s += 60
    storage.create(*encode_policy(newer))  # by another host
    assert lock_duration_s(storage, config) == 30 * DAY_S
    assert caplog.records == []
    storage.delete(encode_policy(newer)[0])
    assert lock_duration_s(storage, config) == 30 * DAY_S
    assert "the repository shows a lock policy of 10 d" in caplog.text


def test_a_forged_policy_of_an_encrypted_repository_is_ignored(
    storage: VersionedMemoryStorage,
    encrypted: tuple[RepositoryConfig, DedupDomain],
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, domain = encrypted
    set_policy(storage, config, 10 * DAY_S, domain)
    clock.now_s += 60
    for key in (None, bytes(32)):
        storage.create(*encode_policy(new_policy(config.id, 0, 1 << 62, key)))
    assert lock_duration_s(storage, config) == 10 * DAY_S
    assert "is not authentic" in caplog.text


def test_a_machine_without_the_secret_takes_the_first_policy_and_cannot_set_one(
    storage: VersionedMemoryStorage, encrypted: tuple[RepositoryConfig, DedupDomain]
) -> None:
    config, domain = encrypted
    set_policy(storage, config, 10 * DAY_S, domain)
    forget_machine()
    assert own_domain(config) is None
    found = find_policy(storage, config)
    assert found is not None and not found.is_authentic
    assert lock_duration_s(storage, config) == 10 * DAY_S
    with pytest.raises(RefusedError, match="give --identity"):
        set_policy(storage, config, 20 * DAY_S, None)


def test_the_newest_by_the_clock_of_the_storage_holds_whatever_the_clocks_of_machines(
    storage: VersionedMemoryStorage, config: RepositoryConfig, clock: Clock
) -> None:
    storage.create(*encode_policy(new_policy(config.id, 10 * DAY_S, 1 << 61, None)))
    clock.now_s += 60
    storage.create(*encode_policy(new_policy(config.id, 20 * DAY_S, 5, None)))
    found = find_policy(storage, config)
    assert found is not None and found.policy.lock_for_s == 20 * DAY_S
    storage.create(*encode_policy(new_policy(config.id, 30 * DAY_S, 6, None)))
    found = find_policy(storage, config)
    assert found is not None and found.policy.lock_for_s == 30 * DAY_S


def test_damaged_policies_and_those_of_other_repositories_are_ignored(
    storage: VersionedMemoryStorage,
    config: RepositoryConfig,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    set_policy(storage, config, 10 * DAY_S, None)
    clock.now_s += 60
    storage.create(f"{FOLDER}/{'0' * 64}", b"junk")
    storage.create(*encode_policy(new_policy("ab" * 32, 20 * DAY_S, 5, None)))
    assert lock_duration_s(storage, config) == 10 * DAY_S
    assert len(caplog.records) == 2


def test_a_damaged_record_of_the_machine_is_an_error(
    storage: VersionedMemoryStorage, config: RepositoryConfig
) -> None:
    set_policy(storage, config, 10 * DAY_S, None)
    (path,) = state_folder().glob("locks-*")
    path.write_text("junk")
    with pytest.raises(TrustError):
        lock_duration_s(storage, config)


def test_a_state_folder_that_cannot_be_written_keeps_no_backup_from_locking(
    storage: VersionedMemoryStorage,
    config: RepositoryConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    set_policy(storage, config, 10 * DAY_S, None)
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/none")
    assert lock_duration_s(storage, config) == 10 * DAY_S
    assert "a change of the lock policy would not be noticed" in caplog.text


def test_a_place_that_cannot_lock_is_explained() -> None:
    with pytest.raises(UsageError, match="objects are locked in an S3 bucket"):
        require_locking_bucket(MemoryStorage("gs://bucket/r"))
    with pytest.raises(RefusedError, match="does not lock objects"):
        require_locking_bucket(VersionedMemoryStorage(can_lock=False))
    require_locking_bucket(VersionedMemoryStorage())


def test_a_policy_of_the_last_time_can_be_changed(
    storage: VersionedMemoryStorage,
    encrypted: tuple[RepositoryConfig, DedupDomain],
    clock: Clock,
) -> None:
    """A recipient can set one, after which no later time is left."""
    config, domain = encrypted
    last = new_policy(config.id, 0, MAX_SET_NS, domain.lock_policy_key)
    storage.create(*encode_policy(last))
    assert lock_duration_s(storage, config) == 0
    clock.now_s += 60
    set_policy(storage, config, 30 * DAY_S, domain)
    forget_machine()
    save_state(WriterState(config.id, domain.secret.hex(), ""))
    assert lock_duration_s(storage, config) == 30 * DAY_S


class TestReplacedDomain:
    """A removal of recipients replaced the domain whose key makes policies authentic."""

    @pytest.fixture
    def replaced(
        self, encrypted: tuple[RepositoryConfig, DedupDomain], storage: VersionedMemoryStorage
    ) -> tuple[RepositoryConfig, DedupDomain]:
        """This machine writes in the domain that replaced the one of the configuration."""
        config, old = encrypted
        config = replace(config, format=2)
        set_policy(storage, config, 30 * DAY_S, old)
        new = DedupDomain.new(old.repository)
        renew_policy(storage, config, new)
        session = WriteSession.new([new, old])
        record = new_generation(1, old, session, "00" * 32, SigningKey(bytes(32)))
        pin_generations(config.id, [record])
        save_state(WriterState(config.id, new.secret.hex(), "", generation=1))
        return config, old

    def test_the_policy_stays_as_it_was(
        self,
        storage: VersionedMemoryStorage,
        replaced: tuple[RepositoryConfig, DedupDomain],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        config, old = replaced
        found = find_policy(storage, config)
        assert found is not None and found.is_authentic
        assert lock_duration_s(storage, config) == 30 * DAY_S
        assert own_domain(config) != old
        assert "run `casfs key accept`" not in caplog.text

    def test_a_policy_of_a_former_recipient_is_ignored(
        self,
        storage: VersionedMemoryStorage,
        replaced: tuple[RepositoryConfig, DedupDomain],
        clock: Clock,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        config, old = replaced
        assert lock_duration_s(storage, config) == 30 * DAY_S
        clock.now_s += 60
        forged = new_policy(config.id, 0, 1 << 62, old.lock_policy_key)
        storage.create(*encode_policy(forged))
        assert lock_duration_s(storage, config) == 30 * DAY_S
        assert "is not authentic; it is ignored" in caplog.text

    @pytest.mark.parametrize("shown", ["an earlier policy", "none"])
    def test_what_is_stored_again_is_what_the_machine_follows(
        self,
        storage: VersionedMemoryStorage,
        encrypted: tuple[RepositoryConfig, DedupDomain],
        clock: Clock,
        shown: str,
    ) -> None:
        """Who may add objects can store an earlier policy again, which then is the newest by the clock."""
        config, old = encrypted
        config = replace(config, format=2)
        name, data = encode_policy(set_policy(storage, config, DAY_S, old))
        clock.now_s += 60
        set_policy(storage, config, 30 * DAY_S, old)
        clock.now_s += 60
        if shown == "none":
            storage = VersionedMemoryStorage(now_ns=clock)
        else:
            storage.write(name, data)
        new = DedupDomain.new(old.repository)
        renew_policy(storage, config, new)
        record = new_generation(
            1, old, WriteSession.new([new, old]), "00" * 32, SigningKey(bytes(32))
        )
        forget_machine()
        pin_generations(config.id, [record])
        save_state(WriterState(config.id, new.secret.hex(), "", generation=1))
        assert lock_duration_s(storage, config) == 30 * DAY_S

    def test_nothing_is_stored_again_where_there_is_no_policy(
        self,
        storage: VersionedMemoryStorage,
        encrypted: tuple[RepositoryConfig, DedupDomain],
    ) -> None:
        config, domain = encrypted
        renew_policy(storage, config, domain)
        renew_policy(MemoryStorage(), config, domain)
        assert list(storage.list(FOLDER)) == []
