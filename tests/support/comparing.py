"""Comparison of trees, by rsync and by a comparison of our own that sees more.

rsync compares times in whole seconds and knows nothing of holes; our comparison sees nanoseconds,
the groups of hard links, and (on request) where the holes are.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Look:
    """Everything about one entry of a tree that a backup must keep."""

    kind: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    device: int
    links: int
    target: bytes
    digest: bytes
    attributes: tuple[tuple[bytes, bytes], ...]
    twins: tuple[bytes, ...]

    def differences(self, other: Look) -> list[str]:
        return [
            f"{slot.name}: {getattr(self, slot.name)!r} -> {getattr(other, slot.name)!r}"[:400]
            for slot in fields(self)
            if getattr(self, slot.name) != getattr(other, slot.name)
        ]


def look_at(root: Path | bytes) -> dict[bytes, Look]:
    """Describe a whole tree by the path of each entry below `root` (b"" for the root itself)."""
    top = os.fsencode(root)
    paths = [b""]
    for folder, directories, files in os.walk(top, onerror=_raise):
        inside = folder[len(top) + 1 :]
        paths += [os.path.join(inside, name) for name in directories + files]
    states = {path: os.lstat(os.path.join(top, path)) for path in paths}
    groups: dict[tuple[int, int], list[bytes]] = {}
    for path in sorted(paths):
        state = states[path]
        if state.st_nlink > 1 and not stat.S_ISDIR(state.st_mode):
            groups.setdefault((state.st_dev, state.st_ino), []).append(path)
    return {
        path: _look(os.path.join(top, path) if path else top, state, groups)
        for path, state in states.items()
    }


def _raise(error: OSError) -> None:
    raise error


def _look(path: bytes, state: os.stat_result, groups: dict[tuple[int, int], list[bytes]]) -> Look:
    regular, directory = stat.S_ISREG(state.st_mode), stat.S_ISDIR(state.st_mode)
    return Look(
        kind=stat.S_IFMT(state.st_mode),
        mode=stat.S_IMODE(state.st_mode),
        uid=state.st_uid,
        gid=state.st_gid,
        size=0 if directory else state.st_size,
        mtime_ns=state.st_mtime_ns,
        device=state.st_rdev,
        links=0 if directory else state.st_nlink,
        target=os.readlink(path) if stat.S_ISLNK(state.st_mode) else b"",
        digest=_digest(path) if regular else b"",
        attributes=_attributes(path),
        twins=tuple(groups.get((state.st_dev, state.st_ino), ())),
    )


def _attributes(path: bytes) -> tuple[tuple[bytes, bytes], ...]:
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        # A mount of a snapshot without any attribute supports none.
        assert error.errno == errno.ENOTSUP, error
        names = []
    return tuple(
        (os.fsencode(name), os.getxattr(path, name, follow_symlinks=False))
        for name in sorted(names)
    )


def _digest(path: bytes) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def differences(expected: dict[bytes, Look], found: dict[bytes, Look]) -> list[str]:
    """Return the differences of `found`, one line per entry; none when the trees are the same."""
    lines = [f"missing: {path!r}" for path in sorted(expected.keys() - found.keys())]
    lines += [f"unexpected: {path!r}" for path in sorted(found.keys() - expected.keys())]
    for path in sorted(expected.keys() & found.keys()):
        if expected[path] != found[path]:
            lines.append(f"{path!r}: {'; '.join(expected[path].differences(found[path]))}")
    return lines


def tree_differences(expected: Path, found: Path) -> list[str]:
    return differences(look_at(expected), look_at(found))


def rsync_differences(source: Path, copy: Path) -> str:
    """Return the changes that `rsync` would still make, with the options that the documents promise."""
    done = subprocess.run(
        ["rsync", "-aHAXnc", "--delete", "--itemize-changes", f"{source}/", f"{copy}/"],
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode(errors="backslashreplace")
    return (done.stdout + done.stderr).decode(errors="backslashreplace")


def extents(path: Path | bytes) -> list[tuple[int, int]]:
    """Return where a file has data, as (start, end); what lies between is holes."""
    found = []
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        end = 0
        while end < size:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found.append((start, end))
    return found


def stored_bytes(path: Path | bytes) -> int:
    """Return how much room a file takes on its disk."""
    return os.stat(path).st_blocks * 512
