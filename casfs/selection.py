"""What a backup takes: the paths that were named, as one tree of places below the snapshot's root.

An absolute path is kept whole, a relative one as given; `..` is resolved first, and a relative path
that leads out of the current directory is kept as the absolute path that it means.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(slots=True)
class Place:
    """A name on the way to sources: `whole` means that it and all below it was asked for.

    `source` is where it is in the file system.
    """

    source: bytes
    whole: bool = False
    below: dict[bytes, Place] = field(default_factory=dict)

    def sources(self) -> Iterator[bytes]:
        """Yield the sources at and below this place."""
        if self.whole:
            yield self.source
            return
        for name in sorted(self.below):
            yield from self.below[name].sources()


def select(paths: list[bytes]) -> Place:
    """Return the root of the tree of places for the paths that a user named."""
    kept = [keep_path(path) for path in paths]
    absolute = any(path.startswith(b"/") for path in kept)
    root = Place(b"/" if absolute else b".")
    for path in kept:
        place = root
        source = b"/" if path.startswith(b"/") else b""
        for name in path.strip(b"/").split(b"/"):
            if not name or name == b".":
                continue
            source = os.path.join(source, name)
            place = place.below.setdefault(name, Place(source))
        place.whole = True
    return root


def keep_path(path: bytes) -> bytes:
    """Return a path as it is kept: without `..`, doubled slashes and slashes at the end."""
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
