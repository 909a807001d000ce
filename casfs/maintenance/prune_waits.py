"""What a prune leaves for a later one, where hosts write over a network: packs whose margin has not passed,
and packs that a writer that is seen may have stored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from casfs.errors import NotFoundError
from casfs.format.pack import PackRef
from casfs.index.schema import PackRecord
from casfs.maintenance.prune_plan import DEFAULT_MARGIN_S, SHARED_MARGIN_S
from casfs.repository.presence import PresentProcess
from casfs.storage.base import Storage
from casfs.storage.concurrency import in_order
from casfs.storage.locks import LockMode
from casfs.store.blob_store import pack_name
from casfs.store.pending_removal import ListedNotice

_NS = 1_000_000_000

_LONGEST_WRITER_NS = 7 * 86_400 * _NS
"""Packs that are older are marked for removal, whatever presence objects say of who may have stored them."""


@dataclass(frozen=True, slots=True)
class Margin:
    """How long packs under notice stay: at least, and where a process is seen that may use them."""

    least_ns: int
    used_ns: int

    @classmethod
    def of(cls, margin_s: float | None) -> Margin:
        """Return the margin of a prune's option, None for the default."""
        least_ns = int((SHARED_MARGIN_S if margin_s is None else margin_s) * _NS)
        used_ns = DEFAULT_MARGIN_S * _NS if margin_s is None else least_ns
        return cls(least_ns, max(least_ns, used_ns))


@dataclass(frozen=True, slots=True)
class WaitingPacks:
    """The packs under notice (ordinals): those to remove now, and until when the others stay."""

    removable: frozenset[int]
    pending: Mapping[int, int]


def waiting_packs(
    notices: Mapping[str, ListedNotice],
    removable_by: Collection[str],
    ordinals: Mapping[PackRef, int],
    processes: Iterable[PresentProcess],
    margin: Margin,
    now_ns: int,
) -> WaitingPacks:
    """Decide which of the packs under notice may be removed now.

    `removable_by` are the names of the notices that allow it once they are old enough; `ordinals` are the
    packs that exist.
    """
    began_ns = [process.record.since_ns for process in processes]
    removable, pending = set(), dict[int, int]()
    for name, (mtime_ns, notice) in notices.items():
        is_used = any(one <= mtime_ns for one in began_ns)
        until_ns = mtime_ns + (margin.used_ns if is_used else margin.least_ns)
        for pack in notice.pack_refs():
            ordinal = ordinals.get(pack)
            if ordinal is None:
                continue
            if name in removable_by and until_ns <= now_ns:
                removable.add(ordinal)
            else:
                pending[ordinal] = until_ns
    return WaitingPacks(
        frozenset(removable), {n: t for n, t in pending.items() if n not in removable}
    )


def packs_in_flight(
    storage: Storage,
    records: Mapping[int, PackRecord],
    ordinals: Iterable[int],
    processes: Mapping[str, PresentProcess],
    now_ns: int,
) -> dict[int, str]:
    """Return the packs that a writer seen lately may have written, each with the name of its object.

    To mark them for removal would be safe, but the writer would have to store their blobs again.
    """
    writers = {
        name: process.record.since_ns
        for name, process in processes.items()
        if process.record.mode != LockMode.READER
    }
    if not writers:
        return {}
    oldest = min(writers, key=lambda name: writers[name])
    # The time is what the object says: a forged one must not keep everything for good.
    since_ns = max(writers[oldest], now_ns - _LONGEST_WRITER_NS)

    def written_ns(ordinal: int) -> int | None:
        try:
            return storage.mtime_ns(pack_name(records[ordinal].pack))
        except NotFoundError:
            return None

    asked = list(ordinals)
    times_ns = zip(asked, in_order(storage, written_ns, asked), strict=True)
    return {n: oldest for n, time_ns in times_ns if time_ns is not None and time_ns >= since_ns}
