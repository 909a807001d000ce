"""The filter by host, tags and paths, shared by listing, `forget` and `latest`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

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
            and {normalize_source_path(path) for path in self.paths}
            <= {*snapshot.paths, *absolute_paths(snapshot)}
        )

    def is_empty(self) -> bool:
        """Return whether the filter accepts every snapshot."""
        return not (self.hosts or self.tags or self.paths)


ALL_SNAPSHOTS = SnapshotFilter()


FUTURE_TOLERANCE_NS = 60_000_000_000
"""The clocks of two machines may differ by as much."""

S = TypeVar("S")


def is_from_future(time_ns: int, now_ns: int) -> bool:
    """Return whether a time is later than this machine's clock and its tolerance allow."""
    return time_ns > now_ns + FUTURE_TOLERANCE_NS


def latest_of(found: Sequence[tuple[S, Snapshot]], now_ns: int) -> tuple[S, Snapshot]:
    """Return the latest of snapshots that are sorted by time, one at least.

    A snapshot from the future is the latest only if all are.
    """
    past = [item for item in found if not is_from_future(item[1].time_ns, now_ns)]
    return (past or found)[-1]


def absolute_paths(snapshot: Snapshot) -> Iterator[bytes]:
    """Yield the absolute path of each relative source, where the snapshot records its directory."""
    if isinstance(snapshot.directory, bytes):
        for path in snapshot.paths:
            yield os.path.normpath(os.path.join(snapshot.directory, path))
