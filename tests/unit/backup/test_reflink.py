"""When a file is cloned, and what happens where it cannot be."""

from __future__ import annotations

import errno
import os
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from casfs.backup import reflink
from casfs.backup.reflink import Freeze, Reflinker
from casfs.errors import ReflinkError

SECOND = 1_000_000_000
NOW = 1_700_000_000 * SECOND


def st(size: int, age_ns: int, device: int = 7) -> os.stat_result:
    """Return metadata of a file that was written so long ago."""
    found = types.SimpleNamespace(
        st_size=size, st_mtime_ns=NOW - age_ns, st_ctime_ns=NOW - age_ns, st_dev=device
    )
    return found  # type: ignore[return-value]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """A directory and a file in it."""
    (tmp_path / "file").write_bytes(b"content")
    folder, file = os.open(tmp_path, os.O_RDONLY), os.open(tmp_path / "file", os.O_RDONLY)
    yield folder, file
    os.close(file)
    os.close(folder)


class Clones:
    """A double of the kernel: each clone fails with the error that is set, or is counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: int | None = None
        self.tried = 0
        monkeypatch.setattr(reflink, "_clone", self._clone)

    def _clone(self, dir_fd: int, fd: int) -> int:
        self.tried += 1
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        return os.dup(fd)


@pytest.fixture
def clones(monkeypatch: pytest.MonkeyPatch) -> Clones:
    return Clones(monkeypatch)


@pytest.mark.parametrize(
    ("size", "age_ns", "is_due"),
    [
        (0, 1_000_000, True),
        (0, SECOND, False),
        (1 << 20, SECOND // 4, True),
        (1 << 20, SECOND, False),
        (1 << 30, 300 * SECOND, True),
        (1 << 30, 3600 * SECOND, False),
        (100 << 30, 10 * 3600 * SECOND, True),
        (100 << 30, 30 * 24 * 3600 * SECOND, False),
    ],
)
def test_a_file_is_cloned_at_once_when_it_was_written_recently_for_its_size(
    size: int, age_ns: int, is_due: bool
) -> None:
    assert Reflinker(Freeze.AUTO).should_clone(st(size, age_ns), NOW) is is_due
    assert Reflinker(Freeze.NEVER).should_clone(st(size, age_ns), NOW) is False
    assert Reflinker(Freeze.REQUIRE).should_clone(st(size, age_ns), NOW) is (size > 0)


def test_a_reflinker_never_clones_where_clones_are_switched_off(
    opened: tuple[int, int], clones: Clones
) -> None:
    assert Reflinker(Freeze.NEVER).clone(*opened, st(7, 0)) is None
    assert clones.tried == 0


@pytest.mark.parametrize("mode", [Freeze.AUTO, Freeze.REQUIRE])
def test_a_clone_that_can_be_made_is_returned(
    opened: tuple[int, int], clones: Clones, mode: Freeze
) -> None:
    clone = Reflinker(mode).clone(*opened, st(7, 0))
    assert clone is not None
    assert os.read(clone, 100) == b"content"
    os.close(clone)


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.ENOTTY, errno.EISDIR])
def test_a_file_system_that_knows_no_clones_is_asked_once(
    opened: tuple[int, int], clones: Clones, error: int
) -> None:
    freezer = Reflinker(Freeze.AUTO)
    clones.error = error
    for _ in range(3):
        assert freezer.clone(*opened, st(7, 0)) is None
    assert clones.tried == 1
    assert not freezer.should_clone(st(7, 0), NOW)
    clones.error = None
    clone = freezer.clone(*opened, st(7, 0, device=8))
    assert clone is not None, "another file system may know clones"
    os.close(clone)


@pytest.mark.parametrize(
    "error",
    [
        *(errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EXDEV),
        *(errno.EINVAL, errno.EPERM, errno.ETXTBSY, errno.ENOENT),
    ],
)
def test_a_file_that_cannot_be_cloned_does_not_stop_clones_of_others(
    opened: tuple[int, int], clones: Clones, error: int
) -> None:
    freezer = Reflinker(Freeze.AUTO)
    clones.error = error
    assert freezer.clone(*opened, st(7, 0)) is None
    clones.error = None
    clone = freezer.clone(*opened, st(7, 0))
    assert clone is not None
    os.close(clone)


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EROFS, errno.ENOENT])
def test_a_clone_that_is_required_and_cannot_be_made_is_an_error_for_each_file(
    opened: tuple[int, int], clones: Clones, error: int
) -> None:
    freezer = Reflinker(Freeze.REQUIRE)
    clones.error = error
    for number in (1, 2):
        with pytest.raises(ReflinkError) as caught:
            freezer.clone(*opened, st(7, 0))
        assert caught.value.errno == error
        assert not isinstance(caught.value, FileNotFoundError), "the file has not vanished"
        assert clones.tried == number


def test_no_clone_is_made_where_writers_could_run_out_of_space_for_it(
    opened: tuple[int, int], clones: Clones
) -> None:
    disk = os.fstatvfs(opened[1])
    too_large = disk.f_bavail * disk.f_frsize + (1 << 40)
    assert Reflinker(Freeze.AUTO).clone(*opened, st(too_large, 0)) is None
    assert clones.tried == 0
    clone = Reflinker(Freeze.REQUIRE).clone(*opened, st(too_large, 0))
    assert clone is not None
    os.close(clone)


def test_a_failed_clone_leaves_no_descriptor_open(
    opened: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "refused")

    monkeypatch.setattr("fcntl.ioctl", refuse)
    before = os.listdir("/proc/self/fd")
    assert Reflinker(Freeze.AUTO).clone(*opened, os.fstat(opened[1])) is None
    assert os.listdir("/proc/self/fd") == before
