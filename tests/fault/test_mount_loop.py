"""The event loop of a real mount: it sleeps when nothing is asked, and outlives faults, signals and ends.

The mounts bypass the kernel's cache, so that each read is a request, and have a small cache of their own,
so that many requests wait for the disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cli import Casfs
from tests.support.dying_disk import Disk, build_interposer
from tests.support.effort import EFFORT, dice
from tests.support.mounts import is_mounted, processes_naming, unmount_by_force
from tests.support.waiting import wait_until

LIVES = 2 * EFFORT
ACTIONS = 20
NAMES = ("one", "two", "three")

EPOLL_CALLS = {"232", "281", "22", "441"}
"""Numbers of epoll_wait, epoll_pwait (x86-64, then aarch64) and epoll_pwait2."""

LONG_MS = 60_000
ENDED = {errno.ENOTCONN, errno.ECONNABORTED, errno.ENOENT, errno.ENODEV}

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(300 * EFFORT)]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    folder = tmp_path_factory.mktemp("disk")
    (folder / "home").mkdir()
    casfs = Casfs(folder / "repository", folder / "home").init()
    return Disk(casfs, folder, build_interposer(tmp_path_factory.mktemp("interposer")))


@pytest.fixture
def disk(repository: Disk) -> Iterator[Disk]:
    try:
        yield repository
    finally:
        repository.close()
        ended(repository)


def mount(disk: Disk) -> None:
    disk.mount("--no-kernel-cache", "--cache-size", "1M")


def sleeps_without_a_timeout(process: int) -> bool:
    """Return whether the main thread waits for events, for a minute or longer."""
    call = Path(f"/proc/{process}/syscall").read_text().split()
    if call[0] not in EPOLL_CALLS:
        return False
    timeout_ms = int(call[4], 16) & 0xFFFFFFFF
    return timeout_ms >= LONG_MS


def times_slept(process: int) -> int:
    status = Path(f"/proc/{process}/task/{process}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("voluntary_ctxt_switches"))
    return int(line.split()[1])


def asleep(disk: Disk) -> None:
    wait_until(lambda: sleeps_without_a_timeout(disk.server), "the event loop sleeps")


def ended(disk: Disk) -> None:
    wait_until(lambda: not is_mounted(disk.at), "it is unmounted")
    wait_until(lambda: not processes_naming(disk.at), "the server is gone")
    assert "Traceback" not in disk.log.read_text()


class Readers:
    """Threads that read all files of a mount again and again, and compare them, until the mount ends.

    While `may_fail` is set, a read may fail with EIO.
    """

    def __init__(self, disk: Disk, count: int) -> None:
        self._disk = disk
        self._ending = threading.Event()
        self.may_fail = threading.Event()
        self.rounds = [0] * count
        self.wrong: list[str] = []
        self._threads = [threading.Thread(target=self._read, args=(n,)) for n in range(count)]

    def __enter__(self) -> Readers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let the readers end, and wait until they have."""
        self._ending.set()
        self._disk.recover("silent")
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a reader hangs"

    def expect_the_end(self) -> None:
        """From now on a read may fail because the mount ends."""
        self._ending.set()

    def await_rounds(self, more: int) -> None:
        wanted = [rounds + more for rounds in self.rounds]
        wait_until(
            lambda: (
                bool(self.wrong) or all(a >= b for a, b in zip(self.rounds, wanted, strict=True))
            ),
            "every reader goes on",
        )
        assert self.wrong == []

    def _read(self, number: int) -> None:
        name = NAMES[number % len(NAMES)]
        while not self._ending.is_set():
            may_fail = self.may_fail.is_set()
            try:
                if self._disk.read(name) != self._disk.contents[name]:
                    self.wrong.append(f"{name} has other bytes")
            except OSError as error:
                may_fail = may_fail or self.may_fail.is_set()
                is_end = self._ending.is_set() and error.errno in ENDED | {errno.EIO}
                if not is_end and not (may_fail and error.errno == errno.EIO):
                    self.wrong.append(f"{name}: {error}")
            self.rounds[number] += 1


def test_an_idle_mount_sleeps_without_a_timeout(disk: Disk) -> None:
    mount(disk)
    with Readers(disk, 2) as readers:
        readers.await_rounds(3)
    asleep(disk)
    for _ in range(5):
        before = times_slept(disk.server)
        os.statvfs(disk.at)
        asleep(disk)
        # One sleep until the request, one poll after it, one sleep again; a few more for its own locks.
        assert times_slept(disk.server) - before < 20


