"""The usage of each pack by needed blobs, from which both kinds of prune decide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from casfs.digest import Digest
from casfs.errors import IndexUnusableError
from casfs.index.schema import Location
from casfs.maintenance.prune_plan import PackUsage
from casfs.repository.needed_blobs import NeededBlobs
from casfs.repository.repository import Repository
from casfs.store.pack_shares import PackShare


@dataclass(slots=True)
class NeededPacks:
    """The usage of each pack with needed blobs, by ordinal, and the damaged ones of these blobs."""

    usage: dict[int, PackUsage] = field(default_factory=dict)
    damaged: dict[Digest, Location] = field(default_factory=dict)
    needed_blobs: int = 0
    unneeded_blobs: int = 0


def measure_usage(
    repository: Repository, needed: NeededBlobs, require_same_index: Callable[[], None]
) -> NeededPacks:
    """Return the usage of each pack by needed blobs.

    Raise IndexUnusableError where the index lists fewer of them than before, unless `require_same_index`
    raises first because another index has replaced it.
    """
    found = NeededPacks()
    indexed: dict[int, PackShare] = {}
    shares: dict[int, PackShare] = {}
    elsewhere = repository.store.found_elsewhere
    for digest, location in repository.store.index.blobs():
        indexed.setdefault(location.pack, PackShare()).add(location)
        if location.ordinal not in needed.blobs:
            found.unneeded_blobs += 1
            continue
        found.needed_blobs += 1
        if location.is_damaged or digest in elsewhere:
            found.damaged[digest] = location
        usage = found.usage.setdefault(location.pack, PackUsage())
        shares.setdefault(location.pack, PackShare()).add(location)
        usage.has_damaged |= location.is_damaged
    if found.needed_blobs < needed.count:
        require_same_index()
        raise IndexUnusableError(
            f"the index lists only {found.needed_blobs} of the {needed.count} needed blobs that it listed "
            "before; no further pack was removed; run `casfs repair index`"
        )
    for record in repository.store.index.packs():
        if record.ordinal in shares:
            needed_share = shares[record.ordinal]
            used = found.usage[record.ordinal]
            used.needed_bytes = needed_share.stored_bytes(indexed[record.ordinal], record)
    return found
