"""A mount whose disk fails or does not answer while a test wants it to.

The disk is the real one. A library loaded before the C library intercepts the reads of packs by the
mount's server, and fails or delays them while a control file exists.
"""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

from tests.support.cli import Argument, Casfs
from tests.support.mounts import processes_naming, unmount_by_force

MIB = 1 << 20

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
    if (!strstr(path, "/packs/") && !strstr(path, "/meta/")) return 0;
    if (is_there("silent")) {
        char waiting[4096];
        snprintf(waiting, sizeof waiting, "%s/waiting", getenv("CASFS_TEST_DISK"));
        while (is_there("silent")) {
            close(open(waiting, O_CREAT | O_WRONLY, 0600));
            usleep(2000);
        }
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


def build_interposer(folder: Path) -> Path:
    """Compile the library into a folder and return its path."""
    (folder / "disk.c").write_text(_INTERPOSER)
    command = ["gcc", "-shared", "-fPIC", "-O1", "-o", "disk.so", "disk.c", "-ldl"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "disk.so"


class Disk:
    """A snapshot of `tree` on a disk whose behaviour the test controls; `mount` mounts it."""

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
        self._environment = {"LD_PRELOAD": str(interposer), "CASFS_TEST_DISK": str(folder)}
        self.server = 0

    def mount(self, *options: Argument) -> None:
        arguments = ("mount", "--log-file", self.log, *options, "latest", self.at)
        self.casfs.run(*arguments, env=self._environment)
        (self.server,) = processes_naming(self.at)

    def be(self, what: str) -> None:
        (self.folder / "waiting").unlink(missing_ok=True)
        (self.folder / what).touch()

    def recover(self, what: str) -> None:
        (self.folder / what).unlink(missing_ok=True)

    def is_waiting(self) -> bool:
        return (self.folder / "waiting").exists()

    def read(self, name: str) -> bytes:
        return (self.at / "tree" / name).read_bytes()

    def close(self) -> None:
        """Let the disk answer, and detach the mount if it is still there."""
        self.recover("silent")
        self.recover("broken")
        unmount_by_force(self.at)
