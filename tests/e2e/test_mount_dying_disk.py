"""A mount on a disk that fails or does not answer: only readers of that disk get an errno.

The disk is the real one. A library loaded before the C library intercepts the reads of packs by the
mount's server, and fails or delays them while a control file exists.
"""

from __future__ import annotations

import os
import random
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_mount import processes_naming
from tests.support.cli import Casfs
from tests.support.mounts import is_mounted, unmount_by_force
from tests.support.waiting import wait_until

MIB = 1 << 20

pytestmark = pytest.mark.fuse

_INTERPOSER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>
#include <fcntl.h>

static int is_there(const char *name) {
    char path[4096];
    const char *folder = getenv("CASFS_TEST_DISK");
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return access(path, F_OK) == 0;
}

static int fails(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    if (!strstr(path, "/packs/")) return 0;
    if (is_there("silent")) {
        char waiting[4096];
        snprintf(waiting, sizeof waiting, "%s/waiting", getenv("CASFS_TEST_DISK"));
        close(open(waiting, O_CREAT | O_WRONLY, 0600));
        while (is_there("silent")) usleep(2000);
    }
    return is_there("broken");
}

ssize_t pread64(int fd, void *to, size_t size, off64_t at) {
    static ssize_t (*real)(int, void *, size_t, off64_t);
    if (!real) real = dlsym(RTLD_NEXT, "pread64");
    if (fails(fd)) { errno = EIO; return -1; }
    return real(fd, to, size, at);
}

ssize_t preadv64v2(int fd, const struct iovec *to, int count, off64_t at, int flags) {
    static ssize_t (*real)(int, const struct iovec *, int, off64_t, int);
    if (!real) real = dlsym(RTLD_NEXT, "preadv64v2");
    if ((flags & RWF_NOWAIT) && (is_there("silent") || is_there("broken"))) {
        errno = EAGAIN;
        return -1;
    }
    if (fails(fd)) { errno = EIO; return -1; }
    return real(fd, to, count, at, flags);
}
"""


@pytest.fixture(scope="module")
def interposer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interposer")
    (folder / "disk.c").write_text(_INTERPOSER)
    command = ["gcc", "-shared", "-fPIC", "-O1", "-o", "disk.so", "disk.c", "-ldl"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "disk.so"


class Disk:
    """A mounted snapshot of `tree` on a disk whose behaviour the test controls."""

    def __init__(self, casfs: Casfs, folder: Path, interposer: Path) -> None:
        self.casfs = casfs
        self.folder = folder
        self.at = folder / "mount"
        self.log = folder / "log"
        self.contents = {
            name: random.Random(name).randbytes(5 * MIB) for name in ("one", "two", "three")
        }
        (folder / "tree").mkdir()
        for name, content in self.contents.items():
            (folder / "tree" / name).write_bytes(content)
        casfs.backup("tree", cwd=folder)
        self.at.mkdir()
        env = {"LD_PRELOAD": str(interposer), "CASFS_TEST_DISK": str(folder)}
        casfs.run("mount", "--log-file", self.log, "latest", self.at, env=env)
        (self.server,) = processes_naming(self.at)

    def be(self, what: str) -> None:
        (self.folder / what).touch()

    def recover(self, what: str) -> None:
        (self.folder / what).unlink(missing_ok=True)

    def is_waiting(self) -> bool:
        return (self.folder / "waiting").exists()

    def read(self, name: str) -> bytes:
        return (self.at / "tree" / name).read_bytes()


@pytest.fixture
def disk(repository: Casfs, tmp_path: Path, interposer: Path) -> Iterator[Disk]:
    disk = Disk(repository, tmp_path, interposer)
    try:
        assert disk.read("one") == disk.contents["one"]
        yield disk
    finally:
        disk.recover("silent")
        disk.recover("broken")
        unmount_by_force(disk.at)


def test_a_disk_read_error_reaches_the_reader_and_ends_with_the_fault(disk: Disk) -> None:
    disk.be("broken")
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            disk.read("two")
    assert disk.read("one") == disk.contents["one"], "what the kernel has it keeps"
    assert sorted(os.listdir(disk.at / "tree")) == ["one", "three", "two"]
    assert "tree/two" in disk.log.read_text()
    disk.recover("broken")

    def is_back() -> bool:
        try:
            return disk.read("two") == disk.contents["two"]
        except OSError:
            return False

    wait_until(is_back, "the file is readable again")


def test_a_reader_that_waits_for_the_disk_delays_no_other(disk: Disk) -> None:
    got: list[bytes] = []
    disk.be("silent")
    readers = [threading.Thread(target=lambda: got.append(disk.read("two"))) for _ in range(12)]
    for reader in readers:
        reader.start()
    wait_until(disk.is_waiting, "a read waits for the disk")
    assert disk.read("one") == disk.contents["one"]
    assert len(os.listdir(disk.at / "tree")) == 3
    assert os.getxattr(disk.at / "tree/three", "user.casfs.capture") == b"stable"
    assert os.statvfs(disk.at).f_files >= 4
    assert got == []
    disk.recover("silent")
    for reader in readers:
        reader.join(60)
    assert got == [disk.contents["two"]] * 12


def test_a_reader_that_waits_for_the_disk_can_be_killed(disk: Disk) -> None:
    disk.be("silent")
    reader = subprocess.Popen(["cat", str(disk.at / "tree/two")], stdout=subprocess.DEVNULL)
    wait_until(disk.is_waiting, "it waits for the disk")
    reader.kill()
    assert reader.wait(60) == -9, "while the disk is still silent"
    assert disk.read("one") == disk.contents["one"]
    disk.recover("silent")
    assert disk.read("two") == disk.contents["two"]


def test_a_signal_ends_the_mount_while_the_disk_is_silent(disk: Disk) -> None:
    disk.be("silent")
    reader = subprocess.Popen(
        ["cat", str(disk.at / "tree/two")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    wait_until(disk.is_waiting, "it waits for the disk")
    os.kill(disk.server, 15)
    wait_until(lambda: not is_mounted(disk.at), "it is unmounted")
    _, printed = reader.communicate(timeout=60)
    assert reader.returncode == 1
    assert printed
    wait_until(lambda: not processes_naming(disk.at), "and the server is gone")
