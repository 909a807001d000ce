"""Another process reads a mount with the same result as this process, and is given up where it must be."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from casfs.backup import source_fs
from casfs.backup.mount_table import MountTable, outermost_served, parse_table
from casfs.backup.run import BackupOptions, run_backup
from casfs.backup.source_process import MountTimeoutError, ServedMounts, SourceProcess
from casfs.monitor import RecordingMonitor
from casfs.repository.repository import Repository
from tests.support.builders import RepositoryFixture
from tests.support.waiting import wait_until

LINE = b"36 35 98:0 / %s rw,noatime shared:1 - %s source rw\n"


def table_of(*mounts: tuple[bytes, bytes]) -> bytes:
    return b"".join(LINE % mount for mount in mounts)


class FixedTable(MountTable):
    """A table in which some folders are taken for mounts that may never answer."""

    def __init__(self, folder: Path, *served: Path) -> None:
        path = folder / "table"
        lines = [LINE % (bytes(one).replace(b" ", b"\\040"), b"fuse.test") for one in served]
        path.write_bytes(b"".join(lines))
        super().__init__(str(path))

    def refresh(self) -> bool:
        return False  # a regular file always polls as ready


@pytest.fixture
def process() -> Iterator[SourceProcess]:
    found = SourceProcess(b"/mnt", 60)
    yield found
    found.close()


class TestTable:
    def test_only_mounts_that_others_serve_are_found(self) -> None:
        mounts = parse_table(
            table_of(
                (b"/", b"fuse.overlay"),
                (b"/a\\040b", b"fuse.sshfs"),
                (b"/local", b"ext4"),
                (b"/nfs", b"nfs4"),
                (b"/nfs/inside", b"fuse"),
                (b"/nfs2", b"cifs"),
                (b"/sys/fs/fuse/connections", b"fusectl"),
                (b"/covered", b"fuse"),
                (b"/covered", b"tmpfs"),
            )
        )
        assert outermost_served(mounts) == {b"/a b", b"/nfs", b"/nfs2"}

    def test_a_path_into_a_mount_is_found_without_touching_it(self, tmp_path: Path) -> None:
        mount = tmp_path / "mount"
        (mount / "d").mkdir(parents=True)
        (tmp_path / "sub").mkdir()
        (tmp_path / "link").symlink_to("./sub/../mount/d")
        (tmp_path / "loop").symlink_to("loop")
        table = FixedTable(tmp_path, mount)
        for path in (mount, mount / "d" / "e", tmp_path / "link", tmp_path / "link" / "f"):
            assert table.mount_of(bytes(path)) == bytes(mount)
        assert table.mount_of(os.path.relpath(bytes(mount))) == bytes(mount)
        for path in (tmp_path, tmp_path / "loop", tmp_path / "mount2", tmp_path / "link2" / "x"):
            assert table.mount_of(bytes(path)) is None
        st = tmp_path.stat()
        assert table.names_in(st.st_dev, st.st_ino) == {b"mount"}
        table.close()


class TestProcess:
    def test_errors_come_back_as_they_were(self, process: SourceProcess, tmp_path: Path) -> None:
        above = process.working_directory
        with pytest.raises(FileNotFoundError):
            source_fs.stat_entry(above, bytes(tmp_path / "none"))
        with pytest.raises(NotADirectoryError):
            source_fs.open_directory(above, b"/dev/null")

    def test_a_process_that_ends_is_an_error_of_the_mount(self, process: SourceProcess) -> None:
        os.kill(process._pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(MountTimeoutError, match="mounted on /mnt ended"):
                source_fs.stat_entry(process.working_directory, b"/")
        assert process.working_directory.is_dead

    @pytest.mark.parametrize("is_alive", [True, False])
    def test_a_process_is_ended_where_signals_of_children_are_ignored(self, is_alive: bool) -> None:
        """As after `trap '' CHLD`: the kernel reaps a child, and its id may be another's."""
        before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        try:
            process = SourceProcess(b"/mnt", 60)
            pid = process._pid
            if not is_alive:
                os.kill(pid, signal.SIGKILL)
                wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "the process has ended")
            process.close()
            wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "the process has ended")
        finally:
            signal.signal(signal.SIGCHLD, before)

    def test_a_process_that_does_not_answer_is_given_up(self, tmp_path: Path) -> None:
        process = SourceProcess(b"/mnt", 0.05)
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        keep = os.open(fifo, os.O_RDWR)
        handle = process.adopt(keep)
        with pytest.raises(MountTimeoutError) as caught:
            source_fs.read_next(handle, 1)
        assert caught.value.errno == errno.ETIMEDOUT
        source_fs.close(handle)  # does nothing
        process.close()
        os.close(keep)

    def test_an_interrupted_wait_leaves_no_answer_for_the_next_request(
        self, process: SourceProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(_: socket.socket) -> object:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("casfs.backup.source_process.receive", interrupted)
            with pytest.raises(KeyboardInterrupt):
                source_fs.stat_entry(process.working_directory, b"/")
        with pytest.raises(MountTimeoutError):
            source_fs.stat_entry(process.working_directory, b"/")


def make_tree(folder: Path) -> None:
    """Fill a folder with entries of every kind that a mount may have."""
    random_bytes = random.Random(5).randbytes
    (folder / "deep" / "er" / "still").mkdir(parents=True)
    (folder / "deep" / "small").write_bytes(b"small")
    (folder / "deep" / "er" / "large").write_bytes(random_bytes(5 << 20))
    (folder / "empty").touch()
    with open(folder / "sparse", "wb") as file:
        file.write(b"begin")
        file.truncate(4 << 20)
    os.symlink("deep/small", folder / "link")
    os.link(folder / "deep" / "small", folder / "hard link")
    os.mkfifo(folder / "fifo")
    os.setxattr(folder / "empty", "user.color", b"blue")
    os.setxattr(folder / "deep", "user.color", b"red")
    for number in range(150):
        (folder / "deep" / f"{number:03}").write_bytes(b"%d" % number)
    cache = folder / "cache"
    cache.mkdir()
    (cache / "CACHEDIR.TAG").write_bytes(b"Signature: 8a477f597d28d172789f06886806bc55")
    (cache / "left out").touch()
    for where, _, names in os.walk(folder):
        for name in names:
            os.utime(os.path.join(where, name), (1e9, 1e9), follow_symlinks=False)


@pytest.mark.parametrize("named", ["the folder above", "the mount", "a folder in it"])
def test_a_tree_has_the_same_snapshot_through_another_process(
    tmp_path: Path, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from casfs.backup.exclude import Exclusions

    mount = tmp_path / "work" / "source" / "the mount"
    mount.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    make_tree(mount)
    monkeypatch.setattr("time.time_ns", lambda: os.stat(mount).st_ctime_ns + 10**12)
    source = {
        "the folder above": mount.parent,
        "the mount": mount,
        "a folder in it": mount / "deep",
    }
    options = BackupOptions(
        (os.path.relpath(bytes(source[named])),),
        exclusions=Exclusions(caches=True),
        mount_timeout_s=60,
    )
    fixture = RepositoryFixture(tmp_path / "repo")

    def back_up(repository: Repository, *served: Path) -> tuple[bytes, int]:
        with monkeypatch.context() as patch:
            table = FixedTable(tmp_path, *served)
            patch.setattr(
                "casfs.backup.run.ServedMounts", lambda timeout_s: ServedMounts(timeout_s, table)
            )
            result = run_backup(repository, options, RecordingMonitor())
        assert result.snapshot.stats.unreadable == 0
        tree = result.snapshot.root.tree
        assert tree is not None
        return tree.digest, result.snapshot.stats.unchanged

    with fixture.writing() as repository:
        direct, _ = back_up(repository)
        served, unchanged = back_up(repository, mount)
        files = unchanged
        assert served == direct and files > 100
    fresh = RepositoryFixture(tmp_path / "fresh")
    with fresh.writing() as repository:
        assert back_up(repository, mount) == (direct, 0)
