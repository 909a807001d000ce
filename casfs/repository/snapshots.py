"""The snapshots of a repository: list, load, resolve, publish, replace and delete.

A snapshot is published as the last step of a backup and never rewritten. A replacement is published before
the old snapshot is deleted. A crash between the two steps leaves both, and only the new one is listed.
"""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec

from casfs.digest import SnapshotId, short_id
from casfs.errors import (
    AmbiguousIdError,
    CasfsError,
    IntegrityError,
    KeyMissingError,
    NotFoundError,
    PacksRemovedError,
    RefusedError,
    StorageError,
)
from casfs.format.codec import BlobCodec
from casfs.format.snapshot import (
    MAX_SNAPSHOT_BYTES,
    Envelope,
    Snapshot,
    decode_signed_snapshot,
    encode_snapshot,
    read_envelope,
)
from casfs.format.tree import Node
from casfs.index.index import Index
from casfs.paths import parse_snapshot_path
from casfs.repository.provenance import Provenance
from casfs.repository.snapshot_filter import ALL_SNAPSHOTS, SnapshotFilter, latest_of
from casfs.repository.snapshot_listing import SNAPSHOTS, SnapshotListing, list_ids
from casfs.storage.base import Storage
from casfs.storage.concurrency import in_order
from casfs.trees.reader import TreeReader

if TYPE_CHECKING:
    # An unencrypted local repository does not need these imports.
    from concurrent.futures import Future

    from casfs.crypto.key_manager import KeyManager
    from casfs.format.signature import Author

log = logging.getLogger(__name__)

_SHORT_ID = re.compile("[0-9a-f]{4,64}")

_MOST_ATTEMPTS = 3
"""How often a snapshot is stored before its publication fails, where other hosts remove what it needs."""

T = TypeVar("T")


class Publisher(Protocol):
    """Stores snapshots where other hosts may remove packs at any time."""

    def publish(
        self,
        snapshot_id: SnapshotId,
        data: bytes,
        root: Node,
        copy_of: SnapshotId | None,
        unchanged_since: SnapshotId | None,
    ) -> None:
        """Store a snapshot all of whose blobs stay.

        `copy_of` is an existing snapshot with the same root. So is `unchanged_since`, which may have been
        forgotten since the caller found it. Raise StorageError, and PacksRemovedError where blobs are lost;
        nothing is published then.
        """

    def begin_again(self) -> None:
        """Take the present state of the index as known, before the caller stores everything again."""

    def before_deletion(self, snapshot_id: SnapshotId) -> None:
        """Delete what a deletion of this snapshot would leave; raise StorageError."""


