"""The index: digest → location in a pack, stored in LMDB.

It is derived and can be rebuilt from the packs alone.

Every method owns its transaction and returns copies. No transaction crosses a thread or an `await`. The index
is opened after any fork. Values have a fixed size. Every blob and every pack has an ordinal, so that a set of
them is a bitmap (FORMAT.md, "Index").

A blob counts as stored (`are_stored`) unless it was found damaged or its pack is marked for removal. `lookup`
returns its location in any case. A new copy replaces a location that does not count as stored.

A location is a claim unless this machine stored the pack or found the blob there (`casfs.store.claims`).

A machine that cannot read what it stores (`omits_places`) records only in which pack a blob is: the rest of a
location would show a thief of the machine how large deleted files were. `place_blobs` adds it later.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from types import MappingProxyType

from casfs.digest import Digest, PackId
from casfs.errors import IndexUnusableError
from casfs.format.pack import PackEntry, PackRef
from casfs.index.lmdb_env import Database, LmdbEnv, Transaction
from casfs.index.removal import PackRemoval
from casfs.index.schema import (
    DAMAGED,
    FALSE_CLAIM,
    LEAVING,
    LOCATION,
    METADATA,
    ORDINAL,
    PACK,
    PARTIAL,
    REMOVED,
    UNPLACED,
    VERIFIED,
    IndexedPack,
    Location,
    PackRecord,
    Tables,
    counts_as_stored,
    pack_ref,
)

INDEX_VERSION = b"1"

DATA_FILE = "data.mdb"
LOCK_FILE = "lock.mdb"

_HAS_COPIES = b"copies"

_OMITS_PLACES = b"omits places"

_ABSENT = b"\1\0"
"""The last two bytes of the row of an absent blob, which counts as little as a damaged one."""

_ASKED_AT_ONCE = 10_000

_CHANGED_AT_ONCE = 2048
"""The most pages of blobs, of 4 KiB each, that one transaction changes: they stay in memory until the commit.

