"""The filter by host, tags and paths, shared by listing, `forget` and `latest`."""

from __future__ import annotations

from dataclasses import dataclass

from casfs.format.snapshot import Snapshot
from casfs.paths import normalize_source_path


@dataclass(frozen=True, slots=True)
class SnapshotFilter:
    """The conditions that a snapshot has to meet; an empty field accepts every snapshot.

    A snapshot needs one of the `hosts`, all tags of one of the sets in `tags`, and all of the `paths`.
    """

    hosts: tuple[str, ...] = ()
    tags: tuple[frozenset[str], ...] = ()
    paths: tuple[bytes, ...] = ()

    def accepts(self, snapshot: Snapshot) -> bool:
        """Return whether a snapshot meets all conditions."""
        return (
            (not self.hosts or snapshot.host in self.hosts)
            and (not self.tags or any(wanted <= set(snapshot.tags) for wanted in self.tags))
            and {normalize_source_path(path) for path in self.paths} <= set(snapshot.paths)
        )

    def is_empty(self) -> bool:
        """Return whether the filter accepts every snapshot."""
        return not (self.hosts or self.tags or self.paths)


ALL_SNAPSHOTS = SnapshotFilter()