class SnapshotStore:
    """The snapshots in one storage; `keys` is None if the repository is not encrypted. Used by one thread.

    `provenance` says who wrote each of them. `loss_epoch` is the index's when the repository was opened for
    writing, 0 for a reader. `before_publish` is called before a snapshot is stored. `publisher` is set for a
    writer. `listing` is for the first call of `ids`, if it comes soon. `omitted` has the snapshots that
    the last `iterate` could not read.
    """

    def __init__(
        self,
        storage: Storage,
        codec: BlobCodec,
        index: Index,
        trees: TreeReader,
        keys: KeyManager | None,
        loss_epoch: int,
    ) -> None:
        self._storage = storage
        self._codec = codec
        self._index = index
        self._trees = trees
        self._keys = keys
        self._loss_epoch = loss_epoch
        self.provenance = Provenance(keys, self.load, self.ids)
        self.listing: SnapshotListing | None = None
        self.omitted: dict[SnapshotId, CasfsError] = {}
        self.before_publish: Callable[[], None] = lambda: None
        self.publisher: Publisher | None = None

    def publish(
        self,
        snapshot: Snapshot,
        complete: bool = True,
        *,
        is_proven: bool = True,
        author: Author | None = None,
        copy_of: SnapshotId | None = None,
        unchanged_since: SnapshotId | None = None,
    ) -> SnapshotId:
        """Store a snapshot, as the last step of a backup.

        `complete` means that all its blobs are durable and in the index. Without `is_proven` it is published
        as unproven, even by a trusted writer. `author` is the machine that made it, by default this one.
        `copy_of` is an existing snapshot with the same root. So is `unchanged_since`, which may have been
        forgotten since the caller found it. Raise PacksRemovedError, and publish nothing, where other hosts
        removed packs that it needs.
        """
        session, key = None, None
        if self._keys is not None:
            session = self._keys.session() if is_proven else self._keys.unproven_session()
            key = self._keys.signing_key
        snapshot_id, data = encode_snapshot(snapshot, self._codec, session, key, author)
        if complete:
            self._index.mark_complete(snapshot_id, self._loss_epoch)
        if self.publisher is not None:
            self.publisher.publish(snapshot_id, data, snapshot.root, copy_of, unchanged_since)
        else:
            self.before_publish()
            self._storage.create(f"{SNAPSHOTS}/{snapshot_id.hex()}", data)
        if self._keys is not None:
            self._keys.record_published(snapshot_id, snapshot.time_ns)
            if is_proven and author is None and self._keys.can_read:
                writers = self.provenance.trusted_writers()
                if writers is not None:
                    writers.learn_own(snapshot.host)
        return snapshot_id

    def begin_again(self) -> None:
        """Prepare for `publish` after PacksRemovedError, before everything is stored again.

        What is in packs that other hosts remove no longer counts as stored.
        """
        if self.publisher is not None:
            self.publisher.begin_again()

    def repeat_until_published(self, attempt: Callable[[], T], doing: str) -> T:
        """Return the result of an attempt to store and publish; repeat it while other hosts remove its packs.

        `doing` names the attempt in a warning. Raise PacksRemovedError after the last attempt.
        """
        for _ in range(_MOST_ATTEMPTS - 1):
            try:
                return attempt()
            except PacksRemovedError as error:
                log.warning("%s; %s again", error.reason, doing)
                self.begin_again()
        return attempt()

    def replace(
        self,
        snapshot_id: SnapshotId,
        snapshot: Snapshot,
        root: Node | None = None,
        tags: tuple[str, ...] | None = None,
    ) -> SnapshotId:
        """Publish a snapshot with another root or other tags, then delete the one that it replaces.

        A crash between the two steps leaves both, and only the new one is listed.
        """
        self.provenance.require_proven(snapshot_id, "a replacement")
        if self._keys is not None and not self._keys.is_trusted_writer:
            raise RefusedError(
                "a replacement is refused: this machine does not have the repository's own secret, so the "
                "new snapshot would be unproven; run `casfs key accept` with an identity"
            )
        left_by_crashes = self.provenance.hidden_by(snapshot_id, snapshot)
        changed = msgspec.structs.replace(
            snapshot,
            root=root if root is not None else snapshot.root,
            tags=tags if tags is not None else snapshot.tags,
            replaces=snapshot_id,
        )
        complete = root is None and self._index.is_complete(snapshot_id)
        signed = self.provenance.signed(snapshot_id) if root is None else None
        signers = signed.signers if signed is not None else None
        author = signers.author if signers is not None else None
        new_id = self.publish(
            changed, complete, author=author, copy_of=snapshot_id if root is None else None
        )
        if root is None:
            self._carry_lock(snapshot_id, new_id)
        for hidden in left_by_crashes:
            # Without the snapshot that replaced it, it would be listed again.
            self.delete(hidden)
        self.delete(snapshot_id)
        return new_id

    def _carry_lock(self, old: SnapshotId, new: SnapshotId) -> None:
        """Lock a snapshot as long as the one with the same root that it replaces."""
        bucket = self._storage.bucket
        if bucket is None:
            return
        try:
            until_s = bucket.locked_until_s(f"snapshots/{old.hex()}")
            if until_s is not None:
                bucket.lock(f"snapshots/{new.hex()}", until_s)
        except (StorageError, NotFoundError) as error:
            log.warning(
                "snapshot %s is not locked like the one that it replaces: %s", short_id(new), error
            )

    def replace_root(self, snapshot_id: SnapshotId, snapshot: Snapshot, root: Node) -> SnapshotId:
        """Publish a repaired snapshot with another root, then delete the damaged one.

        An unproven snapshot stays unproven, and so cannot name the one that it replaces: a crash between the
        two steps leaves both, and both are listed.
        """
        if self.provenance.is_from_trusted_writer(snapshot_id):
            return self.replace(snapshot_id, snapshot, root=root)
        changed = msgspec.structs.replace(snapshot, root=root, replaces=None)
        new_id = self.publish(changed, complete=False, is_proven=False)
        self.delete(snapshot_id)
        return new_id

    def delete(self, snapshot_id: SnapshotId) -> None:
        """Delete a snapshot; its blobs stay until a prune."""
        self._record_deleted(snapshot_id)
        self._delete_object(snapshot_id)

    def delete_each(self, groups: Iterable[Sequence[SnapshotId]]) -> Iterator[bool]:
        """Delete the snapshots of each group in order; yield whether the last one of it was there.

        Where requests travel a distance, snapshots of several groups are deleted at the same time.
        """

        def recorded() -> Iterator[Sequence[SnapshotId]]:
            for group in groups:
                for snapshot_id in group:
                    self._record_deleted(snapshot_id)
                yield group

        def delete(group: Sequence[SnapshotId]) -> bool:
            *others, last = group
            for snapshot_id in others:
                with suppress(NotFoundError):
                    self._delete_object(snapshot_id)
            try:
                self._delete_object(last)
            except NotFoundError:
                return False
            return True

        return in_order(self._storage, delete, recorded())

    def _record_deleted(self, snapshot_id: SnapshotId) -> None:
        if self._keys is not None:
            self._keys.record_deleted(snapshot_id)

    def _delete_object(self, snapshot_id: SnapshotId) -> None:
        if self.publisher is not None:
            self.publisher.before_deletion(snapshot_id)
        self._storage.delete(f"{SNAPSHOTS}/{snapshot_id.hex()}")

    def ids(self, folder: str = SNAPSHOTS) -> list[SnapshotId]:
        """Return the ids of all snapshot files, or of all drafts, sorted."""
        if folder == SNAPSHOTS:
            listing, self.listing = self.listing, None
            if listing is not None and listing.is_fresh():
                return listing.ids()
        return list_ids(self._storage, folder)

    def load(self, snapshot_id: SnapshotId, folder: str = SNAPSHOTS) -> Snapshot:
        """Return a verified snapshot or draft; raises NotFoundError or TreeError.

        In an encrypted repository also KeyMissingError and SessionError.
        """
        return self._decode(snapshot_id, self._read(snapshot_id, folder))

    def load_each(
        self, ids: list[SnapshotId], folder: str = SNAPSHOTS
    ) -> Iterator[tuple[SnapshotId, Callable[[], Snapshot]]]:
        """Yield a function for each id that returns the snapshot, or raises, as `load` does.

        Where requests travel a distance, several snapshots are read at the same time.
        """
        for snapshot_id, read in self._read_all(ids, folder):
            yield snapshot_id, partial(self._decode_read, snapshot_id, read)

    def _decode_read(self, snapshot_id: SnapshotId, read: Callable[[], bytes]) -> Snapshot:
        return self._decode(snapshot_id, read())

    def _read(self, snapshot_id: SnapshotId, folder: str = SNAPSHOTS) -> bytes:
        return self._storage.read(f"{folder}/{snapshot_id.hex()}", 0, MAX_SNAPSHOT_BYTES)

    def _decode(self, snapshot_id: SnapshotId, data: bytes) -> Snapshot:
        keyring = self._keys.keyring if self._keys is not None else None
        snapshot, signers = decode_signed_snapshot(snapshot_id, data, self._codec, keyring)
        knew_secret = True
        if keyring is not None:
            envelope = read_envelope(snapshot_id, data)
            assert envelope is not None
            knew_secret = keyring.proves(keyring.session(envelope.session), snapshot_id)
        self.provenance.record(snapshot_id, knew_secret, snapshot.host, signers)
        return snapshot

    def envelope(self, snapshot_id: SnapshotId) -> Envelope | None:
        """Return an encrypted snapshot's unencrypted header, or None; raise NotFoundError or TreeError."""
        data = self._storage.read(f"snapshots/{snapshot_id.hex()}", 0, MAX_SNAPSHOT_BYTES)
        return read_envelope(snapshot_id, data)

    def iterate(self) -> Iterator[tuple[SnapshotId, Snapshot]]:
        """Yield every snapshot from the oldest to the newest.

        Damaged and unreadable snapshots are logged, omitted, and kept in `omitted`. A replaced snapshot is
        left out, too: a crash while tags were changed leaves both. Raise KeyMissingError where the identities
        decrypt no snapshot at all.
        """
        found: list[tuple[SnapshotId, Snapshot]] = []
        closed: dict[SnapshotId, KeyMissingError] = {}
        self.omitted = {}
        for snapshot_id, read in self._read_all(self.ids()):
            try:
                found.append((snapshot_id, self._decode(snapshot_id, read())))
            except NotFoundError:
                continue
            except KeyMissingError as error:
                closed[snapshot_id] = error
            except (IntegrityError, StorageError) as error:
                log.warning("%s; run `casfs check`", error)
                self.omitted[snapshot_id] = error
        for snapshot_id, missing in closed.items():
            if not found:
                raise missing  # there are snapshots, but none for these identities
            log.warning("snapshot %s is omitted: %s", short_id(snapshot_id), missing)
            self.omitted[snapshot_id] = missing
        # A forged snapshot must not hide another one.
        there = {snapshot_id for snapshot_id, _ in found}
        replaced = {
            self.provenance.replaced_by(snapshot_id, snapshot)
            for snapshot_id, snapshot in found
            if snapshot.replaces in there
        }
        found.sort(key=lambda item: (item[1].time_ns, item[0]))
        for snapshot_id, snapshot in found:
            if snapshot_id not in replaced:
                yield snapshot_id, snapshot

    def _read_all(
        self, ids: list[SnapshotId], folder: str = SNAPSHOTS
    ) -> Iterator[tuple[SnapshotId, Callable[[], bytes]]]:
        """Yield a function for each snapshot that returns its bytes or raises the error of reading them.

        Where requests travel a distance, several snapshots are read at the same time.
        """
        requests = min(self._storage.capabilities.parallel_requests, len(ids))
        if requests <= 1:
            for snapshot_id in ids:
                yield snapshot_id, partial(self._read, snapshot_id, folder)
            return
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(requests, "casfs-snapshots") as pool:
            ahead: deque[tuple[SnapshotId, Future[bytes]]] = deque()
            try:
                for snapshot_id in ids:
                    ahead.append((snapshot_id, pool.submit(self._read, snapshot_id, folder)))
                    if len(ahead) > 2 * requests:
                        first, future = ahead.popleft()
                        yield first, future.result
                for first, future in ahead:
                    yield first, future.result
            finally:
                for _, future in ahead:
                    future.cancel()

    def resolve(
        self, name: str, wanted: SnapshotFilter = ALL_SNAPSHOTS
    ) -> tuple[SnapshotId, Snapshot]:
        """Return the snapshot that `latest`, an id or a unique prefix of an id identifies.

        `latest` is the newest that `wanted` accepts; one from the future only if all are. Raise NotFoundError
        and AmbiguousIdError.
        """
        if name == "latest":
            everything = list(self.iterate())
            if not everything:
                raise NotFoundError(
                    "the repository has no snapshots; run `casfs backup` to create one"
                )
            matching = [item for item in everything if wanted.accepts(item[1])]
            if not matching:
                raise NotFoundError(
                    f"no snapshot matches; `casfs snapshots` lists the {len(everything)} of this repository"
                )
            found = latest_of(matching, time.time_ns())
        else:
            snapshot_id = self.resolve_id(name)
            found = snapshot_id, self.load(snapshot_id)
        if not self.provenance.is_from_trusted_writer(found[0]):
            log.warning(
                "snapshot %s is unproven: no machine that this one trusts is known to have written it, so it "
                "may have been forged by the storage's operator",
                short_id(found[0]),
            )
        return found

    def resolve_id(self, prefix: str) -> SnapshotId:
        """Return the id that begins with `prefix`; raise AmbiguousIdError and NotFoundError."""
        wanted = prefix.lower()
        matches = [i for i in self.ids() if wanted and i.hex().startswith(wanted)]
        if len(matches) > 1:
            raise AmbiguousIdError(prefix, [match.hex() for match in matches])
        if not matches:
            raise NotFoundError(
                f"no snapshot has the id {prefix!r}; {_spelling_hint(prefix)}`casfs snapshots` lists the ids"
            )
        return matches[0]

    def resolve_path(
        self, spec: str, latest_of: SnapshotFilter = ALL_SNAPSHOTS
    ) -> tuple[SnapshotId, Snapshot, bytes, Node]:
        """Return the snapshot, the path and the node that `SNAP` or `SNAP:PATH` identifies.

        `latest` is the newest that `latest_of` accepts.
        """
        name, _, text = spec.partition(":")
        snapshot_id, snapshot = self.resolve(name, latest_of)
        path = parse_snapshot_path(text)
        node = self._trees.resolve(snapshot.root, path)
        if node is None:
            raise NotFoundError(f"snapshot {short_id(snapshot_id)} has no {text!r}")
        return snapshot_id, snapshot, path, node

    def retag(
        self, snapshot_id: SnapshotId, snapshot: Snapshot, tags: tuple[str, ...]
    ) -> tuple[SnapshotId, Snapshot]:
        """Replace a snapshot by one with other tags; return it with its id. Equal tags change nothing."""
        if tags == snapshot.tags:
            return snapshot_id, snapshot
        new_id = self.replace(snapshot_id, snapshot, tags=tags)
        return new_id, msgspec.structs.replace(snapshot, tags=tags, replaces=snapshot_id)


def _spelling_hint(name: str) -> str:
    """Return a hint for a path that was given in place of SNAP:PATH, or "" for anything else."""
    first, slash, rest = name.partition("/")
    if not slash:
        return ""
    if first == "latest" or _SHORT_ID.fullmatch(first.lower()):
        return f"did you mean {first}:/{rest}? "
    return f"did you mean latest:/{name.lstrip('/')}? "
