"""A repository in a folder that another user can write: what that user puts there harms no other user."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from casfs.errors import CasfsError, RefusedError
from casfs.repository.opening import OpenOptions, open_for_reading, open_for_writing
from casfs.storage.folder import ALLOW_FOREIGN_VARIABLE, Folder
from casfs.storage.local import LocalStorage
from casfs.storage.locks import list_and_reap_locks, remove_stale_temporaries
from casfs.storage.reserve import RESERVE_FILE, allocate_reserve
from casfs.user_dirs import cached_index_dir, index_dir
from tests.support.builders import RepositoryFixture
from tests.support.other_user import OTHER_USER, needs_root

LOCK = "0123456789abcdef"


class Trap:
    """A repository, and files beside it that its owner wants to have destroyed by others."""

    def __init__(self, folder: Path) -> None:
        self.repo = RepositoryFixture(folder)
        self.repo.publish({b"f": b"content"})
        self.root = self.repo.root
        self.victim = folder / "victim"
        self.victim.mkdir()
        for name in (LOCK, f"{LOCK}.0", "passwd"):
            (self.victim / name).write_bytes(b"precious")

    def plant(self, name: str, target: Path) -> None:
        """Put a symlink in the place of an entry of the repository."""
        planted = self.root / name
        if planted.exists():
            planted.rename(self.root / f"was {planted.name}")
        planted.symlink_to(target)

    def is_harmless(self) -> bool:
        found = {path.name: path.read_bytes() for path in self.victim.iterdir()}
        return found == dict.fromkeys((LOCK, f"{LOCK}.0", "passwd"), b"precious")


@pytest.fixture
def trap(tmp_path: Path) -> Trap:
    return Trap(tmp_path)


def read(root: Path) -> None:
    open_for_reading(root, reader="ls").close()


def write(root: Path) -> None:
    open_for_writing(root, "backup", OpenOptions(sync=False)).close()


@pytest.mark.parametrize("use", [read, write])
@pytest.mark.parametrize("folder", ["locks", "tmp"])
def test_a_symlink_in_the_place_of_a_folder_removes_nothing_elsewhere(
    trap: Trap, folder: str, use: Callable[[Path], None]
) -> None:
    trap.plant(folder, trap.victim)
    try:
        use(trap.root)
    except CasfsError:
        pass
    assert trap.is_harmless()


def test_only_files_with_the_names_of_locks_and_temporaries_are_removed(trap: Trap) -> None:
    for folder in ("locks", "tmp"):
        (trap.root / folder / "a file of somebody").write_bytes(b"")
    list_and_reap_locks(trap.root / "locks")
    remove_stale_temporaries(trap.root)
    for folder in ("locks", "tmp"):
        assert (trap.root / folder / "a file of somebody").exists()


def test_a_symlink_in_the_place_of_a_lock_is_neither_followed_nor_removed(trap: Trap) -> None:
    (trap.root / "locks" / LOCK).symlink_to(trap.victim / "passwd")
    assert list_and_reap_locks(trap.root / "locks") == {}
    assert trap.is_harmless()


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_in_the_place_of_the_reserve_extends_no_other_file(
    trap: Trap, link: Callable[[Path, Path], None]
) -> None:
    (trap.root / RESERVE_FILE).unlink(missing_ok=True)
    link(trap.victim / "passwd", trap.root / RESERVE_FILE)
    allocate_reserve(trap.root)
    assert trap.is_harmless()


@pytest.mark.parametrize("name", ["locks/" + LOCK, "snapshots/" + "0" * 64, "packs/00", "config"])
def test_a_fifo_in_a_repository_hangs_no_reader(trap: Trap, name: str) -> None:
    planted = trap.root / name
    if planted.exists():
        planted.rename(trap.root / "was there")
    os.mkfifo(planted)

    def use() -> None:
        try:
            with open_for_reading(trap.root, reader="ls") as repository:
                list(repository.snapshots.iterate())
        except CasfsError:
            pass

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(timeout=60)
    is_hanging = thread.is_alive()
    if is_hanging:
        os.close(os.open(planted, os.O_RDWR))  # a reader that waits gets an end of file
        thread.join()
    assert not is_hanging


@pytest.mark.parametrize("name", ["packs", "packs/ab"])
def test_objects_are_not_written_through_a_symlink(tmp_path: Path, name: str) -> None:
    root, victim = tmp_path / "root", tmp_path / "victim"
    for folder in (root / "tmp", root / "packs", victim):
        folder.mkdir(parents=True)
    if name == "packs":
        (root / "packs").rmdir()
    (root / name).symlink_to(victim)
    storage = LocalStorage(root, sync=False)
    with pytest.raises(CasfsError):
        storage.write("packs/ab/object", b"data")
    with pytest.raises(CasfsError):
        storage.read("packs/ab/object")
    storage.close()
    assert list(victim.iterdir()) == []


def test_a_symlink_in_the_place_of_an_object_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "packs").mkdir()
    (tmp_path / "outside").write_bytes(b"secret")
    (tmp_path / "packs" / "object").symlink_to(tmp_path / "outside")
    storage = LocalStorage(tmp_path)
    with pytest.raises(CasfsError, match="symlink"):
        storage.read("packs/object")
    storage.close()


def test_a_folder_that_is_replaced_while_it_is_used_stays_the_one_that_was_opened(
    tmp_path: Path,
) -> None:
    root = tmp_path / "root"
    for folder in (root / "tmp", root / "packs", tmp_path / "other" / "packs"):
        folder.mkdir(parents=True)
    storage = LocalStorage(root, sync=False)
    storage.write("packs/one", b"1")
    root.rename(tmp_path / "moved")
    (tmp_path / "other").rename(root)
    storage.write("packs/two", b"2")
    storage.close()
    assert sorted(os.listdir(tmp_path / "moved" / "packs")) == ["one", "two"]
    assert os.listdir(root / "packs") == []


@needs_root
class TestOwners:
    @pytest.mark.parametrize("name", ["", "packs", "snapshots"])
    def test_a_folder_of_another_user_is_refused_unless_the_user_allows_it(
        self, trap: Trap, name: str, monkeypatch: pytest.MonkeyPatch, own_home: Path
    ) -> None:
        os.chown(trap.root / name, OTHER_USER, OTHER_USER)

        def use() -> None:
            with open_for_reading(trap.root) as repository:
                assert len(list(repository.snapshots.iterate())) == 1

        with pytest.raises(RefusedError, match="--allow-foreign-repository"):
            use()
        monkeypatch.setenv(ALLOW_FOREIGN_VARIABLE, "1")
        use()

    @pytest.mark.parametrize("case", ["owner", "writable", "index owner", "index symlink"])
    def test_the_index_is_in_the_own_cache_where_others_can_change_the_repository(
        self, trap: Trap, case: str, own_home: Path
    ) -> None:
        assert index_dir(trap.root, "id") == trap.root / "index"
        if case == "owner":
            os.chown(trap.root, OTHER_USER, OTHER_USER)
        elif case == "writable":
            trap.root.chmod(0o777)
        elif case == "index owner":
            os.chown(trap.root / "index", OTHER_USER, OTHER_USER)
        else:
            trap.plant("index", trap.victim)
        assert index_dir(trap.root, "id").is_relative_to(own_home / "cache")

    def test_a_planted_lock_file_of_lmdb_is_not_opened(
        self, trap: Trap, monkeypatch: pytest.MonkeyPatch, own_home: Path
    ) -> None:
        (trap.root / "index" / "lock.mdb").unlink()
        (trap.root / "index" / "lock.mdb").symlink_to(trap.victim / "passwd")
        os.chown(trap.root, OTHER_USER, OTHER_USER)
        monkeypatch.setenv(ALLOW_FOREIGN_VARIABLE, "1")
        write(trap.root)
        assert trap.is_harmless()


def test_a_cache_folder_that_others_can_write_is_refused(own_home: Path) -> None:
    before = os.umask(0)
    try:
        parent = cached_index_dir("id").parent
    finally:
        os.umask(before)
    for folder in (parent, parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        folder.chmod(0o777)
        with pytest.raises(RefusedError, match="XDG_CACHE_HOME"):
            cached_index_dir("id")
        folder.chmod(0o700)


def test_folders_that_a_repository_creates_are_not_writable_by_all(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Folder(tmp_path).make("packs/ab")
    finally:
        os.umask(before)
    assert not stat.S_IMODE((tmp_path / "packs" / "ab").stat().st_mode) & stat.S_IWOTH
