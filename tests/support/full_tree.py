"""A tree that holds everything a backup must carry.

`build` makes what the file system and the privileges allow and returns what they did not, by name
and with the reason, so that a test can insist that nothing was left out.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import stat
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

MIB = 1 << 20
CROWD = 20_000
DEPTH = 200
STRANGER = 12345
STRANGERS = 54321

# 1960-01-01 and 2100-01-01, neither on a full second.
BEFORE_THE_EPOCH_NS = -315_619_200 * 10**9 + 123_456_789
AFTER_2038_NS = 4_102_444_800 * 10**9 + 987_654_321

HOSTILE_NAMES: tuple[bytes, ...] = (
    b" ",
    b" leading space",
    b"trailing space ",
    b"two\nlines",
    b"\n",
    b"carriage\rreturn",
    b"tab\tstop",
    b"\x1b[2J\x1b[31mred",
    b"\x01\x02\x7f",
    b"-rf",
    b"--delete",
    b"-",
    b"not utf-8 \xff\xfe",
    b"\xc3",
    b"latin1 caf\xe9",
    "café composed".encode(),
    "cafe\u0301 decomposed".encode(),
    "右から左 \u202egnp.exe".encode(),
    "c1 control \x9b31m".encode(),
    b"a:b",
    b"latest",
    b"~",
    b"...",
    b"..data",
    b".hidden",
    b".casfs",
    b"!negated",
    b"#comment",
    b"*",
    b"[a-z]",
    b"?",
    b"back\\slash",
    b"'single' \"double\" `back`",
    b"$HOME $(id)",
    b"{a,b}",
    b"%s%n",
    b"x" * 255,
    ("\u00e9" * 127 + "y").encode(),
    b"\xff" * 255,
)


@dataclass(slots=True)
class Builder:
    """Collects what could not be made, and the directories whose mtime is set at the end."""

    root: bytes
    left_out: dict[str, str] = field(default_factory=dict)
    dice: random.Random = field(default_factory=lambda: random.Random(20090117))

    def path(self, *parts: bytes) -> bytes:
        return os.path.join(self.root, *parts)

    def folder(self, *parts: bytes) -> bytes:
        where = self.path(*parts)
        os.makedirs(where, exist_ok=True)
        return where

    def attempt(self, feature: str, make: Callable[[], object]) -> None:
        """Make one thing; where this machine cannot, note why instead."""
        try:
            make()
        except OSError as error:
            self.left_out[feature] = f"{error.strerror} ({errno.errorcode.get(error.errno or 0)})"
        except subprocess.CalledProcessError as error:
            self.left_out[feature] = f"{error.cmd}: {error.stderr!r}"


def write(path: bytes, data: bytes = b"") -> bytes:
    with open(path, "wb") as file:
        file.write(data)
    return path


def run(*command: str | bytes) -> None:
    subprocess.run(command, check=True, capture_output=True)


def bind(listener: socket.socket, folder: Path | bytes, name: str) -> None:
    """Bind a socket in a folder whose path may be longer than the address of a socket."""
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        listener.bind(f"/proc/self/fd/{directory}/{name}")
    finally:
        os.close(directory)


def build(root: Path) -> dict[str, str]:
    """Build the tree at `root`, which must not exist; return the features left out, with the reasons."""
    builder = Builder(os.fsencode(root))
    os.mkdir(builder.root)
    for part in (
        _contents,
        _names,
        _owners,
        _links,
        _sparse_files,
        _attributes,
        _access_lists,
        _capabilities,
        _special_files,
        _crowd,
        _deep,
        _modes,
        _times,
    ):
        part(builder)
    os.sync()
    return builder.left_out


def _contents(builder: Builder) -> None:
    where = builder.folder(b"contents")
    for size in (0, 1, 2, 4095, 4096, 4097):
        write(os.path.join(where, b"random-%d" % size), builder.dice.randbytes(size))
    for kib in (256, 512, 1024, 4096):
        for edge in (-1, 0, 1):
            size = (kib << 10) + edge
            write(os.path.join(where, b"random-%d" % size), builder.dice.randbytes(size))
    several = builder.dice.randbytes(9 * MIB + 12345)
    write(os.path.join(where, b"random-several"), several)
    write(os.path.join(where, b"random-several-again"), several)
    write(os.path.join(where, b"random-several-shifted"), b"shift" + several)
    lines = b"".join(b"line %d of a file that shrinks well\n" % n for n in range(200_000))
    write(os.path.join(where, b"compressible"), lines)
    write(os.path.join(where, b"zeros"), bytes(3 * MIB + 1))
    write(os.path.join(where, b"one-block-repeated"), builder.dice.randbytes(4096) * 512)
    builder.folder(b"contents", b"empty directory")


def _names(builder: Builder) -> None:
    where = builder.folder(b"names")
    for name in HOSTILE_NAMES:
        builder.attempt(f"name {name!r}", partial(write, os.path.join(where, name), name))
    single = builder.folder(b"names", b"single bytes")
    for code in set(range(1, 256)) - {ord("/"), ord(".")}:
        name = bytes([code])
        builder.attempt(f"name {name!r}", partial(write, os.path.join(single, name), name))
    folders = builder.folder(b"names", b"as directories")
    for name in HOSTILE_NAMES:
        builder.attempt(f"directory {name!r}", partial(_inhabited, builder, folders, name))


def _inhabited(builder: Builder, where: bytes, name: bytes) -> None:
    write(os.path.join(builder.folder(where, name), name), name)


def _modes(builder: Builder) -> None:
    """Comes late: what is made in a directory of mode 000 must be there before."""
    where = builder.folder(b"modes")
    modes = (0o000, 0o001, 0o200, 0o444, 0o600, 0o777, 0o1644, 0o2755, 0o4755, 0o6711, 0o7777)
    for mode in modes:
        os.chmod(write(os.path.join(where, b"file-%04o" % mode), b"mode"), mode)
        directory = builder.folder(b"modes", b"directory-%04o" % mode)
        write(os.path.join(directory, b"inside"), b"%o" % mode)
        os.chmod(directory, mode)


def _owners(builder: Builder) -> None:
    where = builder.folder(b"owners")

    def owned(name: bytes, uid: int, gid: int, mode: int) -> None:
        path = write(os.path.join(where, name), name)
        os.chown(path, uid, gid)
        os.chmod(path, mode)  # after chown, which takes setuid away

    def belongings() -> None:
        owned(b"stranger", STRANGER, STRANGERS, 0o640)
        owned(b"setuid of a stranger", STRANGER, STRANGERS, 0o4750)
        owned(b"setgid of a stranger", STRANGER, STRANGERS, 0o2750)
        owned(b"big number", 4_000_000_000, 4_000_000_001, 0o600)
        os.symlink(b"stranger", os.path.join(where, b"link"))
        os.chown(os.path.join(where, b"link"), STRANGER, STRANGERS, follow_symlinks=False)
        inherited = builder.folder(b"owners", b"setgid directory")
        write(os.path.join(inherited, b"made before"), b"keeps its own group")
        os.chown(inherited, 0, STRANGERS)
        os.chmod(inherited, 0o2775)
        write(os.path.join(inherited, b"made after"), b"inherits the group")

    builder.attempt("owners", belongings)


def _links(builder: Builder) -> None:
    where = builder.folder(b"links")
    write(os.path.join(where, b"target"), b"pointed at")
    builder.folder(b"links", b"directory")
    for name, target in (
        (b"to a file", b"target"),
        (b"to a directory", b"directory"),
        (b"dangling", b"nowhere/at all"),
        (b"absolute", b"/etc/hostname"),
        (b"upwards", b"../../.."),
        (b"to itself", b"to itself"),
        (b"not utf-8", b"\xff\xfe/caf\xe9"),
        (b"hostile", b"two\nlines\x1b[2J"),
        (b"long", b"long/" * 800),
    ):
        os.symlink(target, os.path.join(where, name))

    hard = builder.folder(b"hard links")
    other = builder.folder(b"hard links", b"other directory")
    write(os.path.join(hard, b"first"), b"one file under several names")
    os.link(os.path.join(hard, b"first"), os.path.join(hard, b"second"))
    os.link(os.path.join(hard, b"first"), os.path.join(other, b"third"))
    write(os.path.join(hard, b"big first"), builder.dice.randbytes(2 * MIB))
    os.link(os.path.join(hard, b"big first"), os.path.join(other, b"big second"))
    write(os.path.join(hard, b"empty first"))
    os.link(os.path.join(hard, b"empty first"), os.path.join(hard, b"empty second"))
    # The same content, and a file of its own.
    write(os.path.join(hard, b"twin"), b"one file under several names")

    def symlink() -> None:
        os.symlink(b"anywhere", os.path.join(hard, b"symlink first"))
        os.link(
            os.path.join(hard, b"symlink first"),
            os.path.join(other, b"symlink second"),
            follow_symlinks=False,
        )

    def fifo() -> None:
        os.mkfifo(os.path.join(hard, b"fifo first"))
        os.link(os.path.join(hard, b"fifo first"), os.path.join(other, b"fifo second"))

    builder.attempt("hard-linked symlink", symlink)
    builder.attempt("hard-linked FIFO", fifo)


def _sparse_files(builder: Builder) -> None:
    where = builder.folder(b"sparse")
    data = builder.dice.randbytes(MIB)
    hole = 24 * MIB

    def sparse(name: bytes, size: int, *offsets: int) -> None:
        with open(os.path.join(where, name), "wb") as file:
            file.truncate(size)
            for offset in offsets:
                file.seek(offset)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        file_state = os.stat(os.path.join(where, name))
        if file_state.st_blocks * 512 >= size:
            raise OSError(errno.EOPNOTSUPP, "the file system keeps no holes")

    def all_kinds() -> None:
        sparse(b"hole at the start", hole + MIB, hole)
        sparse(b"hole in the middle", hole + 2 * MIB, 0, hole + MIB)
        sparse(b"hole at the end", hole + MIB, 0)
        sparse(b"several holes", 4 * hole, hole, 2 * hole, 3 * hole)
        sparse(b"wholly a hole", 256 * MIB)
        sparse(b"wholly a hole, odd size", 8 * MIB + 1)
        sparse(b"small hole", 64 * 1024)

    builder.attempt("sparse files", all_kinds)


def _attributes(builder: Builder) -> None:
    where = builder.folder(b"attributes")
    file = write(os.path.join(where, b"file"), b"with attributes")
    directory = builder.folder(b"attributes", b"directory")
    link = os.path.join(where, b"link")
    os.symlink(b"file", link)
    fifo = os.path.join(where, b"fifo")
    os.mkfifo(fifo)
    big = write(os.path.join(where, b"big value"))

    def set_on(path: bytes, name: bytes, value: bytes) -> None:
        os.setxattr(path, name, value, follow_symlinks=False)

    def user() -> None:
        for path in (file, directory):
            set_on(path, b"user.plain", b"value")
            set_on(path, b"user.empty", b"")
            set_on(path, b"user.binary", bytes(range(256)))
            set_on(path, b"user.caf\xe9\xff", b"a name that is not UTF-8")

    def as_large_as_possible() -> None:
        for size in (60_000, 30_000, 4_000, 3_000):
            try:
                set_on(big, b"user.big", builder.dice.randbytes(size))
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.E2BIG):
                    raise
            else:
                return
        raise OSError(errno.ENOSPC, "no big value fits")

    def trusted() -> None:
        for path in (file, directory, link, fifo):
            set_on(path, b"trusted.casfs-test", b"\x00trusted\xff")

    def security() -> None:
        for path in (file, directory):
            set_on(path, b"security.casfs-test", b"kept")

    builder.attempt("user.* attributes", user)
    builder.attempt("a big attribute", as_large_as_possible)
    builder.attempt("trusted.* attributes", trusted)
    builder.attempt("security.* attributes", security)


def _access_lists(builder: Builder) -> None:
    where = builder.folder(b"access lists")
    file = write(os.path.join(where, b"file"), b"guarded")
    plain = write(os.path.join(where, b"mask narrower than the group"), b"guarded")
    directory = builder.folder(b"access lists", b"directory")

    def lists() -> None:
        run("setfacl", "-m", f"u:{STRANGER}:rw,g:{STRANGERS}:r,o::-", file)
        run("setfacl", "-m", f"u:{STRANGER}:rwx,g::rw,m::r", plain)
        run("setfacl", "-m", f"u:{STRANGER}:rwx", directory)
        run("setfacl", "-d", "-m", f"u:{STRANGER}:rx,g:{STRANGERS}:-,o::-", directory)
        write(os.path.join(directory, b"inherits"), b"made below a default ACL")
        os.mkdir(os.path.join(directory, b"inherits too"))
        bare = builder.folder(b"access lists", b"only a default")
        run("setfacl", "-d", "-m", f"u:{STRANGER}:rwx", bare)

    builder.attempt("POSIX ACLs", lists)


def _capabilities(builder: Builder) -> None:
    where = builder.folder(b"capabilities")
    file = write(os.path.join(where, b"ping"), b"#!/bin/sh\n")
    owned = write(os.path.join(where, b"owned by a stranger"), b"#!/bin/sh\n")

    def capabilities() -> None:
        os.chmod(file, 0o755)
        run("setcap", "cap_net_raw,cap_net_admin+ep", file)
        os.chown(owned, STRANGER, STRANGERS)
        os.chmod(owned, 0o4755)
        run("setcap", "cap_net_bind_service+eip", owned)

    builder.attempt("file capabilities", capabilities)


def _special_files(builder: Builder) -> None:
    where = builder.folder(b"special files")
    os.mkfifo(os.path.join(where, b"fifo"), 0o640)
    with socket.socket(socket.AF_UNIX) as listener:
        bind(listener, where, "socket")

    def devices() -> None:
        for name, kind, major, minor in (
            (b"null", stat.S_IFCHR, 1, 3),
            (b"big numbers", stat.S_IFCHR, 4000, 1_000_000),
            (b"loop", stat.S_IFBLK, 7, 200),
        ):
            os.mknod(os.path.join(where, name), kind | 0o660, os.makedev(major, minor))
        os.mknod(os.path.join(where, b"device 0"), stat.S_IFCHR | 0o600, os.makedev(0, 0))

    builder.attempt("devices", devices)


def _crowd(builder: Builder) -> None:
    where = builder.folder(b"crowd")
    directory = os.open(where, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for number in range(CROWD):
            name = f"{number * 7919 % CROWD:05d} of many"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            handle = os.open(name, flags, 0o644, dir_fd=directory)
            if number % 10 == 0:
                os.write(handle, b"%d\n" % number)
            os.close(handle)
    finally:
        os.close(directory)


def _deep(builder: Builder) -> None:
    where = builder.folder(b"deep", *[b"down%d" % (level % 10) for level in range(DEPTH)])
    write(os.path.join(where, b"bottom"), b"the end")


def _times(builder: Builder) -> None:
    """Comes last, because making anything in a directory sets its mtime."""
    where = builder.folder(b"times")
    stamps = {
        b"before the epoch": BEFORE_THE_EPOCH_NS,
        b"after 2038": AFTER_2038_NS,
        b"the epoch": 0,
        b"one nanosecond": 1,
        b"one nanosecond before": -1,
        b"nanoseconds": 1_234_567_890 * 10**9 + 123_456_789,
    }

    def stamp(path: bytes, when: int) -> None:
        os.utime(path, ns=(when, when), follow_symlinks=False)
        if os.lstat(path).st_mtime_ns != when:
            raise OSError(errno.ERANGE, f"the file system does not keep {when} ns")

    for name, when in stamps.items():

        def three_kinds(name: bytes = name, when: int = when) -> None:
            stamp(write(os.path.join(where, b"file " + name), b"time"), when)
            link = os.path.join(where, b"link " + name)
            os.symlink(b"nowhere", link)
            stamp(link, when)
            directory = builder.folder(b"times", b"directory " + name)
            write(os.path.join(directory, b"inside"), b"younger than its directory")
            stamp(directory, when)

        builder.attempt(f"time {name.decode()}", three_kinds)
    fixed = 1_300_000_000 * 10**9 + 111_111_111
    for offset, name in enumerate(sorted(os.listdir(builder.root))):
        stamp(builder.path(name), fixed + offset)
    stamp(builder.root, fixed - 1)
