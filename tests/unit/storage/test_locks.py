"""Locks: shared locks coexist, an exclusive lock excludes others, and dead processes hold none."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from casfs.errors import LockedError, RefusedError, StorageError
from casfs.storage.base import Locks
from casfs.storage.locks import (
    FolderLocks,
    LockMode,
    RepositoryLock,
    list_and_reap_locks,
    remove_stale_temporaries,
)
from tests.support.other_user import OTHER_USER, needs_root
from tests.support.stores import child, read_line

SHARED, TENDING, EXCLUSIVE = LockMode.SHARED, LockMode.MAINTENANCE, LockMode.EXCLUSIVE

HOLDER = """
import sys
from pathlib import Path
from casfs.storage.locks import LockMode, RepositoryLock

root = Path(sys.argv[1])
lock = RepositoryLock.acquire(root / "locks", "backup", LockMode(sys.argv[2]))
(root / "tmp" / f"{lock.name}.0").write_bytes(b"half a pack")
print(lock.name, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "tmp").mkdir(parents=True)
    return tmp_path / "root"


@pytest.fixture
def folder(root: Path) -> Path:
    return root / "locks"


@pytest.fixture
def held(folder: Path) -> Iterator[list[RepositoryLock]]:
    """Locks that are given back at the end of the test."""
    locks: list[RepositoryLock] = []
    yield locks
    for lock in locks:
        lock.release()


def test_shared_locks_do_not_exclude_each_other(folder: Path, held: list[RepositoryLock]) -> None:
    held += [RepositoryLock.acquire(folder, "backup") for _ in range(3)]
    assert len({lock.name for lock in held}) == 3
    assert set(list_and_reap_locks(folder)) == {lock.name for lock in held}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (EXCLUSIVE, EXCLUSIVE),
        (EXCLUSIVE, SHARED),
        (EXCLUSIVE, TENDING),
        (SHARED, EXCLUSIVE),
        (TENDING, EXCLUSIVE),
        (TENDING, TENDING),
    ],
)
def test_conflicting_locks_are_refused_and_the_error_names_the_holder(
    folder: Path, held: list[RepositoryLock], first: LockMode, second: LockMode
) -> None:
    held.append(RepositoryLock.acquire(folder, "prune", first))
    with pytest.raises(LockedError) as caught:
        RepositoryLock.acquire(folder, "backup", second)
    assert f"prune on {socket.gethostname()}, process {os.getpid()}" in str(caught.value)
    assert caught.value.exit_code == 6
    assert os.listdir(folder) == [held[0].name]


@pytest.mark.parametrize("other", LockMode)
def test_readers_conflict_with_no_other_lock(
    folder: Path, held: list[RepositoryLock], other: LockMode
) -> None:
    held.append(RepositoryLock.acquire(folder, "mount", LockMode.READER))
    held.append(RepositoryLock.acquire(folder, "other", other))
    held.append(RepositoryLock.acquire(folder, "mount", LockMode.READER))
    assert set(list_and_reap_locks(folder)) == {lock.name for lock in held}


def test_a_maintenance_lock_and_shared_locks_coexist_in_any_order(
    folder: Path, held: list[RepositoryLock]
) -> None:
    held.append(RepositoryLock.acquire(folder, "backup", SHARED))
    held.append(RepositoryLock.acquire(folder, "prune", TENDING))
    held.append(RepositoryLock.acquire(folder, "backup", SHARED))
    assert len(list_and_reap_locks(folder)) == 3


def test_a_released_lock_is_gone(folder: Path) -> None:
    with RepositoryLock.acquire(folder, "prune", EXCLUSIVE) as lock:
        assert os.listdir(folder) == [lock.name]
    lock.release()
    assert os.listdir(folder) == []
    RepositoryLock.acquire(folder, "prune", EXCLUSIVE).release()


