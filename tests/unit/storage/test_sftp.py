"""A folder on a real SSH server keeps the contract, and what ends a connection is explained."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from casfs.errors import (
    NotFoundError,
    StorageDeniedError,
    StorageError,
    StorageUnavailableError,
)
from casfs.storage.counting import RequestCounter, RequestKind, RequestTotals
from casfs.storage.retry import Retrier, RetryingStorage, RetryPolicy
from casfs.storage.sftp import UPLOADS, SftpStorage
from casfs.storage.sftp_channel import SftpChannel, explain_end
from tests.support.servers import SFTP_SERVER, SshServer, session_pids, sshd

from .contract import StorageContract, random_bytes

pytestmark = pytest.mark.slow


def over_ssh(server: SshServer, folder: Path, counter: RequestCounter | None = None) -> SftpStorage:
    command = (*server.ssh_command, "-p", str(server.port), "-l", server.user, "-s")
    return SftpStorage(server.url(folder), str(folder), (*command, "127.0.0.1", "sftp"), counter)


def over_pipe(folder: Path) -> SftpStorage:
    return SftpStorage("sftp://pipe", str(folder), (SFTP_SERVER,))


class TestSftpStorage(StorageContract):
    @pytest.fixture
    def storage(self, ssh_server: SshServer, tmp_path: Path) -> Iterator[SftpStorage]:
        storage = over_ssh(ssh_server, tmp_path)
        yield storage
        storage.close()


@pytest.fixture
def piped(tmp_path: Path) -> Iterator[SftpStorage]:
    storage = over_pipe(tmp_path)
    yield storage
    storage.close()


def test_uploads_leave_nothing_but_the_object(piped: SftpStorage, tmp_path: Path) -> None:
    piped.create("packs/ab/cd", b"1")
    piped.create("packs/ab/cd", b"2")
    piped.write("config", b"1")
    with pytest.raises(StorageError):
        piped.create("packs/ab/cd", b"other size")
    assert os.listdir(tmp_path / UPLOADS) == []
    assert (tmp_path / "packs" / "ab" / "cd").stat().st_nlink == 1


def test_an_object_is_synced_before_it_has_its_name_and_the_name_after(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    strace = ("strace", "-f", "-y", "-o", str(trace), "-e", "trace=fsync,link,linkat")
    storage = SftpStorage("sftp://pipe", str(tmp_path / "r"), (*strace, SFTP_SERVER))
    (tmp_path / "r").mkdir()
    storage.create("packs/ab/cd", b"1")
    storage.close()
    steps = [
        line for line in trace.read_text().splitlines() if "uploads/" in line or "/ab>" in line
    ]
    assert "fsync" in steps[0] and "uploads/" in steps[0]
    links = [i for i, line in enumerate(steps) if "link" in line and "= 0" in line]
    synced = [i for i, line in enumerate(steps) if "fsync" in line and "packs/ab>" in line]
    assert links and synced and links[0] < synced[-1]
    assert all("= 0" in steps[i] for i in synced)


def test_many_folders_are_listed_in_order(piped: SftpStorage, tmp_path: Path) -> None:
    names = [f"packs/{i:02x}/{i:02x}{j}" for i in range(60) for j in range(3)]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    assert [entry.name for entry in piped.list("packs")] == sorted(names)


def test_requests_and_bytes_are_counted(tmp_path: Path) -> None:
    counter = RequestCounter()
    storage = SftpStorage("sftp://pipe", str(tmp_path), (SFTP_SERVER,), counter)
    storage.create("packs/a", bytes(1000))
    storage.read("packs/a", 100, 300)
    assert counter.totals() == {
        RequestKind.CREATE: RequestTotals(1, sent_bytes=1000),
        RequestKind.READ: RequestTotals(1, received_bytes=300),
        # The first upload of a process looks for the remains of interrupted ones.
        RequestKind.STAT: RequestTotals(1),
        RequestKind.LIST: RequestTotals(1),
    }
    storage.close()


def test_many_threads_share_one_connection(piped: SftpStorage) -> None:
    data = random_bytes(3_000_000)
    piped.create("packs/ab/cd", data)
    failures: list[int] = []

    def read(seed: int) -> None:
        for i in range(50):
            begin = (seed * 7919 + i * 104729) % len(data)
            if piped.read("packs/ab/cd", begin, 70_000) != data[begin : begin + 70_000]:
                failures.append(begin)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_folder_that_may_not_be_written_denies_it(ssh_server: SshServer) -> None:
    if os.geteuid() == 0:
        storage = over_ssh(ssh_server, Path("/proc/1"))
    else:
        storage = over_ssh(ssh_server, Path("/root/elsewhere"))
    with pytest.raises((NotFoundError, StorageError)):
        storage.create("config", b"1")
    storage.close()


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], check=True)
    try:
        storage = over_pipe(small)
        with pytest.raises(StorageError, match="the server's disk is full"):
            storage.create("packs/ab/cd", bytes(8 * 1024 * 1024))
        storage.create("packs/ab/small", b"1")
        assert os.listdir(small / UPLOADS) == []
        storage.close()
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


class TestConnections:
    def test_a_connection_that_is_cut_is_made_again(
        self, ssh_server: SshServer, tmp_path: Path
    ) -> None:
        storage = over_ssh(ssh_server, tmp_path)
        storage.create("packs/a", b"1")
        for pid in session_pids(ssh_server):
            os.kill(pid, signal.SIGKILL)
        retrying = RetryingStorage(storage, Retrier(RetryPolicy()))
        assert retrying.read("packs/a") == b"1"
        retrying.close()

    def test_a_server_that_comes_back_is_waited_for(self, tmp_path: Path) -> None:
        keys = tmp_path / "sshd"
        keys.mkdir()
        with sshd(keys) as server:
            storage = over_ssh(server, tmp_path / "r")
            (tmp_path / "r").mkdir()
            storage.create("packs/a", b"1")
        policy = RetryPolicy(patience_s=60, first_patience_s=60, max_pause_s=0.5)
        retrying = RetryingStorage(storage, Retrier(policy))
        results: list[bytes] = []
        thread = threading.Thread(target=lambda: results.append(retrying.read("packs/a")))
        thread.start()
        with sshd(keys, server.port):
            thread.join()
        assert results == [b"1"]
        retrying.close()

    def test_an_unknown_host_key_is_explained(self, ssh_server: SshServer, tmp_path: Path) -> None:
        config = tmp_path / "ssh_config"
        text = (ssh_server.folder / "ssh_config").read_text()
        config.write_text(text.replace(f"{ssh_server.folder}/known_hosts", "/dev/null"))
        command = ("ssh", "-F", str(config), "-p", str(ssh_server.port), "-s", "127.0.0.1", "sftp")
        storage = SftpStorage("sftp://127.0.0.1", "/x", command)
        with pytest.raises(StorageDeniedError, match="host key is not known here"):
            storage.read("config")

    def test_refused_keys_are_explained(self, ssh_server: SshServer, tmp_path: Path) -> None:
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")], check=True
        )
        config = tmp_path / "ssh_config"
        text = (ssh_server.folder / "ssh_config").read_text()
        config.write_text(text.replace(f"{ssh_server.folder}/client_key", str(tmp_path / "key")))
        command = ("ssh", "-F", str(config), "-p", str(ssh_server.port), "-s", "127.0.0.1", "sftp")
        storage = SftpStorage("sftp://127.0.0.1", "/x", command)
        with pytest.raises(StorageDeniedError, match="accepts none of your keys"):
            storage.read("config")

    def test_a_port_without_a_server_is_unavailable(self, ssh_server: SshServer) -> None:
        command = (*ssh_server.ssh_command, "-p", "1", "-s", "127.0.0.1", "sftp")
        storage = SftpStorage("sftp://127.0.0.1:1", "/x", command)
        with pytest.raises(StorageUnavailableError, match="refused"):
            storage.read("config")

    def test_a_missing_ssh_is_named(self) -> None:
        storage = SftpStorage("sftp://host", "/x", ("/nonexistent/ssh",))
        with pytest.raises(StorageDeniedError, match="cannot run /nonexistent/ssh"):
            storage.read("config")

    def test_a_changed_host_key_is_a_warning_not_to_go_on(self) -> None:
        said = "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed."
        error = explain_end("sftp://host", 255, said)
        assert isinstance(error, StorageDeniedError)
        assert "another machine may answer in its place" in str(error)

    def test_what_ssh_said_cannot_forge_lines(self) -> None:
        error = explain_end("sftp://host", 255, "first\nsecond\x1b[2J")
        assert "\x1b" not in str(error) and "second" in str(error)

    def test_nothing_is_left_running_after_close(self, piped: SftpStorage) -> None:
        piped.create("config", b"1")
        before = threading.active_count()
        piped.close()
        assert threading.active_count() < before
        assert piped.read("config") == b"1"


HOSTILE = """
import os, struct, sys
answer = sys.argv[1]
def receive():
    length = int.from_bytes(sys.stdin.buffer.read(4))
    return sys.stdin.buffer.read(length)