In a large index each blob touches a page of its own. The blobs of a larger pack are added in the order of
their digests, so that each page is still written only once or twice.
"""

_BLOBS_PER_PAGE = 28
"""The fewest blobs on a page that is half full, as new pages are."""

_FOUND_AT_ONCE = 32_768
"""The most pages that a transaction with several found packs changes, and about as many as one pack can."""

_PAGES_OF_PACK = 1200
"""The pages of the blobs of a large pack in an empty index."""


class Index:
    """An open index. Threads may share it; it must not cross a fork.

    With `tracks_deltas` it notes which packs were added and removed and are in no index delta yet.
    `has_all_packs` means that this process has compared it with a listing, which named no other pack.
    """

    def __init__(
        self,
        path: Path,
        readonly: bool = False,
        on_step: Callable[[str], None] | None = None,
        sync: bool = True,
    ) -> None:
        self.path = path
        self._env = LmdbEnv(path, readonly, on_step, sync)
        try:
            self._tables = Tables(self._env)
        except BaseException:
            self._env.close()
            raise
        self._pack_refs: dict[int, PackRef] = {}
        self._distrusted: frozenset[int] = frozenset()
        self.tracks_deltas = False
        self.has_all_packs = False

    @property
    def tables(self) -> Tables:
        """The databases, for `DeltaNotes`."""
        return self._tables

    @property
    def omits_places(self) -> bool:
        """Whether what this process adds gets no places."""
        return self._tables.omits_places

    def omit_places(self) -> None:
        """Add blobs without their places from now on, for the whole process."""
        self._tables.omits_places = True

    def unplaced_packs(self) -> list[PackRecord]:
        """Return the packs of whose blobs no places are recorded."""

        def ask(txn: Transaction) -> list[PackRecord]:
            found = (self._tables.pack_of(txn, n) for n in sorted(self._tables.unplaced(txn)))
            return [record for record in found if record is not None]

        return self._env.read(ask)

    def place_blobs(self, ordinal: int, entries: list[PackEntry]) -> None:
        """Record the places of the blobs of a pack, from its directory."""
        for part in self._parts(entries):
            self._env.write(lambda txn, part=part: self._tables.place_blobs(txn, ordinal, part))  # type: ignore[misc]
        key = UNPLACED + ORDINAL.pack(ordinal)
        self._env.write(lambda txn: txn.delete(key, db=self._tables.meta))

    def drop_old_places(self) -> None:
        """Drop the places that an older version recorded of what this machine stored; does so once.

        Those of packs of other machines stay: they show that a process with an identity used this index.
        """

        def note_packs(txn: Transaction) -> None:
            claimed = self._tables.claimed(txn)
            for record in self._tables.all_packs(txn):
                if record.ordinal not in claimed:
                    txn.put(UNPLACED + ORDINAL.pack(record.ordinal), b"", db=self._tables.meta)

        if self._env.read(lambda txn: txn.get(_OMITS_PLACES, db=self._tables.meta)) is not None:
            return
        self._env.write(note_packs)
        for db in (self._tables.blobs, self._tables.copies):
            after: bytes | None = None
            while db is not None:
                drop = functools.partial(
                    self._tables.drop_places, db=db, after=after, limit=_ASKED_AT_ONCE
                )
                after = self._env.write(drop)
                if after is None:
                    break
        self._env.write(lambda txn: txn.put(_OMITS_PLACES, b"", db=self._tables.meta))

    @property
    def tracks_copies(self) -> bool:
        """Whether `copies` has every known location of a blob beyond the first."""
        return self._env.read(lambda txn: txn.get(_HAS_COPIES, db=self._tables.meta)) is not None

    @property
    def readonly(self) -> bool:
        """Whether the index is read-only."""
        return self._env.readonly

    @property
    def environment(self) -> LmdbEnv:
        """The LMDB environment, for data that is kept beside the index."""
        return self._env

    @property
    def changed(self) -> bool:
        """Whether this index was written since it was opened."""
        return self._env.changed

    def prefetch(self, max_bytes: int) -> None:
        """Ask the kernel to load the index into memory if it is no larger than `max_bytes`; raise nothing."""
        try:
            fd = os.open(self.path / DATA_FILE, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            if os.fstat(fd).st_size <= max_bytes:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def lookup(self, digest: Digest) -> Location | None:
        """Return a blob's location, whether or not the blob counts as stored; None if it is unknown."""
        value = self._env.read(lambda txn: txn.get(digest, db=self._tables.blobs))
        return None if value is None else Location(*LOCATION.unpack(value))

    def lookup_many(self, digests: list[Digest]) -> list[Location | None]:
        """Return the location of each blob, as `lookup`, in one transaction; for a few thousand at a time."""

        def ask(txn: Transaction) -> list[Location | None]:
            get, blobs, unpack = txn.get, self._tables.blobs, LOCATION.unpack
            values = [get(digest, db=blobs) for digest in digests]
            return [None if value is None else Location(*unpack(value)) for value in values]

        return self._env.read(ask)

    def copies(self, digest: Digest) -> list[Location]:
        """Return the known locations of a blob beyond that of `lookup`."""
        found = self._env.read(lambda txn: self._tables.copies_of(txn, digest))
        return [Location(*LOCATION.unpack(value)) for value in found]

    def are_stored(self, digests: Iterable[Digest]) -> list[bool]:
        """Return for each digest whether the blob counts as stored.

        `digests` is consumed in batches and never inside a transaction, so that the iterable may use the
        index.
        """

        def ask(txn: Transaction, batch: list[Digest]) -> list[bool]:
            get = txn.get
            blobs = self._tables.blobs
            pending = self._tables.untrusted(txn) | self._distrusted
            if not pending:
                return [not (get(digest, db=blobs) or _ABSENT)[-2] & DAMAGED for digest in batch]
            return [counts_as_stored(get(digest, db=blobs), pending) for digest in batch]

        stored: list[bool] = []
        rest = iter(digests)
        while batch := list(itertools.islice(rest, _ASKED_AT_ONCE)):
            stored += self._env.read(functools.partial(ask, batch=batch))
        return stored

    def claims(self, digests: list[Digest]) -> dict[Digest, Location]:
        """Return those blobs whose location is a claim that this machine has not verified.

        For a few thousand at a time.
        """

        def ask(txn: Transaction) -> dict[Digest, Location]:
            if not self._tables.has_claims(txn):
                return {}
            values = {digest: txn.get(digest, db=self._tables.blobs) for digest in digests}
            return {
                digest: Location(*LOCATION.unpack(value))
                for digest, value in values.items()
                if value is not None and self._tables.is_claim(txn, value)
            }

        return self._env.read(ask)

    def is_claimed(self, ordinal: int) -> bool:
        """Return whether the entries of a pack are claims of another machine."""
        return self._env.read(lambda txn: self._tables.is_claimed(txn, ordinal))

    def settle_claims(
        self, pack: int, found: Mapping[Digest, tuple[int, int]], absent: Iterable[Digest] = ()
    ) -> None:
        """Record the blobs that a pack (its ordinal) holds, with their places, and those that it lacks.

        A place is the offset of the payload and the position in it.

        What is `absent` no longer counts as stored, and counts as a loss.
        """

        def change(txn: Transaction, blobs: list[tuple[Digest, tuple[int, int]]]) -> None:
            for digest, place in blobs:
                value = txn.get(digest, db=self._tables.blobs)
                fields = LOCATION.unpack(value) if value is not None else None
                if fields is not None and (fields[0], fields[1], fields[8]) == (pack, *place):
                    row = LOCATION.pack(*fields[:7], fields[7] | VERIFIED, fields[8])
                    txn.put(digest, row, db=self._tables.blobs)

        rest = iter(sorted(found.items()))
        while part := list(itertools.islice(rest, _CHANGED_AT_ONCE)):
            self._env.write(functools.partial(change, blobs=part))
        lacking = list(absent)
        if lacking:
            self.mark_blobs(pack, lacking)
            self._mark_packs([pack], 0, DAMAGED | FALSE_CLAIM)

    def pack_ref(self, ordinal: int) -> PackRef:
        """Return a pack by its ordinal; raise IndexUnusableError for an unknown ordinal."""
        pack = self._pack_refs.get(ordinal)
        if pack is None:
            value = self._env.read(
                lambda txn: txn.get(ORDINAL.pack(ordinal), db=self._tables.packs)
            )
            if value is None:
                raise IndexUnusableError(f"the index refers to an unknown pack {ordinal}")
            name, _, _, flags, _ = PACK.unpack(value)
            pack = self._pack_refs[ordinal] = pack_ref(name, flags)
        return pack

    def has_pack(self, pack: PackId) -> bool:
        """Return whether a pack of this name is in the index, whatever its prefix."""
        return self._env.read(lambda txn: txn.get(b"pack" + pack, db=self._tables.meta)) is not None

    def packs(self) -> list[PackRecord]:
        """Return every pack in the order of the ordinals."""
        return self._env.read(self._tables.all_packs)

    def next_pack(self) -> int:
        """Return the ordinal that the next new pack gets; every pack of the index has a smaller one."""
        return self._env.read(lambda txn: self._tables.counters(txn)[0])

    def blob_count(self) -> int:
        """Return the number of blobs in the index."""
        return self._env.read(lambda txn: int(txn.stat(db=self._tables.blobs)["entries"]))

    def blobs(self, batch: int = 10_000) -> Iterator[tuple[Digest, Location]]:
        """Yield every blob in the order of the digests; one batch at a time is in memory."""
        return self._locations(self._tables.blobs, batch)

    def further_locations(self, batch: int = 10_000) -> Iterator[tuple[Digest, Location]]:
        """Yield the locations of blobs beyond the first, as `blobs` does."""
        if self._tables.copies is None:
            return iter(())
        return self._locations(self._tables.copies, batch)

    def _locations(self, db: Database, batch: int) -> Iterator[tuple[Digest, Location]]:
        after: bytes | None = None
        while True:
            rows = self._env.read(
                functools.partial(self._tables.rows, after=after, limit=batch, db=db)
            )
            for key, value in rows:
                yield Digest(key[:32]), Location(*LOCATION.unpack(value))
            if len(rows) < batch:
                return
            after = rows[-1][0]

    def add_packs(self, packs: Iterable[IndexedPack]) -> None:
        """Record packs that this machine stored durably.

        Small packs share a transaction, and one with many blobs takes several. A blob that another pack holds
        keeps its location if it counts as stored there, and is no unverified claim. A pack that is already
        recorded keeps its entries. After an interruption `partial_packs` returns the pack that is incomplete.
        """
        small: list[IndexedPack] = []
        for indexed in packs:
            if sum(len(entries) for _, _, entries in (*small, indexed)) > _CHANGED_AT_ONCE:
                self._add_small_packs(small)
                small = []
            if len(indexed[2]) > _CHANGED_AT_ONCE:
                self._add_pack(*indexed)
            else:
                small.append(indexed)
        self._add_small_packs(small)

    def _add_small_packs(self, packs: list[IndexedPack]) -> None:
        """Record packs in one transaction."""

        def change(txn: Transaction) -> None:
            untrusted = self._tables.untrusted(txn) | self._distrusted
            for pack, pack_bytes, entries in packs:
                ordinal = self._put_own_pack(txn, pack, pack_bytes, len(entries))
                if ordinal is not None:
                    self._tables.put_blobs(txn, ordinal, sorted(entries), untrusted)

        if packs:
            self._env.write(change)

    def _add_pack(self, pack: PackRef, pack_bytes: int, entries: list[PackEntry]) -> None:
        first, *rest = self._parts(entries)

        def begin(txn: Transaction) -> int | None:
            ordinal = self._put_own_pack(txn, pack, pack_bytes, len(entries))
            if ordinal is not None:
                untrusted = self._tables.untrusted(txn) | self._distrusted
                self._tables.put_blobs(txn, ordinal, first, untrusted)
                if rest:
                    txn.put(PARTIAL + pack.id, b"", db=self._tables.meta)
            return ordinal

        ordinal = self._env.write(begin)
        if ordinal is not None:
            self._continue_pack(pack.id, ordinal, rest)

    def _parts(self, entries: list[PackEntry]) -> list[list[PackEntry]]:
        """Split entries, sorted by digest, into parts for one transaction each; at least one part."""
        pages = self._env.read(lambda txn: int(txn.stat(db=self._tables.blobs)["leaf_pages"]))
        # Digests are spread evenly over the pages.
        pages_per_blob = pages / max(1, len(entries)) + 1 / _BLOBS_PER_PAGE
        # The file grows by what two transactions change, so a part is smaller than it may be, unless each of
        # its blobs changes a page: then the syncs of further transactions cost more than the room.
        size = max(_CHANGED_AT_ONCE, int(_CHANGED_AT_ONCE / 2 / pages_per_blob))
        ordered = sorted(entries)
        ends = range(0, max(1, len(ordered)), size)
        return [ordered[begin : begin + size] for begin in ends]

    def _put_own_pack(
        self, txn: Transaction, pack: PackRef, pack_bytes: int, blobs: int
    ) -> int | None:
        """Record a pack that this machine stored, as `_put_pack` does."""
        ordinal = self._put_pack(txn, pack, pack_bytes, blobs)
        if ordinal is None:
            # Another process of this machine found it in the storage first.
            known = self._tables.ordinal_of(txn, pack.id)
            if known is not None:
                self._tables.set_claimed(txn, known, False)
        return ordinal

    def _put_pack(
        self,
        txn: Transaction,
        pack: PackRef,
        pack_bytes: int,
        blobs: int,
        known: PackRecord | None = None,
    ) -> int | None:
        """Record a pack as `Tables.put_pack` does, and note that no delta names it yet."""
        ordinal = self._tables.put_pack(txn, pack, pack_bytes, blobs, known)
        if ordinal is not None and self.tracks_deltas:
            self._tables.note_unpublished(txn, ordinal, pack.id)
        return ordinal

    def partial_packs(self) -> list[PackId]:
        """Return the packs whose blobs are not all added yet, by a running process or by one that died."""
        found = self._env.read(lambda txn: self._tables.meta_suffixes(txn, PARTIAL))
        return [PackId(name) for name in found]

    def finish_partial_pack(self, pack: PackId, entries: list[PackEntry]) -> None:
        """Add the missing blobs of a pack whose writer died before it had added them all."""
        ordinals = [record.ordinal for record in self.packs() if record.pack.id == pack]
        for ordinal in ordinals:
            self._env.write(lambda txn, n=ordinal: self._tables.set_claimed(txn, n, True))  # type: ignore[misc]
            self._continue_pack(pack, ordinal, self._parts(entries))

    def _continue_pack(self, pack: PackId, ordinal: int, parts: list[list[PackEntry]]) -> None:
        """Add the rest of a pack's blobs, unless another process has done so meanwhile."""

        def change(txn: Transaction, entries: list[PackEntry], is_last: bool) -> None:
            # After a rebuild the index contains the whole pack.
            if txn.get(PARTIAL + pack, db=self._tables.meta) is None:
                return
            untrusted = self._tables.untrusted(txn) | self._distrusted
            self._tables.put_blobs(txn, ordinal, entries, untrusted)
            if is_last:
                txn.delete(PARTIAL + pack, db=self._tables.meta)

        for number, part in enumerate(parts, 1):
            is_last = number == len(parts)
            self._env.write(functools.partial(change, entries=part, is_last=is_last))

    def packs_at_once(self) -> int:
        """Return how many packs `add_found_packs` may add at once, so that the memory of it is bounded."""
        pages = self._env.read(lambda txn: int(txn.stat(db=self._tables.blobs)["leaf_pages"]))
        # Each transaction changes the pages that exist at most once, and adds some for every pack.
        return max(1, (_FOUND_AT_ONCE - pages) // _PAGES_OF_PACK)

    def add_found_packs(
        self, packs: Callable[[], Iterable[IndexedPack]], pending: Callable[[], Set[PackRef]]
    ) -> None:
        """Record packs that were found in the storage; mark those that are pending removal in the same step.

        `pending` is called within the transaction and before `packs`. So a pack that still exists then,
        although a prune has removed it from the index, is among the pending packs.
        """

        def change(txn: Transaction) -> None:
            self._add_found_pack(txn, set(self._tables.marked_for_removal(txn)), pending(), packs())

        self._env.write(change)

    def rebuild(
        self,
        packs: Callable[[], Iterable[IndexedPack]],
        pending: Callable[[], Set[PackRef]] = frozenset,
    ) -> None:
        """Replace the whole index by the packs that `packs` yields, in one transaction; counts as a loss.

        Readers see the old index until the commit. Ordinals continue from the old ones, so that an ordinal
        that a reader holds never refers to another pack or blob. The marks of the yielded packs (verified,
        pending removal, damaged blobs) are kept. A blob of a damaged pack that the old index located in
        another pack does not count as stored in the damaged one. `pending` is as for `add_found_packs`.
        """

        def change(txn: Transaction) -> None:
            next_pack, next_blob, losses = self._tables.counters(txn)
            before = {record.ordinal: record for record in self._tables.all_packs(txn)}
            still = {before[n].pack for n in self._tables.marked_for_removal(txn) if n in before}
            broken = {n for n, one in before.items() if one.is_damaged}
            marks = {
                (bytes(key), before[at.pack].pack): at.is_damaged
                for key, value in txn.cursor(db=self._tables.blobs)
                if (value[-2] & DAMAGED or (broken and LOCATION.unpack(value)[0] in broken))
                and (at := Location(*LOCATION.unpack(value))).pack in before
            }
            known = {record.pack: record for record in before.values()}
            claimed = self._tables.claimed(txn)
            own = {record.pack for ordinal, record in before.items() if ordinal not in claimed}
            removed = self._tables.meta_suffixes(txn, REMOVED)
            for db in (self._tables.blobs, self._tables.packs, self._tables.meta):
                txn.drop(db, delete=False)
            if self._tables.copies is not None:
                txn.drop(self._tables.copies, delete=False)
            self._tables.set_counters(txn, next_pack, next_blob, losses + 1)
            txn.put(b"version", INDEX_VERSION, db=self._tables.meta)
            txn.put(_HAS_COPIES, b"", db=self._tables.meta)
            for name in removed:
                txn.put(REMOVED + name, b"", db=self._tables.meta)
            self._add_found_pack(txn, set(), still | pending(), packs(), marks, known, own)

        self._env.write(change)

    def _add_found_pack(
        self,
        txn: Transaction,
        marked: set[int],
        pending: Set[PackRef],
        packs: Iterable[IndexedPack],
        marks: Mapping[tuple[bytes, PackRef], bool] = MappingProxyType({}),
        known: Mapping[PackRef, PackRecord] = MappingProxyType({}),
        own: Set[PackRef] = frozenset(),
    ) -> None:
        for pack, pack_bytes, entries in packs:
            before = known.get(pack)
            ordinal = self._put_pack(txn, pack, pack_bytes, len(entries), before)
            if ordinal is None:
                continue
            if pack in pending:
                marked.add(ordinal)
            self._tables.set_claimed(txn, ordinal, pack not in own)
            is_damaged = before is not None and before.is_damaged
            bad = {e.digest for e in entries if marks.get((e.digest, pack), is_damaged)}
            self._tables.put_blobs(txn, ordinal, sorted(entries), marked, bad)
        self._tables.mark_for_removal(txn, marked)

    def distrust(self, ordinals: Set[int]) -> None:
        """Let no blob in these packs, too, count as stored from now on, for this process only.

        A new copy of such a blob then takes its location in the index. Ordinals are never used again, so
        this holds until the index is closed, whatever marks other processes remove.
        """
        self._distrusted |= ordinals

    def untrusted_packs(self) -> frozenset[int]:
        """Return the ordinals of the packs whose blobs do not count as stored."""
        return self._env.read(self._tables.untrusted) | self._distrusted

    def marked_for_removal(self) -> frozenset[int]:
        """Return the ordinals of the packs that are marked for removal.

        Their blobs do not count as stored.
        """
        return self._env.read(self._tables.marked_for_removal)

    def mark_for_removal(self, ordinals: Iterable[int]) -> None:
        """Replace the set of packs that are marked for removal.

        Their blobs stay readable but no longer count as stored, so that a writer stores them again.
        """
        wanted = set(ordinals)
        if wanted != self.marked_for_removal():
            self._env.write(lambda txn: self._tables.mark_for_removal(txn, wanted))

    def change_marked(self, more: Set[int], less: Set[int]) -> None:
        """Add and remove removal marks; the marks of all other packs stay."""
        if more or less:
            self._env.write(
                lambda txn: self._tables.mark_for_removal(
                    txn, (self._tables.marked_for_removal(txn) | more) - less
                )
            )

    def remove_packs(
        self, packs: Mapping[int, PackRef], lost: bool = False, is_published: bool = False
    ) -> bool:
        """Remove packs that no snapshot needs, or that are `lost`, and the blobs located in them.

        A blob of which another copy is known stays, located there. The next index delta names the packs as
        removed, unless a delta did so (`is_published`). Return whether all packs still had their ordinals, as
        `PackRemoval.run` does.
        """
        needs_delta = self.tracks_deltas and not is_published
        return PackRemoval(self._env, self._tables, packs, lost, needs_delta).run()

    def has_leaving_packs(self) -> bool:
        """Return whether a process is removing packs, or died while it did."""
        return bool(self._env.read(lambda txn: self._tables.get_set(txn, LEAVING)))

    def finish_removals(self) -> None:
        """Remove the rest of the packs that a process which died was removing; counts as a loss.

        Those that are still in the storage are in no delta as removed, and can be added again.
        """
        leaving = self._env.read(lambda txn: self._tables.get_set(txn, LEAVING))
        packs = {one.ordinal: one.pack for one in self.packs() if one.ordinal in leaving}
        PackRemoval(self._env, self._tables, packs, is_lost=True, needs_delta=False).run()

    def mark_blobs(self, pack: int, bad: Iterable[Digest], intact: Iterable[Digest] = ()) -> None:
        """Set which blobs of a pack (its ordinal) are damaged or intact.

        A newly damaged blob counts as a loss.
        """

        def change(txn: Transaction) -> None:
            lost = False
            for flags, digests in ((DAMAGED, bad), (0, intact)):
                for digest in digests:
                    value = txn.get(digest, db=self._tables.blobs)
                    fields = LOCATION.unpack(value) if value is not None else None
                    if fields is None or fields[0] != pack or fields[7] & DAMAGED == flags:
                        continue
                    row = LOCATION.pack(*fields[:7], fields[7] & ~DAMAGED | flags, fields[8])
                    txn.put(digest, row, db=self._tables.blobs)
                    lost |= bool(flags)
            if lost:
                self._tables.count_loss(txn)

        self._env.write(change)

    def loss_epoch(self) -> int:
        """Return the count of losses of entries so far; see `mark_complete`."""
        return self._env.read(lambda txn: self._tables.counters(txn)[2])

    def removals(self) -> int:
        """Return how often unneeded packs were removed since the last rebuild."""
        return self._env.read(self._tables.removals)

    def mark_complete(self, snapshot: bytes, losses: int) -> None:
        """Record that the index contained every blob of a snapshot at the loss count `losses`.

        The caller reads `loss_epoch` before it first counts a blob as stored, so that a loss by another
        process between the two calls is noticed.
        """

        def change(txn: Transaction) -> None:
            txn.put(b"complete" + snapshot, b"%d" % losses, db=self._tables.meta)

        self._env.write(change)

    def is_complete(self, snapshot: bytes) -> bool:
        """Return whether the index has lost no entries since `mark_complete` for a snapshot."""

        def ask(txn: Transaction) -> bool:
            value = txn.get(b"complete" + snapshot, db=self._tables.meta)
            return value is not None and value == b"%d" % self._tables.counters(txn)[2]

        return self._env.read(ask)

    def was_complete(self, snapshot: bytes) -> bool:
        """Return whether `mark_complete` was called for a snapshot, whatever was lost since."""
        key = b"complete" + snapshot
        return self._env.read(lambda txn: txn.get(key, db=self._tables.meta)) is not None

    def keep_complete(self, snapshots: Set[bytes]) -> None:
        """Drop the `mark_complete` records of all other snapshots; dropping too many is harmless."""
        known = self._env.read(lambda txn: self._tables.meta_suffixes(txn, b"complete"))
        gone = [snapshot for snapshot in known if snapshot not in snapshots]

        def change(txn: Transaction) -> None:
            for snapshot in gone:
                txn.delete(b"complete" + snapshot, db=self._tables.meta)

        if gone:
            self._env.write(change)

    def mark_verified(self, ordinals: Iterable[int], when_s: int) -> None:
        """Record the time at which all bytes of some packs were last verified (seconds since 1970)."""
        self._mark_packs(ordinals, when_s, 0)

    def mark_damaged(self, ordinals: Iterable[int]) -> None:
        """Record that the bytes of some packs do not match their names."""
        self._mark_packs(ordinals, 0, DAMAGED)

    def _mark_packs(self, ordinals: Iterable[int], when_s: int, flags: int) -> None:
        marked = list(ordinals)

        def change(txn: Transaction) -> None:
            for ordinal in marked:
                key = ORDINAL.pack(ordinal)
                value = txn.get(key, db=self._tables.packs)
                if value is not None:
                    pack, pack_bytes, blobs, old_flags, _ = PACK.unpack(value)
                    kept = METADATA | FALSE_CLAIM if flags else METADATA
                    new_flags = old_flags & kept | flags
                    txn.put(
                        key,
                        PACK.pack(pack, pack_bytes, blobs, new_flags, when_s),
                        db=self._tables.packs,
                    )

        self._env.write(change)

    def is_current(self) -> bool:
        """Return whether the index was created by `rebuild` in the version that this module reads."""
        return (
            self._env.read(lambda txn: txn.get(b"version", db=self._tables.meta)) == INDEX_VERSION
        )