def test_a_lock_file_names_its_holder(folder: Path, held: list[RepositoryLock]) -> None:
    held.append(RepositoryLock.acquire(folder, "backup"))
    record = list_and_reap_locks(folder)[held[0].name]
    assert (record.mode, record.verb, record.pid) == (SHARED, "backup", os.getpid())


def test_a_lock_file_without_a_holder_is_removed_whatever_it_contains(folder: Path) -> None:
    folder.mkdir()
    (folder / "00000000000000de").write_text(
        '{"mode":"exclusive","verb":"prune","host":"h","pid":1,"time":0}'
    )
    (folder / ".00000000000000ff").write_bytes(b"\xff\0")
    RepositoryLock.acquire(folder, "backup").release()
    assert os.listdir(folder) == []


def test_a_held_lock_file_without_content_counts_as_exclusive(folder: Path) -> None:
    folder.mkdir()
    with open(folder / "0000000000000011", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(LockedError, match="another command"):
            RepositoryLock.acquire(folder, "backup")
    RepositoryLock.acquire(folder, "backup").release()


def test_a_lock_that_was_recreated_meanwhile_is_not_removed(
    folder: Path, held: list[RepositoryLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    held.append(RepositoryLock.acquire(folder, "backup"))
    path = folder / held[0].name
    flock = fcntl.flock

    def flock_of_the_file_that_was_there_before(fd: int, operation: int) -> None:
        # As if this had been opened just before another process removed it for being stale.
        monkeypatch.setattr(fcntl, "flock", flock)
        other = os.open(folder / "gone", os.O_RDWR | os.O_CREAT)
        os.dup2(other, fd)
        os.close(other)
        os.unlink(folder / "gone")
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock_of_the_file_that_was_there_before)
    list_and_reap_locks(folder)
    assert path.exists()
    assert set(list_and_reap_locks(folder)) == {held[0].name}


def test_a_lock_is_not_visible_before_it_has_its_content(
    folder: Path, held: list[RepositoryLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two backups that begin at the same moment do not take each other for something strict."""
    pwrite = os.pwrite

    def look_first(fd: int, data: bytes, offset: int) -> int:
        monkeypatch.setattr(os, "pwrite", pwrite)
        held.append(RepositoryLock.acquire(folder, "backup"))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", look_first)
    held.append(RepositoryLock.acquire(folder, "backup"))
    assert set(list_and_reap_locks(folder)) == {lock.name for lock in held}
    assert len(os.listdir(folder)) == 2


def test_a_lock_file_removed_as_stale_during_its_creation_is_created_again(
    folder: Path, held: list[RepositoryLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def flock_of_a_slow_process(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        for path in folder.iterdir():
            path.unlink()
        flock(fd, operation)

    folder.mkdir()
    monkeypatch.setattr(fcntl, "flock", flock_of_a_slow_process)
    held.append(RepositoryLock.acquire(folder, "backup"))
    assert os.listdir(folder) == [held[0].name]
    assert set(list_and_reap_locks(folder)) == {held[0].name}


@pytest.mark.parametrize("kind", ["shared", "exclusive"])
def test_a_lock_lives_as_long_as_its_process(root: Path, folder: Path, kind: str) -> None:
    with child(HOLDER, root, kind) as process:
        name = read_line(process)
        assert set(list_and_reap_locks(folder)) == {name}
        with pytest.raises(LockedError, match=f"process {process.pid}"):
            RepositoryLock.acquire(folder, "prune", EXCLUSIVE)
        process.kill()
        process.wait()
        assert (folder / name).exists()
        RepositoryLock.acquire(folder, "prune", EXCLUSIVE).release()
    assert not (folder / name).exists()


def test_temporary_files_live_exactly_as_long_as_their_writer(
    root: Path, folder: Path, held: list[RepositoryLock]
) -> None:
    held.append(RepositoryLock.acquire(folder, "backup"))
    own = f"{held[0].name}.7"
    (root / "tmp" / own).write_bytes(b"")
    (root / "tmp" / "0123456789abcdef.0").write_bytes(b"left by a crash")
    (root / "tmp" / "not ours").write_bytes(b"")
    with child(HOLDER, root, "shared") as process:
        name = read_line(process)
        remove_stale_temporaries(root)
        assert set(os.listdir(root / "tmp")) == {own, f"{name}.0", "not ours"}
        process.kill()
        process.wait()
        remove_stale_temporaries(root)
        assert set(os.listdir(root / "tmp")) == {own, "not ours"}


def test_removing_stale_files_of_an_empty_folder_is_no_error(root: Path) -> None:
    remove_stale_temporaries(root)
    (root / "tmp").rmdir()
    remove_stale_temporaries(root)


def test_a_folder_without_lock_support_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "locks").write_bytes(b"a file")
    with pytest.raises(StorageError, match="write a lock"):
        RepositoryLock.acquire(tmp_path / "locks", "backup")


def test_locks_that_cannot_be_read_are_a_storage_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int) -> list[str]:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", refuse)
        with pytest.raises(StorageError, match="read the locks"):
            RepositoryLock.acquire(folder, "backup")
    assert os.listdir(folder) == []


def test_a_lock_is_released_in_the_folder_in_which_it_was_acquired(
    tmp_path: Path, root: Path, folder: Path
) -> None:
    lock = RepositoryLock.acquire(folder, "backup")
    moved, victim = tmp_path / "moved", tmp_path / "victim"
    (victim / "locks").mkdir(parents=True)
    (victim / "locks" / lock.name).write_bytes(b"precious")
    root.rename(moved)
    root.symlink_to(victim)
    lock.release()
    assert (victim / "locks" / lock.name).read_bytes() == b"precious"
    assert os.listdir(moved / "locks") == []


@needs_root
@pytest.mark.parametrize("name", ["", "locks", "tmp"])
def test_locks_and_temporaries_in_folders_of_another_user_are_refused(
    root: Path, folder: Path, name: str
) -> None:
    RepositoryLock.acquire(folder, "backup").release()
    left = [folder / "00000000000000ff", root / "tmp" / "00000000000000ff.0"]
    for path in left:
        path.touch()
    os.chown(root / name, OTHER_USER, OTHER_USER)
    uses: list[Callable[[], object]] = [lambda: remove_stale_temporaries(root)]
    if name != "tmp":
        uses += [
            lambda: RepositoryLock.acquire(folder, "backup"),
            lambda: list_and_reap_locks(folder),
        ]
    for use in uses:
        with pytest.raises(RefusedError, match="--allow-foreign-repository"):
            use()
    assert all(path.exists() for path in left)


class TestFolderLocks:
    """The contract that the layers above use, `casfs.storage.base.Locks`."""

    def test_a_lock_is_listed_until_it_is_released(self, tmp_path: Path) -> None:
        locks: Locks = FolderLocks(tmp_path / "locks")
        assert locks.held() == {}
        with locks.acquire("backup", LockMode.SHARED, "here") as lock:
            (record,) = locks.held().values()
            assert (record.verb, record.host, lock.mode) == ("backup", "here", LockMode.SHARED)
            assert locks.reap().keys() == {lock.name}
            with pytest.raises(LockedError, match="backup on here"):
                locks.acquire("repair index", LockMode.EXCLUSIVE)
        assert locks.held() == {}

    def test_a_list_changes_nothing_and_a_reaped_one_removes_what_the_dead_left(
        self, tmp_path: Path
    ) -> None:
        stale = tmp_path / "locks" / "0123456789abcdef"
        stale.parent.mkdir()
        stale.write_text("{}")
        locks = FolderLocks(stale.parent)
        assert locks.held() == {} and stale.exists()
        assert locks.reap() == {} and not stale.exists()

    def test_locks_that_cannot_be_read_are_an_error_of_the_storage(self, tmp_path: Path) -> None:
        (tmp_path / "locks").write_text("no folder")
        locks = FolderLocks(tmp_path / "locks")
        with pytest.raises(StorageError):
            locks.held()
        with pytest.raises(StorageError):
            locks.reap()