def send(body):
    sys.stdout.buffer.write(struct.pack(">I", len(body)) + body)
    sys.stdout.buffer.flush()
receive()
if answer == "huge":
    sys.stdout.buffer.write(struct.pack(">IB", 0xFFFFFFF0, 2))
    sys.stdout.buffer.flush()
    receive()
send(struct.pack(">BI", 2, 3))
while request := receive():
    kind, number = request[0], request[1:5]
    if answer == "short":
        send(bytes([102]) + number + struct.pack(">I", 100))
    elif answer == "stray":
        send(bytes([101]) + struct.pack(">III", 0xDEAD, 0, 0))
    elif answer == "long" and kind == 5:
        send(bytes([103]) + number + struct.pack(">I", 50) + bytes(50))
    elif answer == "empty" and kind == 5:
        send(bytes([103]) + number + struct.pack(">I", 0))
    elif answer == "vanish":
        sys.exit(0)
    else:
        send(bytes([102]) + number + struct.pack(">I", 1) + b"h")
"""


@pytest.mark.parametrize("answer", ["huge", "short", "stray", "long", "empty", "vanish"])
def test_a_server_that_breaks_the_protocol_is_left(answer: str) -> None:
    storage = SftpStorage("sftp://host", "/x", (sys.executable, "-c", HOSTILE, answer))
    kind = StorageUnavailableError if answer == "vanish" else StorageError
    with pytest.raises(kind):
        storage.read("packs/a", 0, 10)
    storage.close()


def test_a_server_that_goes_silent_is_left(tmp_path: Path) -> None:
    now_s = 0.0
    program = "import sys, time; sys.stdin.buffer.read(9); sys.stdin.buffer.read()"

    def clock() -> float:
        nonlocal now_s
        now_s += 100
        return now_s

    with pytest.raises(StorageUnavailableError, match="does not answer"):
        SftpChannel((sys.executable, "-c", program), "sftp://host", clock)


def test_uploads_that_were_cut_off_are_removed_after_a_day(
    piped: SftpStorage, tmp_path: Path
) -> None:
    (tmp_path / UPLOADS).mkdir()
    old, new = tmp_path / UPLOADS / "0123", tmp_path / UPLOADS / "4567"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (1, 1))
    piped.create("config", b"1")
    assert not old.exists()
    assert new.exists()
    # Later uploads of the same process ask no more.
    old.write_bytes(b"x")
    os.utime(old, (1, 1))
    piped.create("other", b"2")
    assert old.exists()


def test_a_server_that_refuses_to_remove_stale_uploads_still_takes_new_objects(
    piped: SftpStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(now_ns: int) -> None:
        raise StorageError("delete", "uploads/0123", OSError("denied"))

    monkeypatch.setattr(piped, "remove_stale_uploads", refuse)
    piped.create("config", b"1")
    assert piped.read("config") == b"1"


def test_a_missing_repository_is_not_found(piped: SftpStorage, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        piped.read("config")
    assert list(piped.list("snapshots")) == []
    shutil.rmtree(tmp_path)
    with pytest.raises(NotFoundError):
        piped.read("config")
    tmp_path.mkdir()
