"""What may become a mountpoint and what is refused, in one sentence each."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pyfuse3
import pytest
from casfs_mount import mountpoint, server
from casfs_mount.handlers import FileSystem
from casfs_mount.mountpoint import (
    MountRecord,
    check_fuse,
    check_mountpoint,
    mounted_at,
    mounts,
    unmount,
)

from casfs.errors import CasfsError, NotFoundError
from casfs.repository.place import LocalPlace


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "repository" / "below").mkdir(parents=True)
    return tmp_path / "repository"


def pretend(monkeypatch: pytest.MonkeyPatch, *records: MountRecord) -> None:
    monkeypatch.setattr(mountpoint, "mounts", lambda: list(records))


def test_an_ordinary_directory_is_a_valid_mountpoint_even_with_entries(
    tmp_path: Path, repository: Path
) -> None:
    (tmp_path / "at" / "full").mkdir(parents=True)
    (tmp_path / "link").symlink_to("at")
    assert check_mountpoint(tmp_path / "at", repository) == tmp_path / "at"
    assert check_mountpoint(tmp_path / "link", repository) == tmp_path / "at"


def test_a_missing_mountpoint_is_not_created(tmp_path: Path, repository: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        check_mountpoint(tmp_path / "nowhere", repository)
    assert not (tmp_path / "nowhere").exists()


def test_a_mountpoint_that_is_a_file_is_refused(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CasfsError, match="not a directory"):
        check_mountpoint(tmp_path / "file", repository)
    with pytest.raises(CasfsError, match="Not a directory"):
        check_mountpoint(tmp_path / "file" / "below", repository)


@pytest.mark.parametrize("where", ["repository", "repository/below", "link"])
def test_a_mountpoint_inside_the_repository_is_refused(
    tmp_path: Path, repository: Path, where: str
) -> None:
    (tmp_path / "link").symlink_to("repository/below")
    with pytest.raises(CasfsError, match="inside the repository"):
        check_mountpoint(tmp_path / where, repository)


def test_a_mountpoint_that_contains_the_repository_is_refused(
    tmp_path: Path, repository: Path
) -> None:
    """Its packs would be looked for inside the mount that needs them."""
    for where in (tmp_path, tmp_path.parent, Path("/")):
        with pytest.raises(CasfsError, match="would be hidden"):
            check_mountpoint(where, repository)


def test_a_busy_mountpoint_is_refused(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "at").mkdir()
    for kind, printed in (
        ("fuse.casfs", "a snapshot is mounted"),
        ("tmpfs", "a tmpfs file system"),
    ):
        pretend(monkeypatch, MountRecord(os.fsencode(tmp_path / "at"), kind))
        with pytest.raises(CasfsError, match=printed):
            check_mountpoint(tmp_path / "at", repository)


def test_a_mount_whose_server_died_is_explained(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = tmp_path / "at"
    at.mkdir()
    pretend(monkeypatch, MountRecord(os.fsencode(at), "fuse.casfs"))
    whole = os.stat

    def stat(path: object, *args: object, **kwargs: object) -> os.stat_result:
        if path == at:
            raise OSError(107, "Transport endpoint is not connected")
        return whole(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(CasfsError, match="server has died; casfs umount"):
        check_mountpoint(at, repository)


@pytest.mark.parametrize("answer", ["died", "hangs"])
def test_a_mount_whose_root_the_kernel_remembers_is_asked(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    at = tmp_path / "at"
    at.mkdir()
    pretend(monkeypatch, MountRecord(os.fsencode(at), "fuse.casfs"))
    end = threading.Event()

    def statvfs(path: object) -> None:
        if answer == "hangs":
            end.wait(60)
        raise OSError(103, "Software caused connection abort")

    monkeypatch.setattr(os, "statvfs", statvfs)
    monkeypatch.setattr(mountpoint, "_ANSWER_TIMEOUT_S", 30.0 if answer == "died" else 0.01)
    with pytest.raises(CasfsError, match="died" if answer == "died" else "mounted on .* already"):
        check_mountpoint(at, repository)
    end.set()


def test_names_cannot_forge_a_message(tmp_path: Path, repository: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        check_mountpoint(tmp_path / "new\nline\x1b[2J", repository)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


@contextmanager
def mounted_tmpfs(at: Path) -> Iterator[None]:
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "casfs-test", str(at)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it mounts a file system")
def test_the_kernels_table_is_read_whatever_a_mountpoint_is_called(tmp_path: Path) -> None:
    at = tmp_path / "a b\tc\nd\\e"
    with mounted_tmpfs(at):
        assert mounted_at(at) == MountRecord(os.fsencode(at), "tmpfs")
        with pytest.raises(CasfsError, match="not of casfs"):
            unmount(at)
    assert mounted_at(at) is None
    assert any(record.path == b"/" for record in mounts())


def test_unmount_refuses_a_path_where_nothing_is_mounted(tmp_path: Path) -> None:
    for where in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(NotFoundError, match="nothing is mounted"):
            unmount(where)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it mounts a file system")
def test_a_busy_mount_is_reported_with_its_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = tmp_path / "at"
    with mounted_tmpfs(at):
        pretend(monkeypatch, MountRecord(os.fsencode(at), "fuse.casfs"))
        user = subprocess.Popen(
            [sys.executable, "-c", "print(flush=True); input()"],
            cwd=at,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert user.stdout is not None
            user.stdout.readline()
            with pytest.raises(CasfsError, match=rf"busy: used by .*\(process {user.pid}\)"):
                unmount(at)
        finally:
            user.communicate(b"\n")


def test_a_machine_without_the_fuse_device_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("/nonexistent", "/dev/null", "/etc/passwd"):
        monkeypatch.setattr(mountpoint, "DEVICE", device)
        with pytest.raises(CasfsError, match="no FUSE on this machine"):
            check_fuse(False)


class TestUnprivilegedUser:
    @pytest.fixture(autouse=True)
    def ordinary(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        monkeypatch.setattr(mountpoint, "DEVICE", "/dev/null")
        monkeypatch.setattr(mountpoint, "_DEVICE_NUMBER", os.stat("/dev/null").st_rdev)

    def test_an_unprivileged_user_needs_the_mount_helper(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(mountpoint, "HELPER", "no-such-helper")
        with pytest.raises(CasfsError, match="no-such-helper is not installed"):
            check_fuse(False)

    def test_an_unprivileged_user_may_allow_others_only_where_fuse_conf_permits(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(mountpoint, "HELPER", "true")
        monkeypatch.setattr(mountpoint, "_CONFIGURATION", tmp_path / "fuse.conf")
        check_fuse(False)
        for text in (None, "# user_allow_other\nmount_max = 5\n"):
            if text is not None:
                (tmp_path / "fuse.conf").write_text(text)
            with pytest.raises(CasfsError, match="user_allow_other"):
                check_fuse(True)
        (tmp_path / "fuse.conf").write_text("mount_max = 5\n  user_allow_other\n")
        check_fuse(True)


class TestExchangedMountpoint:
    @pytest.fixture
    def closed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Mounting exchanges the mountpoint for a symlink, as the owner of the folder above can."""
        (tmp_path / "at").mkdir()
        (tmp_path / "victim").mkdir()
        closed: list[str] = []

        def exchange(*_: object) -> None:
            (tmp_path / "at").rename(tmp_path / "taken")
            (tmp_path / "at").symlink_to(tmp_path / "victim")

        monkeypatch.setattr(pyfuse3, "init", exchange)
        monkeypatch.setattr(pyfuse3, "close", lambda: closed.append("closed"))
        return closed

    def test_a_mountpoint_that_is_exchanged_while_it_is_mounted_is_refused(
        self, tmp_path: Path, closed: list[str]
    ) -> None:
        request = server.MountRequest(LocalPlace(tmp_path / "repository"), tmp_path / "at")
        operations = cast(FileSystem, None)
        with pytest.raises(CasfsError, match="was exchanged for another directory"):
            server._mount(operations, request)
        assert closed == ["closed"]

    def test_a_mountpoint_that_is_a_symlink_by_now_is_not_mounted_on(
        self, tmp_path: Path, closed: list[str]
    ) -> None:
        (tmp_path / "at").rmdir()
        (tmp_path / "at").symlink_to(tmp_path / "victim")
        request = server.MountRequest(LocalPlace(tmp_path / "repository"), tmp_path / "at")
        with pytest.raises(CasfsError, match="cannot mount on"):
            server._mount(cast(FileSystem, None), request)
        assert closed == [] and not (tmp_path / "taken").exists()
