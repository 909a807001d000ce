"""The storage: objects appear whole or not at all, and durable before they have their name."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from casfs.errors import NotFoundError, StorageError
from casfs.storage.local import LocalStorage
from tests.support.stores import noise

Step = tuple[str, str]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("packs", "snapshots", "tmp"):
        (tmp_path / folder).mkdir()
    return tmp_path


@pytest.fixture
def storage(root: Path) -> LocalStorage:
    return LocalStorage(root, writer="me", sync=False)


def temporaries(root: Path) -> list[str]:
    return sorted(os.listdir(root / "tmp"))


def open_descriptors() -> int:
    gc.collect()  # storages of earlier tests close their folders
    return len(os.listdir("/proc/self/fd"))


def watch(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Record what is synced and renamed, as the kernel is asked for it."""
    steps: list[Step] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        kind = "folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "data"
        steps.append((f"sync {kind}", Path(path).name))
        fsync(fd)

    def watched_rename(source: Any, target: Any, **folders: int) -> None:
        steps.append(("rename", Path(target).name))
        rename(source, target, **folders)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    return steps


class TestObjects:
    def test_an_object_is_read_whole_or_in_parts(self, storage: LocalStorage) -> None:
        storage.write("snapshots/a", b"0123456789")
        assert storage.read("snapshots/a") == b"0123456789"
        assert storage.read("snapshots/a", 3) == b"3456789"
        assert storage.read("snapshots/a", 3, 4) == b"3456"
        assert storage.read("snapshots/a", 8, 10) == b"89"
        assert storage.read("snapshots/a", 20, 10) == b""
        assert storage.size("snapshots/a") == 10

    def test_a_missing_object_differs_from_an_empty_one(self, storage: LocalStorage) -> None:
        storage.write("snapshots/empty", b"")
        assert storage.read("snapshots/empty") == b""
        with pytest.raises(NotFoundError):
            storage.read("snapshots/none")
        with pytest.raises(NotFoundError):
            storage.size("snapshots/none")

    def test_objects_are_listed_by_name_at_any_depth(self, storage: LocalStorage) -> None:
        for name in ("packs/bb/two", "packs/aa/one", "packs/aa/three", "packs/loose"):
            storage.write(name, name.encode())
        assert [(one.name, one.size) for one in storage.list("packs")] == [
            (name, len(name))
            for name in ("packs/aa/one", "packs/aa/three", "packs/bb/two", "packs/loose")
        ]
        assert list(storage.list("nothing here")) == []

    def test_an_object_is_replaced_as_a_whole_even_for_open_readers(
        self, storage: LocalStorage
    ) -> None:
        storage.write("snapshots/a", b"before")
        assert storage.read("snapshots/a") == b"before"
        storage.write("snapshots/a", b"behind")
        assert storage.read("snapshots/a") == b"behind"

    def test_a_deleted_object_is_gone_and_may_be_deleted_again(self, storage: LocalStorage) -> None:
        storage.write("snapshots/a", b"x")
        storage.read("snapshots/a")
        storage.delete("snapshots/a")
        storage.delete("snapshots/a")
        with pytest.raises(NotFoundError):
            storage.read("snapshots/a")

    def test_an_unreadable_location_is_a_storage_error(
        self, storage: LocalStorage, root: Path
    ) -> None:
        (root / "snapshots" / "file").write_bytes(b"")
        with pytest.raises(StorageError, match="cannot list"):
            list(storage.list("snapshots/file"))
        with pytest.raises(StorageError, match="cannot read"):
            storage.read("snapshots", 0, 10)
        with pytest.raises(StorageError):
            storage.size("snapshots/file/below")
        with pytest.raises(StorageError, match="cannot delete"):
            storage.delete("packs")


