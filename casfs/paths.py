"""Paths: of entries inside a snapshot, and of sources as a snapshot keeps them. Paths are bytes."""

from __future__ import annotations

import os

from casfs.errors import UsageError


def join(above: bytes, name: bytes) -> bytes:
    """Return the path of an entry of a directory; the path of a snapshot's root is empty."""
    return above + b"/" + name if above else name


def split(path: bytes) -> list[bytes]:
    """Return the names on the way to an entry; those of two paths compare in the order of a walk."""
    return [name for name in path.split(b"/") if name not in (b"", b".")]


def parse_snapshot_path(text: str) -> bytes:
    """Return the path that a user named inside a snapshot; raise UsageError for one with `..`."""
    names = split(os.fsencode(text))
    if b".." in names:
        raise UsageError(f"a path inside a snapshot has no ..: {text!r}")
    return b"/".join(names)


def normalize_source_path(path: bytes) -> bytes:
    """Return a path as a snapshot keeps it: without `..`, doubled slashes and slashes at the end.

    `..` is resolved in the file system. A relative path that leads out of the current directory becomes
    absolute. Raises UsageError for an empty path, which would otherwise mean the current directory.
    """
    if not path:
        raise UsageError("an empty path names nothing to back up")
    parts = path.split(b"/")
    if b".." in parts:
        last = len(parts) - parts[::-1].index(b"..")
        resolved = os.path.realpath(b"/".join(parts[:last]))
        path = os.path.join(resolved, *parts[last:])
        here = os.path.realpath(b".")
        if parts[0] != b"" and (path + b"/").startswith(here.rstrip(b"/") + b"/"):
            path = os.path.relpath(path, here)
    normal = os.path.normpath(path)
    return normal[1:] if normal.startswith(b"//") else normal
