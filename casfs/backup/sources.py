"""What a backup takes: the paths that were named, as one tree of places below the snapshot's root.

An absolute path is kept whole, a relative one as given; `..` is resolved first, and a relative path
that leads out of the current directory is kept as the absolute path that it means.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from casfs.display import escape_path
from casfs.errors import UsageError
from casfs.paths import normalize_source_path


@dataclass(slots=True)
class SourceNode:
    """A name on the way to sources: `is_source` means that it and all below it was asked for.

    `source` is where it is in the file system.
    """

    source: bytes
    is_source: bool = False
    children: dict[bytes, SourceNode] = field(default_factory=dict)

    def sources(self) -> Iterator[bytes]:
        """Yield the sources at and below this place."""
        if self.is_source:
            yield self.source
            return
        for name in sorted(self.children):
            yield from self.children[name].sources()


def build_source_tree(paths: list[bytes]) -> SourceNode:
    """Return the root of the tree of places for the paths that a user named.

    Raises UsageError where two different sources would have the same path in the snapshot, as `/etc/x`
    and a relative `etc/x` have: only one of them could be kept.
    """
    kept = [normalize_source_path(path) for path in paths]
    absolute = any(path.startswith(b"/") for path in kept)
    root = SourceNode(b"/" if absolute else b".")
    for path in kept:
        place = root
        source = b"/" if path.startswith(b"/") else b""
        for name in _names(path):
            source = os.path.join(source, name)
            place = place.children.setdefault(name, SourceNode(source))
        if not place.is_source:
            place.source = source or b"."
            place.is_source = True
    for path in kept:
        _refuse_other_source(root, path)
    return root


def _refuse_other_source(root: SourceNode, path: bytes) -> None:
    place = root
    names = _names(path)
    for depth in range(len(names) + 1):
        if place.is_source:
            source = os.path.normpath(os.path.join(place.source, *names[depth:]))
            if source != path and os.path.abspath(source) != os.path.abspath(path):
                raise UsageError(
                    f"{escape_path(place.source)} and {escape_path(path)} are different places "
                    "that would share a path in the snapshot; back them up apart"
                )
        if depth < len(names):
            place = place.children[names[depth]]


def _names(path: bytes) -> list[bytes]:
    return [name for name in path.split(b"/") if name not in (b"", b".")]