def test_a_mount_whose_worker_waits_for_a_disk_sleeps_without_a_timeout(disk: Disk) -> None:
    mount(disk)
    assert disk.read("one") == disk.contents["one"]
    disk.be("silent")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(disk.read("two")))
    reader.start()
    wait_until(disk.is_waiting, "a read waits for the disk")
    asleep(disk)
    assert sorted(os.listdir(disk.at / "tree")) == sorted(NAMES)
    asleep(disk)
    disk.recover("silent")
    reader.join(60)
    assert got == [disk.contents["two"]]


def lazily(disk: Disk) -> None:
    subprocess.run(["umount", "-l", str(disk.at)], check=True)


def by_fuse(disk: Disk) -> None:
    subprocess.run(["fusermount3", "-uz", str(disk.at)], check=True)


def by_abort(disk: Disk) -> None:
    # It aborts the connection. Open files may keep the mount itself, without a server.
    subprocess.run(["umount", "-f", str(disk.at)], capture_output=True, check=False)
    wait_until(lambda: not processes_naming(disk.at), "the server is gone")
    unmount_by_force(disk.at)


def by_casfs(disk: Disk) -> None:
    # Refused while a file is open, so it is asked again until it succeeds.
    wait_until(
        lambda: disk.casfs.run("umount", disk.at, expect=None).exit == 0, "it can be unmounted"
    )


def by_signal(number: signal.Signals) -> Callable[[Disk], None]:
    return lambda disk: os.kill(disk.server, number)


ENDS = {
    "umount -l": lazily,
    "fusermount3 -uz": by_fuse,
    "umount -f": by_abort,
    "casfs umount": by_casfs,
    "SIGTERM": by_signal(signal.SIGTERM),
    "SIGINT": by_signal(signal.SIGINT),
    "SIGHUP": by_signal(signal.SIGHUP),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_mount_that_ends_in_the_middle_of_reads_leaves_no_server_and_no_reader(
    disk: Disk, end: str
) -> None:
    mount(disk)
    with Readers(disk, 3) as readers:
        readers.await_rounds(2)
        readers.expect_the_end()
        ENDS[end](disk)
    assert readers.wrong == []
    ended(disk)


def test_readers_killed_in_the_middle_of_a_read_leave_the_others_their_answers(disk: Disk) -> None:
    mount(disk)
    with Readers(disk, 2) as readers:
        for _ in range(20):
            with reading_process(disk) as victim:
                victim.kill()
        readers.await_rounds(1)
    assert readers.wrong == []
    asleep(disk)


@contextlib.contextmanager
def reading_process(disk: Disk) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that reads all files without end; it is killed at the latest when the context ends."""
    files = [str(disk.at / "tree" / name) for name in NAMES]
    script = 'while cat "$@" > /dev/null; do :; done'
    process = subprocess.Popen(
        ["sh", "-c", script, "sh", *files], stderr=subprocess.DEVNULL, process_group=0
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)


def test_a_mount_lives_through_faults_signals_and_killed_readers(disk: Disk) -> None:
    throw = dice()
    for _ in range(LIVES):
        mount(disk)
        with Readers(disk, 4) as readers, contextlib.ExitStack() as victims:
            # Then the trees are cached, and only the files' contents depend on the disk.
            readers.await_rounds(1)
            for _ in range(ACTIONS):
                act(disk, readers, victims, throw.randrange(7))
            victims.close()
            recover(disk, readers)
            readers.await_rounds(2)
            readers.expect_the_end()
            ENDS[throw.choice(list(ENDS))](disk)
        assert readers.wrong == []
        ended(disk)


def act(disk: Disk, readers: Readers, victims: contextlib.ExitStack, which: int) -> None:
    """Do one thing to a mount that is being read."""
    if which == 0:
        disk.be("silent")
        wait_until(disk.is_waiting, "a read waits for the disk")
        assert sorted(os.listdir(disk.at / "tree")) == sorted(NAMES)
        disk.recover("silent")
    elif which == 1:
        readers.may_fail.set()
        disk.be("broken")
    elif which == 2:
        recover(disk, readers)
    elif which == 3:
        victims.enter_context(reading_process(disk))
    elif which == 4:
        victims.close()
    elif which == 5:
        # The server is stopped for a while, as by a debugger, and goes on.
        os.kill(disk.server, signal.SIGSTOP)
        os.kill(disk.server, signal.SIGCONT)
    else:
        assert os.statvfs(disk.at).f_files >= len(NAMES)
        assert os.getxattr(disk.at / "tree/three", "user.casfs.capture") == b"stable"


def recover(disk: Disk, readers: Readers) -> None:
    """Repair the disk, and wait until every file is readable again: failures are remembered a while."""
    disk.recover("broken")

    def is_readable(name: str) -> bool:
        try:
            return disk.read(name) == disk.contents[name]
        except OSError:
            return False

    wait_until(lambda: all(map(is_readable, NAMES)), "the files are readable again")
    readers.may_fail.clear()
