"""Processes that write for a restore: they show in nothing but the time, and end with the restore."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import msgspec
import pytest

from casfs import server_process
from casfs.digest import digest_of
from casfs.format.tree import Node, NodeExtra, NodeType
from casfs.monitor import EntryChange, Problem, ProblemKind, RecordingMonitor
from casfs.restore import restorer, target_fs, temporary_entries, writer_process
from casfs.restore.entry_writer import WritingOptions
from casfs.restore.ordered_pool import PoolLimits
from casfs.restore.restorer import RestoreOptions, Restorer, RestoreResult
from casfs.restore.writer_process import EntryJob, WriterProcesses
from casfs.server_process import start_server_process
from tests.support.builders import MTIME_NS, Plan, RepositoryFixture, entry, file
from tests.support.processes import has_ended
from tests.support.stores import noise
from tests.support.waiting import wait_until

LIMITS = PoolLimits(batch_jobs=8, process_entries=1)


class Scene:
    """A repository, a target, and the processes that wrote into it."""

    def __init__(self, folder: Path) -> None:
        self.repo = RepositoryFixture(folder)
        self.target = folder / "target"
        self.monitor = RecordingMonitor()
        self.limits = LIMITS
        self.pids: list[int] = []

    def restore(self, plan: Plan, verify: bool = False) -> RestoreResult:
        self.repo.publish(plan)
        with self.repo.reading() as repository:
            _, snapshot = repository.snapshots.resolve("latest")
            options = RestoreOptions(verify=verify)
            running = Restorer(repository, options, self.monitor, limits=self.limits)
            return running.restore(b"", snapshot.root, bytes(self.target), False)

    def problems(self, kind: ProblemKind) -> list[tuple[bytes, str]]:
        return [(one.path, one.message) for one in self.monitor.problems if one.kind == kind]

    def left_over(self) -> list[str]:
        return [path.name for path in self.target.rglob(".casfs-restore-*")]

    def files(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.target)): path.read_bytes()
            for path in self.target.rglob("*")
            if path.is_file()
        }


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """A scene on a machine with two cores; every process that was started has ended after the test."""
    scene = Scene(tmp_path)
    monkeypatch.setattr(restorer, "process_count", lambda: 1)

    def noting(module: str, connection: int, blocked: Collection[signal.Signals]) -> int:
        scene.pids.append(start_server_process(module, connection, blocked=blocked))
        return scene.pids[-1]

    monkeypatch.setattr(writer_process, "start_server_process", noting)
    yield scene
    assert [pid for pid in scene.pids if Path(f"/proc/{pid}").exists()] == []


def written_by_processes(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Make the process write each batch that fits into a slot; return the paths of those entries."""
    paths: list[bytes] = []
    submit = WriterProcesses.submit

    def waiting(self: WriterProcesses, jobs: list[EntryJob]) -> object:
        process = self._processes[0]
        while not process.count_free() and not process.is_dead:
            process.receive(wait=True)
        batch = submit(self, jobs)
        if batch is not None:
            paths.extend(job.path for job in jobs)
        return batch

    monkeypatch.setattr(WriterProcesses, "submit", waiting)
    return paths


def many_files(count: int) -> dict[bytes, bytes | Node]:
    return {b"f%03d" % number: b"content %d" % number for number in range(count)}


