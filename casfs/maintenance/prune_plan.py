"""The plan of a prune: which packs go and which are repacked. Values and decisions, no input or output.

`casfs prune --dry-run` prints a plan, and `casfs.maintenance.prune` executes one. A pack is needed when a
snapshot needs a blob in it (`casfs.repository.needed_blobs`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from casfs.index.schema import PackRecord
from casfs.store.pack_builder import META_PACK_BYTES, PACK_BLOBS, PACK_BYTES
from casfs.store.pack_shares import directory_bytes

log = logging.getLogger(__name__)

DEFAULT_UNUSED_SHARE = 0.25
"""Packs with a larger share of unneeded bytes are repacked.

With 1/4, the unneeded bytes that stay are at most a third of the needed ones.
"""

DEFAULT_MARGIN_S = 86_400
"""How long packs stay for readers that were active when the packs were marked for removal."""

SHARED_MARGIN_S = 3_600
"""How long packs stay after they were marked for removal, where hosts write over a network."""

MAX_MARKED_PACKS = 1_500_000
"""The most packs that all removal notices name, in some 96 MiB: a reader refuses more than 128 MiB."""

_SMALL_SHARE = 1 / 8
"""A pack with less than this share of the target size of its kind is small."""

_MANY_SMALL_PACKS = 16
"""At least this many small packs of a kind, as small backups leave them, are merged into larger packs.

A pack that is full of tiny blobs is not counted: repacking would not make it larger."""


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """Options of a prune.

    Packs with more than `unused_share` (0 to 1) of unneeded bytes are repacked. `margin_s` is the time
    that packs under notice stay for active readers and, where hosts write over a network, for all processes;
    None is the default of the place. With `repack_all` every pack is repacked, at the
    compression level with which the repository is open. All removal notices together name at most
    `most_marked` packs.
    """

    unused_share: float = DEFAULT_UNUSED_SHARE
    margin_s: float | None = None
    dry_run: bool = False
    repack_all: bool = False
    most_marked: int = MAX_MARKED_PACKS


@dataclass(slots=True)
class PackUsage:
    """The needed blobs of a pack; `needed_bytes` counts payloads with their record headers.

    Of a group it counts the share of the needed blobs (`PackShare`).
    """

    needed_bytes: int = 0
    has_damaged: bool = False


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """The decisions of a prune, with packs by their ordinals in the index.

    `unneeded` packs hold no needed blob. `repacked` packs go after their needed blobs were copied. A pack
    that a running backup may have written is in neither set but in `in_flight`, with the name of that
    backup's lock.
    """

    packs: Mapping[int, PackRecord]
    usage: Mapping[int, PackUsage]
    unneeded: frozenset[int]
    repacked: frozenset[int]
    in_flight: Mapping[int, str]

    @property
    def removed_packs(self) -> int:
        """The number of packs that go, repacked ones included."""
        return len(self.unneeded | self.repacked)

    @property
    def removed_bytes(self) -> int:
        """The stored bytes of the packs that go."""
        return self._stored_bytes(self.unneeded | self.repacked)

    @property
    def repacked_bytes(self) -> int:
        """The stored bytes of the packs whose needed blobs are copied."""
        return self._stored_bytes(self.repacked)

    @property
    def new_bytes(self) -> int:
        """The bytes of the needed blobs that are copied into new packs."""
        return sum(self.usage[ordinal].needed_bytes for ordinal in self.repacked)

    def _stored_bytes(self, ordinals: frozenset[int]) -> int:
        return sum(self.packs[ordinal].pack_bytes for ordinal in ordinals)


def unneeded_packs(
    packs: Mapping[int, PackRecord], usage: Mapping[int, PackUsage]
) -> frozenset[int]:
    """Return the packs without a needed blob."""
    return frozenset(packs.keys() - usage.keys())


def packs_to_repack(
    packs: Mapping[int, PackRecord], usage: Mapping[int, PackUsage], options: PruneOptions
) -> frozenset[int]:
    """Return the packs to repack: damaged ones, those with much unneeded data, many small ones of a kind."""
    chosen = set()
    small: dict[bool, set[int]] = {False: set(), True: set()}
    for ordinal, pack_usage in usage.items():
        record = packs.get(ordinal)
        # A damaged blob may be the last trace of its data: the pack stays as it is. Once the needed
        # blobs of the pack are rewritten elsewhere, the pack is unneeded and not in `usage`.
        if record is None or pack_usage.has_damaged:
            continue
        unused_bytes = record.pack_bytes - pack_usage.needed_bytes - directory_bytes(record)
        most_bytes = options.unused_share * record.pack_bytes
        if options.repack_all or record.is_damaged or unused_bytes > most_bytes:
            chosen.add(ordinal)
        elif _is_small(record) and record.blobs < PACK_BLOBS // 2:
            small[record.pack.is_meta].add(ordinal)
    for packs_of_kind in small.values():
        if len(packs_of_kind) >= _MANY_SMALL_PACKS:
            chosen |= packs_of_kind
    return frozenset(chosen)


def packs_with_room(
    unneeded: frozenset[int], repacked: frozenset[int], room: int
) -> tuple[frozenset[int], frozenset[int]]:
    """Return those of the unneeded packs, and then of the packs to repack, for which notices have room.

    The next prune finds the rest.
    """
    named = sorted(unneeded)[: max(room, 0)]
    also = sorted(repacked)[: max(room - len(named), 0)]
    left = len(unneeded) + len(repacked) - len(named) - len(also)
    if left:
        log.warning(
            "%d packs stay until the next prune: removal notices that name more packs would not be read",
            left,
        )
    return frozenset(named), frozenset(also)


def _is_small(record: PackRecord) -> bool:
    target_bytes = META_PACK_BYTES if record.pack.is_meta else PACK_BYTES
    return record.pack_bytes < _SMALL_SHARE * target_bytes