class TestObjectWriter:
    @pytest.mark.parametrize("in_memory", [False, True])
    def test_an_object_writer_publishes_what_was_appended_under_the_committed_name(
        self, storage: LocalStorage, root: Path, in_memory: bool
    ) -> None:
        parts = [noise("one", 10), b"", noise("two", 9_000_000), noise("three", 7)]
        spool = storage.open_writer(in_memory)
        for part in parts:
            spool.append(bytearray(part))
        assert list(storage.list("packs")) == []
        assert bool(temporaries(root)) is not in_memory
        spool.commit("packs/ab/cd")
        spool.discard()
        assert storage.read("packs/ab/cd") == b"".join(parts)
        assert temporaries(root) == []

    @pytest.mark.parametrize("in_memory", [False, True])
    def test_a_discarded_object_writer_leaves_nothing(
        self, storage: LocalStorage, root: Path, in_memory: bool
    ) -> None:
        assert list(storage.list("packs")) == []  # from now on its folder is open
        before = open_descriptors()
        spool = storage.open_writer(in_memory)
        spool.append(b"something")
        spool.discard()
        spool.discard()
        assert temporaries(root) == []
        assert open_descriptors() == before

    def test_a_temporary_name_begins_with_its_writer(
        self, storage: LocalStorage, root: Path
    ) -> None:
        spools = [storage.open_writer(in_memory=False) for _ in range(3)]
        for spool in spools:
            spool.append(b"x")
        assert [name.partition(".")[0] for name in temporaries(root)] == ["me"] * 3
        for spool in spools:
            spool.discard()

    def test_an_object_writer_continues_after_a_short_write(
        self, storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data[:1000])))
        data = noise("in parts", 12_345)
        storage.write("snapshots/a", data)
        monkeypatch.undo()
        assert storage.read("snapshots/a") == data


class TestStorageFailure:
    """Every disk error is one clear error, and no name leads to a partial object."""

    @staticmethod
    def failing(code: int) -> Callable[..., int]:
        def fail(*arguments: object, **folders: int) -> int:
            raise OSError(code, os.strerror(code))

        return fail

    @pytest.mark.parametrize("in_memory", [False, True])
    @pytest.mark.parametrize(
        ("call", "code"),
        [("write", errno.ENOSPC), ("fsync", errno.EIO), ("rename", errno.EDQUOT)],
    )
    def test_a_failed_write_leaves_neither_a_name_nor_a_temporary_file(
        self,
        root: Path,
        monkeypatch: pytest.MonkeyPatch,
        in_memory: bool,
        call: str,
        code: int,
    ) -> None:
        storage = LocalStorage(root, writer="me")
        assert list(storage.list("packs")) == []  # from now on its folder is open
        before = open_descriptors()
        with monkeypatch.context() as patch:
            patch.setattr(os, call, self.failing(code))
            spool = storage.open_writer(in_memory)
            with pytest.raises(StorageError) as caught:
                spool.append(b"data")
                spool.commit("packs/ab/cd")
            spool.discard()
        assert caught.value.cause.errno == code
        assert os.strerror(code) in str(caught.value)
        assert list(storage.list("packs")) == []
        assert temporaries(root) == []
        assert open_descriptors() == before

    def test_a_disk_that_accepts_no_bytes_is_a_storage_error(
        self, storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "write", lambda fd, data: 0)
        with pytest.raises(StorageError, match="cannot write"):
            storage.write("snapshots/a", b"x")

    def test_a_missing_folder_is_named_in_the_error(
        self, storage: LocalStorage, root: Path
    ) -> None:
        shutil.rmtree(root)
        with pytest.raises(StorageError, match=r"cannot create .*/tmp/me\.0"):
            storage.write("snapshots/a", b"x")