def test_a_process_writes_entries_of_every_type_with_their_metadata(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = written_by_processes(monkeypatch)
    scene.repo.store(b"x")
    plan: Plan = {
        b"empty": b"",
        b"link": entry(b"", NodeType.SYMLINK, content=b"nowhere"),
        b"fifo": entry(b"", NodeType.FIFO, mode=0o640),
        b"mode": file(b"", b"x", mode=0o4711),
        b"time": file(b"", b"x", mtime_ns=-1_000_000_001),
        b"xattr": file(b"", b"x", extra=NodeExtra(((b"user.a", b"\0value"),))),
        b"\xff\n": b"1",
        b"z": b"last of the batch",
    }
    result = scene.restore({b"d": plan}, verify=True)
    assert scene.monitor.problems == []
    assert (result.files, result.others, result.verified) == (6, 2, 6)
    assert sorted(paths) == sorted(b"d/" + name for name in plan)
    found = {path.name: path.lstat() for path in (scene.target / "d").iterdir()}
    assert set(found) == {os.fsdecode(name) for name in plan}
    assert os.readlink(scene.target / "d" / "link") == "nowhere"
    assert stat.S_IMODE(found["mode"].st_mode) == 0o4711
    assert stat.S_IMODE(found["fifo"].st_mode) == 0o640
    assert found["time"].st_mtime_ns == -1_000_000_001
    assert found["z"].st_mtime_ns == MTIME_NS
    assert os.getxattr(scene.target / "d" / "xattr", "user.a") == b"\0value"


def test_what_a_process_cannot_write_is_reported_with_its_reason(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = written_by_processes(monkeypatch)
    scene.repo.store(b"x")
    mixed = file(b"", b"x", captured=digest_of(b"other"))
    plan: Plan = {**many_files(22), b"m": mixed, b"n" * 300: b"1"}
    result = scene.restore(plan)
    assert (result.files, result.damaged, result.failed) == (22, 1, 1)
    assert set(paths) == set(plan)
    ((path, message),) = scene.problems(ProblemKind.DAMAGED)
    assert path == b"m"
    assert "every chunk verifies, but the digest of the whole file does not match" in message
    ((path, message),) = scene.problems(ProblemKind.UNREADABLE)
    assert (path, message) == (b"n" * 300, "it cannot be restored: File name too long")


def test_a_batch_that_is_larger_than_the_shared_memory_is_written_by_the_restore_itself(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = written_by_processes(monkeypatch)
    scene.limits = PoolLimits(batch_bytes=1 << 30, batch_jobs=4, process_entries=1)
    plan: Plan = {b"%d" % number: noise(f"{number}", 900_000) for number in range(4)}
    assert scene.restore(plan).files == 4
    assert paths == []
    assert scene.files() == {name.decode(): plan[name] for name in plan}


def test_a_restore_goes_on_without_a_process_that_was_killed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paths = written_by_processes(monkeypatch)
    killed: list[int] = []
    submit = WriterProcesses.submit

    def killing(self: WriterProcesses, jobs: list[EntryJob]) -> object:
        batch = submit(self, jobs)
        (pid,) = scene.pids
        if len(paths) >= 16 and not killed:
            killed.append(pid)
            started = temporary_entries._start_time(pid)
            assert started is not None
            token = b"%s-%x-%x" % (temporary_entries._system_token(), pid, started)
            name = temporary_entries.TEMPORARY_PREFIX + token + b"-ffff"
            os.close(target_fs.create_file(jobs[0].fd, name))
            os.kill(pid, signal.SIGKILL)
        return batch

    monkeypatch.setattr(WriterProcesses, "submit", killing)
    plan = many_files(200)
    assert scene.restore({b"d": plan}).files == 200
    assert scene.monitor.problems == []
    assert scene.files() == {"d/" + name.decode(): plan[name] for name in plan}
    assert scene.left_over() == []
    assert "the restore goes on without it" in caplog.text
    caplog.clear()


@pytest.fixture
def ignored_children() -> Iterator[None]:
    """As a parent may have left it: the kernel removes a process that ended, and its id is free again."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGCHLD, before)


def test_a_restore_goes_on_without_a_killed_process_where_child_signals_are_ignored(
    scene: Scene,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ignored_children: None,
) -> None:
    paths = written_by_processes(monkeypatch)
    submit = WriterProcesses.submit

    def killing(self: WriterProcesses, jobs: list[EntryJob]) -> object:
        if len(paths) >= 16 and Path(f"/proc/{scene.pids[0]}").exists():
            os.kill(scene.pids[0], signal.SIGKILL)
            wait_until(lambda: has_ended(scene.pids[0]), "the process ended")
        return submit(self, jobs)

    monkeypatch.setattr(WriterProcesses, "submit", killing)
    plan = many_files(200)
    assert scene.restore({b"d": plan}).files == 200
    assert scene.files() == {"d/" + name.decode(): plan[name] for name in plan}
    assert "the restore goes on without it" in caplog.text
    caplog.clear()


def test_a_restore_writes_all_by_itself_where_no_process_can_be_started(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(writer_process, "start_server_process", refuse)
    assert scene.restore({b"d": many_files(40)}).files == 40


def test_a_restore_does_not_wait_for_a_process_that_does_not_start(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one whose modules lie on a server that does not answer."""
    monkeypatch.setattr(server_process, "_PROGRAM", "import time; time.sleep(1000)")
    assert scene.restore({b"d": many_files(40)}).files == 40
    assert len(scene.pids) == 1


def test_an_interrupted_restore_ends_a_stopped_process_and_leaves_no_temporary_file(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    written_by_processes(monkeypatch)

    class Interrupting(RecordingMonitor):
        def entry(self, path: bytes, change: EntryChange) -> None:
            if path == b"f050":
                os.kill(scene.pids[0], signal.SIGSTOP)
                raise KeyboardInterrupt

    scene.monitor = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        scene.restore(many_files(300))
    assert scene.left_over() == []
    assert 50 < len(scene.files()) < 300


SERVING = """
import ctypes, os, socket, sys, threading
from casfs.restore import writer_server
own, other = socket.socketpair()
memory = os.memfd_create("memory")
os.ftruncate(memory, writer_server.MEMORY_BYTES)
socket.send_fds(own, [bytes.fromhex(sys.argv[1])], [memory])
thread = threading.Thread(target=writer_server.serve, args=(other,))
thread.start()
own.recv(len(writer_server.STARTED))
print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
own.close()
thread.join()
"""


@pytest.mark.parametrize(("has_keyed_digests", "dumpable"), [(False, "1"), (True, "0")])
def test_a_process_that_writes_decrypted_data_cannot_be_inspected(
    has_keyed_digests: bool, dumpable: str
) -> None:
    options = msgspec.msgpack.encode(WritingOptions(has_keyed_digests=has_keyed_digests)).hex()
    done = subprocess.run(
        [sys.executable, "-c", SERVING, options], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [dumpable]


DYING_PARENT = """
import os
from casfs.restore.entry_writer import WritingOptions
from casfs.restore.writer_process import WriterProcesses
processes = WriterProcesses(WritingOptions(), None, 1)
process = processes._processes[0]
while not process.count_free():
    process.receive(wait=True)
print(process._pid, flush=True)
os._exit(0)
"""


def test_a_process_ends_when_the_restore_has_died() -> None:
    run = subprocess.run(
        [sys.executable, "-c", DYING_PARENT], capture_output=True, text=True, check=True
    )
    pid = int(run.stdout)
    wait_until(lambda: has_ended(pid), "the process ended")


def test_problems_come_in_the_order_of_the_tree(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    written_by_processes(monkeypatch)
    too_long = dict.fromkeys(range(3, 60, 7), b"n" * 300)
    plan = {b"%03d" % number + too_long.get(number, b""): b"%d" % number for number in range(60)}
    scene.restore(plan)
    reported: list[Problem] = scene.monitor.problems
    assert [one.path for one in reported] == sorted(name for name in plan if len(name) > 255)
