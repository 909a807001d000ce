"""FUSE file systems whose server answers some requests and then no more, mounted by hand (as root).

The server is a process of its own: when it ends, the kernel ends everything that waits for its answers.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.mounts import unmount_by_force

LOOKUP, GETATTR, OPEN, READ, RELEASE, FLUSH, INIT = 1, 3, 14, 15, 18, 25, 26
OPENDIR, READDIR, RELEASEDIR, FORGET, INTERRUPT, BATCH_FORGET = 27, 28, 29, 2, 36, 42
_UNANSWERED = (FORGET, INTERRUPT, BATCH_FORGET)

_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_ENOSYS, _ENOENT = 38, 2
_ROOT = 1
_FILES = {b"a": b"first", b"b": b"second", b"c": b"third"}
_TIME_S = 1_500_000_000


def _attributes(node: int) -> bytes:
    names = sorted(_FILES)
    is_root = node == _ROOT
    size = 0 if is_root else len(_FILES[names[node - 2]])
    mode = stat.S_IFDIR | 0o755 if is_root else stat.S_IFREG | 0o644
    times = (_TIME_S, _TIME_S, _TIME_S, 0, 0, 0)
    return struct.pack("<QQQ3Q3I7I", node, size, 1, *times, mode, 1, 0, 0, 0, 4096, 0)


def _answer(opcode: int, node: int, body: bytes) -> bytes | int:
    names = sorted(_FILES)
    if opcode == INIT:
        return struct.pack("<IIIIHHIIHHI28x", 7, 31, 65536, 0, 16, 12, 65536, 1, 1, 0, 0)
    if opcode == GETATTR:
        return struct.pack("<QII", 0, 0, 0) + _attributes(node)
    if opcode == LOOKUP:
        name = body.rstrip(b"\0")
        if name not in names:
            return _ENOENT
        found = names.index(name) + 2
        return struct.pack("<QQQQII", found, 1, 0, 0, 0, 0) + _attributes(found)
    if opcode in (OPEN, OPENDIR):
        return struct.pack("<QII", 7, 0, 0)
    if opcode == READDIR:
        offset = struct.unpack_from("<QQ", body)[1]
        entries = b""
        for number, name in enumerate(names[offset:], int(offset) + 1):
            entry = struct.pack("<QQII", number + 1, number, len(name), 8) + name
            entries += entry + bytes(-len(entry) % 8)
        return entries
    if opcode == READ:
        return _FILES[names[node - 2]]
    if opcode in (RELEASE, RELEASEDIR, FLUSH):
        return b""
    return _ENOSYS


def _serve(mountpoint: str, last: str) -> None:
    """Mount, print a line, and answer until a request of the opcode and node that `last` names."""
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"silent", mountpoint.encode(), b"fuse", 0, options) != 0:
        sys.exit(os.strerror(ctypes.get_errno()))
    print("mounted", flush=True)
    opcode, node = map(int, last.split(","))
    while opcode:
        request = os.read(device, 1 << 17)
        _, asked, unique, target, *_ = _IN.unpack_from(request)
        if (asked, target) == (opcode, node):
            print("silent", flush=True)
            break
        if asked in _UNANSWERED:
            continue
        answer = _answer(asked, target, request[_IN.size :])
        error, data = (-answer, b"") if isinstance(answer, int) else (0, answer)
        os.write(device, _OUT.pack(_OUT.size + len(data), error, unique) + data)
    sys.stdin.read()


@contextmanager
def silent_mount(at: Path, last: tuple[int, int] = (0, 0)) -> Iterator[subprocess.Popen[str]]:
    """Mount files `a`, `b` and `c` whose server stops when it has read a request of this opcode and node.

    Without one it never reads any. Node 1 is the root, 2 to 4 are the files. The server prints a line when it
    stops.
    """
    at.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.support.silent_mounts", str(at), f"{last[0]},{last[1]}"]
    server = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "mounted\n"
        yield server
    finally:
        server.kill()
        server.communicate()
        unmount_by_force(at)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2])
