"""Mountpoints: check a folder before mounting, find the mounts, and unmount.

The kernel's table of mounts is read, never the mounts themselves, which may hang. Every refusal is one
sentence that says what to do.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from casfs.display import escape_path
from casfs.errors import CasfsError, NotFoundError

FILE_SYSTEM_TYPE = "fuse.casfs"
HELPER = "fusermount3"
DEVICE = "/dev/fuse"
_DEVICE_NUMBER = os.makedev(10, 229)
_CONFIGURATION = Path("/etc/fuse.conf")
_UMOUNT_NOFOLLOW = 8
_UNMOUNT_TIMEOUT_S = 10.0
_ANSWER_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class MountRecord:
    """A line of the kernel's table of mounts."""

    path: bytes
    kind: str


def mounts() -> list[MountRecord]:
    """Return the mounts that this process sees; a later mount follows those that it covers."""
    records = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        before, _, after = line.partition(b" - ")
        path = re.sub(
            rb"\\([0-3][0-7]{2})", lambda match: bytes([int(match[1], 8)]), before.split(b" ")[4]
        )
        records.append(MountRecord(path, after.split(b" ")[0].decode("utf-8", "replace")))
    return records


def mounted_at(path: Path) -> MountRecord | None:
    """Return the topmost mount at exactly this path, or None."""
    wanted = os.fsencode(path)
    return next((found for found in reversed(mounts()) if found.path == wanted), None)


def real_path(path: Path) -> Path:
    """Return the absolute path without symbolic links; works for a mount whose server died too."""
    return Path(os.path.realpath(path))


def check_fuse(allow_other: bool) -> None:
    """Raise CasfsError if this machine or this user cannot mount with FUSE."""
    try:
        found = os.stat(DEVICE)
        has_device = stat.S_ISCHR(found.st_mode) and found.st_rdev == _DEVICE_NUMBER
    except OSError:
        has_device = False
    if not has_device:
        raise CasfsError(
            f"there is no FUSE on this machine: {DEVICE} is missing; load the kernel module fuse, or "
            "give the container that device"
        )
    if os.geteuid() == 0:
        return
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        raise CasfsError(f"this user may not use FUSE: {DEVICE} cannot be opened")
    if shutil.which(HELPER) is None:
        raise CasfsError(
            f"{HELPER} is not installed; only root can mount without it (package fuse3)"
        )
    if allow_other and not _users_may_allow_others():
        raise CasfsError(
            f"only root may mount with --allow-other, unless {_CONFIGURATION} has user_allow_other"
        )


