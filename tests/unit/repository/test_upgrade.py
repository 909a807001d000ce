"""The upgrade of a repository: one durable step, refused where it must be, and noticed by who trusts it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from casfs.backup.run import BackupOptions, run_backup
from casfs.digest import digest_of
from casfs.errors import LockedError, NotFoundError, RefusedError, StorageDeniedError, TrustError
from casfs.format.config import decode_config, with_format
from casfs.format.versions import NEWEST_FORMAT, OLDEST_FORMAT
from casfs.maintenance.check import Checker
from casfs.maintenance.scrub import PackSelection
from casfs.monitor import RecordingMonitor
from casfs.repository.creation import create_repository
from casfs.repository.opening import OpenOptions, open_for_reading, open_for_writing
from casfs.repository.place import LocalPlace, RemotePlace, read_config
from casfs.repository.repository import Repository
from casfs.repository.upgrade import upgrade_repository
from casfs.storage.local import LocalStorage
from casfs.storage.memory import MemoryStorage
from casfs.storage.url import parse_address
from tests.support.encryption import RECIPIENT, unlock


@pytest.fixture
def root(tmp_path: Path) -> Path:
    create_repository(tmp_path / "repository", format_=OLDEST_FORMAT)
    return tmp_path / "repository"


@pytest.fixture
def encrypted(tmp_path: Path, own_home: Path) -> Path:
    create_repository(tmp_path / "encrypted", [RECIPIENT], format_=OLDEST_FORMAT)
    return tmp_path / "encrypted"


def config_of(root: Path) -> bytes:
    return (root / "config").read_bytes()


def test_an_upgrade_changes_the_first_line_and_the_digest_of_the_configuration(root: Path) -> None:
    before = config_of(root)
    result = upgrade_repository(root)
    assert (result.old_format, result.new_format, result.is_changed) == (1, NEWEST_FORMAT, True)
    old, new = before.splitlines(), config_of(root).splitlines()
    assert new[0] == b"casfs repository, format %d" % NEWEST_FORMAT
    assert new[1:-1] == old[1:-1]
    assert read_config(root).format == NEWEST_FORMAT


def test_an_upgrade_is_one_durable_replacement(root: Path) -> None:
    steps: list[str] = []
    storage = LocalStorage(root, on_step=steps.append)
    upgrade_repository(root, storage)
    assert steps == ["data config", "rename config", "folder config", "done config"]


def test_a_second_upgrade_changes_nothing(root: Path) -> None:
    upgrade_repository(root)
    before = (root / "config").stat()
    assert not upgrade_repository(root).is_changed
    after = (root / "config").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_an_upgrade_waits_for_no_writer_and_is_refused_beside_one(root: Path) -> None:
    before = config_of(root)
    with (
        open_for_writing(root, "backup", OpenOptions(sync=False)),
        pytest.raises(LockedError, match="the repository is in use: backup"),
    ):
        upgrade_repository(root)
    assert config_of(root) == before
    assert upgrade_repository(root).is_changed


def test_an_upgrade_runs_beside_a_reader(root: Path) -> None:
    with open_for_reading(root, reader="mount"):
        assert upgrade_repository(root).is_changed


def test_an_upgrade_needs_a_repository(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no repository"):
        upgrade_repository(tmp_path)


class _CreateOnlyStorage(LocalStorage):
    """A storage that creates objects and replaces none."""

    def write(self, name: str, data: object) -> None:
        raise StorageDeniedError("write", name, OSError(errno.EACCES, "access denied"))


def test_an_upgrade_with_credentials_that_may_only_create_changes_nothing(root: Path) -> None:
    before = config_of(root)
    with pytest.raises(RefusedError) as caught:
        upgrade_repository(root, _CreateOnlyStorage(root))
    assert str(caught.value) == (
        f"these credentials may not replace the configuration of {root} (access denied); nothing was "
        "changed: run `casfs upgrade` with credentials that may overwrite objects"
    )
    assert config_of(root) == before


def test_a_writer_of_another_machine_that_began_before_an_upgrade_ends_in_the_old_format(
    tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = MemoryStorage("s3://bucket/r")
    monkeypatch.setattr("casfs.storage.remote.open_storage", lambda *arguments: memory)

    def place() -> RemotePlace:
        return RemotePlace(parse_address("s3://bucket/r"))

    source = tmp_path / "source"
    source.mkdir()
    create_repository(place(), format_=OLDEST_FORMAT)

    def back_up(repository: Repository, name: str) -> None:
        (source / name).write_bytes(name.encode() * 1000)
        run_backup(repository, BackupOptions((bytes(source),)), RecordingMonitor())

    with open_for_writing(place(), "backup") as old:
        back_up(old, "before")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache of another machine"))
        assert upgrade_repository(place()).is_changed
        back_up(old, "beside")
        assert list(memory.list("meta")) == []
    with open_for_writing(place(), "backup") as new:
        back_up(new, "after")
        assert any(memory.list("meta"))
    with open_for_reading(place()) as repository:
        assert Checker(repository, RecordingMonitor()).check(PackSelection()).damage == []
        found = [
            {path.rpartition(b"/")[2] for path, node in repository.trees.walk(snapshot.root)}
            for _, snapshot in repository.snapshots.iterate()
        ]
    assert [b"beside" in names for names in found] == [False, True, True]
    assert [b"after" in names for names in found] == [False, False, True]


class TestTrust:
    def test_a_machine_accepts_an_upgrade_by_another_one(self, encrypted: Path) -> None:
        (encrypted / "config").write_bytes(with_format(config_of(encrypted), NEWEST_FORMAT))
        for _ in range(2):
            with open_for_writing(encrypted, "test", OpenOptions(unlock, sync=False)) as found:
                assert found.config.format == NEWEST_FORMAT

    @pytest.mark.parametrize("saw", ["upgrade", "read", "write"])
    def test_a_machine_that_saw_the_new_format_refuses_the_old_one(
        self, encrypted: Path, saw: str
    ) -> None:
        before = config_of(encrypted)
        options = OpenOptions(unlock, sync=False)
        if saw == "upgrade":
            upgrade_repository(encrypted)
        else:
            (encrypted / "config").write_bytes(with_format(before, NEWEST_FORMAT))
            if saw == "read":
                open_for_reading(encrypted, options).close()
            else:
                open_for_writing(encrypted, "test", options).close()
        (encrypted / "config").write_bytes(before)
        for open_it in (
            lambda: open_for_writing(encrypted, "test", options),
            lambda: open_for_reading(encrypted, options),
            lambda: upgrade_repository(encrypted),
        ):
            with pytest.raises(TrustError, match=r"had format 2 .* has format 1 now"):
                open_it()

    def test_an_upgrade_refuses_a_configuration_that_the_storage_changed(
        self, encrypted: Path
    ) -> None:
        data = config_of(encrypted).replace(b'"tree_seed": 0', b'"tree_seed": 1')
        text = data[: data.rindex(b"blake3 ")]
        changed = text + b"blake3 %s\n" % digest_of(text).hex().encode()
        assert decode_config(changed, "").tree_seed == 1
        (encrypted / "config").write_bytes(changed)
        with pytest.raises(TrustError, match="was changed since"):
            upgrade_repository(encrypted)
        assert config_of(encrypted) == changed

    def test_the_digest_of_the_configuration_before_and_after_an_upgrade_is_expected(
        self, root: Path
    ) -> None:
        before = digest_of(config_of(root)).hex()
        upgrade_repository(root)
        after = digest_of(config_of(root)).hex()
        for digest in (before, after):
            open_for_reading(LocalPlace(root, digest)).close()
        with pytest.raises(TrustError, match=after):
            open_for_reading(LocalPlace(root, "0" * 64))
