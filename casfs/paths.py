"""Paths of entries inside a snapshot, and of sources as a snapshot records them. Paths are bytes."""

from __future__ import annotations

import os

from casfs.errors import UsageError


def join(above: bytes, name: bytes) -> bytes:
    """Return the path of the entry `name` of a directory; the path of a snapshot's root is empty."""
    return above + b"/" + name if above else name


def split(path: bytes) -> list[bytes]:
    """Return the components of a path; as lists, paths compare in the order of a walk."""
    return [name for name in path.split(b"/") if name not in (b"", b".")]


def parse_snapshot_path(text: str) -> bytes:
    """Return the normalized path inside a snapshot; raise UsageError for a path with `..`."""
    names = split(os.fsencode(text))
    if b".." in names:
        raise UsageError(f"{text!r} contains '..', which a path inside a snapshot must not")
    return b"/".join(names)


def normalize_source_path(path: bytes) -> bytes:
    """Return a source path as a snapshot records it: without `..`, double slashes and trailing slashes.

    `..` is resolved in the file system. A relative path that leads out of the current directory becomes
    absolute. Raises UsageError for an empty path, which otherwise would name the current directory, and for
    one with a NUL byte, which no path has.
    """
    if not path:
        raise UsageError("a source path is empty")
    if b"\0" in path:
        raise UsageError(f"the source path {path!r} has a NUL byte")
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