class TestDurabilityOrder:
    def test_an_object_is_synced_before_its_rename_and_its_folder_after(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps = watch(monkeypatch)
        LocalStorage(root, writer="me").write("snapshots/a", b"x")
        assert steps == [("sync data", "me.0"), ("rename", "a"), ("sync folder", "snapshots")]

    def test_a_new_folder_is_durable_before_anything_is_in_it(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        storage = LocalStorage(root, writer="me")
        steps = watch(monkeypatch)
        storage.write("packs/ab/one", b"x")
        assert steps == [
            ("sync data", "me.0"),
            ("sync folder", "packs"),
            ("rename", "one"),
            ("sync folder", "ab"),
        ]
        steps.clear()
        storage.write("packs/ab/two", b"x")
        assert [step for step, _ in steps] == ["sync data", "rename", "sync folder"]

    def test_a_deletion_is_durable_too(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        storage = LocalStorage(root, writer="me")
        storage.write("snapshots/a", b"x")
        steps = watch(monkeypatch)
        storage.delete("snapshots/a")
        assert steps == [("sync folder", "snapshots")]

    def test_every_durable_step_is_announced_before_it_happens(self, root: Path) -> None:
        seen: list[tuple[str, bool]] = []
        storage = LocalStorage(
            root,
            sync=False,
            on_step=lambda step: seen.append((step, (root / "snapshots/a").exists())),
        )
        storage.write("snapshots/a", b"x")
        storage.delete("snapshots/a")
        assert seen == [
            ("data snapshots", False),
            ("rename snapshots", False),
            ("folder snapshots", True),
            ("done snapshots", True),
            ("unlink snapshots", True),
            ("folder snapshots", False),
            ("done snapshots", False),
        ]

    def test_without_sync_nothing_is_synced(
        self, storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps = watch(monkeypatch)
        storage.write("packs/ab/one", b"x")
        assert steps == [("rename", "one")]


class TestObjectReaders:
    def test_readers_keep_a_bounded_number_of_objects_open(self, storage: LocalStorage) -> None:
        names = [f"packs/x/{number:03}" for number in range(150)]
        for name in names:
            storage.write(name, name.encode())
        storage.close()
        before = open_descriptors()
        for name in names * 2:
            assert storage.read(name) == name.encode()
        assert open_descriptors() <= before + 1 + 64
        storage.close()
        assert open_descriptors() == before
        assert storage.read(names[0]) == names[0].encode()
        storage.close()

    def test_concurrent_readers_see_every_object_as_it_is(self, storage: LocalStorage) -> None:
        names = [f"packs/x/{number:03}" for number in range(100)]
        for name in names:
            storage.write(name, name.encode() * 50)
        storage.close()
        before = open_descriptors()
        wrong: list[str] = []

        def read(first: int) -> None:
            for step in range(1500):
                name = names[(first + step * 7) % len(names)]
                if storage.read(name, 7, 30) != (name.encode() * 50)[7:37]:
                    wrong.append(name)

        threads = [threading.Thread(target=read, args=(start,)) for start in (0, 33, 66)]
        for thread in threads:
            thread.start()
        for number in range(300):
            storage.write(names[number % len(names)], names[number % len(names)].encode() * 50)
        for thread in threads:
            thread.join()
        assert wrong == []
        storage.close()
        assert open_descriptors() == before

    def test_a_nonblocking_read_returns_cached_bytes_or_nothing(
        self, storage: LocalStorage
    ) -> None:
        storage.write("packs/a", b"0123456789")
        assert storage.read_nonblocking("packs/a", 2, 3) is None
        storage.read("packs/a")
        assert storage.read_nonblocking("packs/a", 2, 3) in (b"234", None)
        assert storage.read_nonblocking("packs/a", 8, 3) is None
        assert storage.read_nonblocking("packs/none", 0, 1) is None

    def test_a_prefetch_of_a_missing_object_does_no_harm(self, storage: LocalStorage) -> None:
        storage.write("packs/a", b"0123456789")
        storage.prefetch("packs/a", 0, 10)
        storage.prefetch("packs/none", 0, 10)
        assert storage.read("packs/a") == b"0123456789"


def test_a_folder_that_was_deleted_and_restored_is_opened_again(
    root: Path, storage: LocalStorage, tmp_path: Path
) -> None:
    storage.create("packs/ab", b"content")
    copy = root.with_name("copy")
    shutil.copytree(root, copy)
    assert storage.size("packs/ab") == 7
    shutil.rmtree(root)
    with pytest.raises(NotFoundError):
        storage.size("packs/ab")
    copy.rename(root)
    assert storage.size("packs/ab") == 7
    assert [name for name, _, _ in storage.list("packs")] == ["packs/ab"]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOTCONN, errno.EIO])
def test_a_folder_whose_file_system_went_away_and_came_back_is_opened_again(
    root: Path, storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    storage.create("packs/ab", b"content")
    root.rename(root.with_name("gone"))
    assert storage.size("packs/ab") == 7  # by its descriptor

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("casfs.storage.folder.os.stat", fail)
        with pytest.raises(StorageError):
            storage.size("packs/ab")
    with pytest.raises(NotFoundError):
        storage.size("packs/ab")
    root.with_name("gone").rename(root)
    assert storage.size("packs/ab") == 7


def test_a_signal_while_a_folder_is_being_made_leaves_no_second_error(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    dropped: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", dropped.append)
    monkeypatch.setattr("casfs.storage.folder.threading", SimpleNamespace(Lock=interrupt))
    with pytest.raises(KeyboardInterrupt):
        LocalStorage(root)
    gc.collect()
    assert dropped == []
