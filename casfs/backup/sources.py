"""What a backup takes: the paths that were named, as one tree of places below the snapshot's root.

An absolute path is kept whole, a relative one as given; `..` is resolved first, and a relative path
that leads out of the current directory is kept as the absolute path that it means.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from casfs.display import shown
from casfs.errors import UsageError
from casfs.paths import normalize_source_path


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
    """Return the root of the tree of places for the paths that a user named.

    Raises UsageError where two different sources would have the same path in the snapshot, as `/etc/x`
    and a relative `etc/x` have: only one of them could be kept.
    """
    kept = [normalize_source_path(path) for path in paths]
    absolute = any(path.startswith(b"/") for path in kept)
    root = Place(b"/" if absolute else b".")
    for path in kept:
        place = root
        source = b"/" if path.startswith(b"/") else b""
        for name in _names(path):
            source = os.path.join(source, name)
            place = place.below.setdefault(name, Place(source))
        if not place.whole:
            place.source = source or b"."
            place.whole = True
    for path in kept:
        _refuse_other_source(root, path)
    return root


def _refuse_other_source(root: Place, path: bytes) -> None:
    place = root
    names = _names(path)
    for depth in range(len(names) + 1):
        if place.whole:
            source = os.path.normpath(os.path.join(place.source, *names[depth:]))
            if source != path and os.path.abspath(source) != os.path.abspath(path):
                raise UsageError(
                    f"{shown(place.source)} and {shown(path)} are different places that would share "
                    "a path in the snapshot; back them up apart"
                )
        if depth < len(names):
            place = place.below[names[depth]]


def _names(path: bytes) -> list[bytes]:
    return [name for name in path.split(b"/") if name not in (b"", b".")]