def check_mountpoint(path: Path, repository: Path | None) -> Path:
    """Return the real path of a directory that can be mounted on; raise CasfsError otherwise.

    `repository` is the folder of a local repository.
    """
    real = real_path(path)
    name = escape_path(os.fsencode(path))
    record = mounted_at(real)
    try:
        status = os.stat(real)
        if record is not None and record.kind == FILE_SYSTEM_TYPE:
            _check_server(real)
    except OSError as error:
        if record is not None and error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
            raise CasfsError(
                f"{name} is still mounted, but its server has died; casfs umount {name} clears it"
            ) from error
        if error.errno == errno.ENOENT:
            raise NotFoundError(
                f"the mountpoint {name} does not exist; make that directory"
            ) from error
        raise CasfsError(f"cannot mount on {name}: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise CasfsError(f"cannot mount on {name}: it is not a directory")
    if record is not None and real != Path("/"):
        what = "a snapshot" if record.kind == FILE_SYSTEM_TYPE else f"a {record.kind} file system"
        raise CasfsError(
            f"{what} is mounted on {name} already; unmount it, or choose another directory"
        )
    if repository is None:
        return real
    home = real_path(repository)
    if real == home or home in real.parents:
        raise CasfsError(
            f"cannot mount on {name}: it is inside the repository {escape_path(bytes(home))}"
        )
    if real in home.parents:
        raise CasfsError(
            f"cannot mount on {name}: the repository {escape_path(bytes(home))} is inside it "
            "and would be hidden"
        )
    return real


@contextmanager
def held_mountpoint(real: Path) -> Iterator[Callable[[], None]]:
    """Hold the directory at a real path while it is mounted on; yield a check to call after mounting.

    Another user who owns a directory above it could exchange it for a symlink, and have another one covered.
    Both raise CasfsError where the directory is no longer at its path, the check also where the path is no
    mount of casfs.
    """
    name = escape_path(bytes(real))
    try:
        fd = os.open(real, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise CasfsError(f"cannot mount on {name}: {error.strerror}") from error

    def require_same() -> None:
        if os.readlink(b"/proc/self/fd/%d" % fd) != bytes(real):
            raise _exchanged_error(name)

    def require_mounted() -> None:
        require_same()
        record = mounted_at(real)
        if record is None or record.kind != FILE_SYSTEM_TYPE:
            raise _exchanged_error(name)

    try:
        require_same()
        yield require_mounted
    finally:
        os.close(fd)


def _exchanged_error(name: str) -> CasfsError:
    return CasfsError(
        f"{name} was exchanged for another directory while it was mounted; nothing is mounted. Choose a "
        "mountpoint in a folder that no other user can change"
    )


def _check_server(real: Path) -> None:
    """Send the mount a request that the kernel cannot answer itself; raise OSError if its server died.

    A server that does not answer within two seconds counts as alive.
    """
    errors: list[OSError] = []

    def ask() -> None:
        try:
            os.statvfs(real)
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_ANSWER_TIMEOUT_S)
    if errors:
        raise errors[0]


def unmount(path: Path) -> Path:
    """Unmount a casfs mount, wait until it is gone, and return its real path.

    Raises NotFoundError if nothing is mounted there; CasfsError if the mount is busy, belongs to another
    program, or cannot be unmounted by this user.
    """
    real = real_path(path)
    name = escape_path(os.fsencode(path))
    record = mounted_at(real)
    if record is None:
        raise NotFoundError(f"nothing is mounted on {name}")
    if record.kind != FILE_SYSTEM_TYPE:
        raise CasfsError(f"{name} is a mount of {record.kind}, not of casfs; use umount for it")
    before = _count(real)
    problem = _unmount(real)
    if problem is not None:
        raise CasfsError(f"cannot unmount {name}: {problem}")
    deadline = time.monotonic() + _UNMOUNT_TIMEOUT_S
    while _count(real) >= before:
        if time.monotonic() > deadline:
            raise CasfsError(f"{name} is still mounted after {_UNMOUNT_TIMEOUT_S:.0f} seconds")
        time.sleep(0.01)
    return real


def _unmount(real: Path) -> str | None:
    """Unmount; return None, or the reason why that failed."""
    if os.geteuid() == 0:
        library = ctypes.CDLL(None, use_errno=True)
        if library.umount2(os.fsencode(real), _UMOUNT_NOFOLLOW) == 0:
            return None
        code = ctypes.get_errno()
        return _describe_users(real) if code == errno.EBUSY else os.strerror(code)
    try:
        done = subprocess.run(
            [HELPER, "-u", "--", os.fsencode(real)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except FileNotFoundError:
        return f"{HELPER} is not installed; only root can do without it"
    if done.returncode == 0:
        return None
    if b"busy" in done.stderr.lower():
        return _describe_users(real)
    return escape_path(done.stderr.strip().replace(b"\n", b"; "))


def _count(path: Path) -> int:
    wanted = os.fsencode(path)
    return sum(found.path == wanted for found in mounts())


def _describe_users(real: Path) -> str:
    below = [found.path for found in mounts() if found.path.startswith(bytes(real) + b"/")]
    if below:
        return f"it is busy: {escape_path(below[0])} is mounted below it"
    users = sorted(set(_users_of(real)))
    if not users:
        return "it is busy: a program uses it"
    listed = ", ".join(f"{escape_path(program)} (process {pid})" for pid, program in users[:5])
    more = f" and {len(users) - 5} more" if len(users) > 5 else ""
    return f"it is busy: used by {listed}{more}"


def _users_of(real: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the visible processes but this one that have their working folder or an open file in a mount."""
    inside = bytes(real) + b"/"
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            links = [
                process / "cwd",
                process / "root",
                process / "exe",
                *(process / "fd").iterdir(),
            ]
            for link in links:
                try:
                    target = os.readlink(bytes(link))
                except OSError:
                    continue
                if (target + b"/").startswith(inside):
                    yield int(process.name), (process / "comm").read_bytes().strip()
                    break
        except OSError:
            continue


def _users_may_allow_others() -> bool:
    try:
        text = _CONFIGURATION.read_text("utf-8", "replace")
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in text.splitlines())
