"""Copy snapshots into another repository, with the keys and the chunks of that one.

Every chunk is verified when it is read and stored from the buffer that was verified. Contents are cut again
with the parameters of the destination, so that the copies deduplicate with what it has. Directories and files
that an earlier copy of this process has stored are not read again. Memory is bounded: the remembered
directories and files are limited in number.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from casfs.backup.protection import Protection
from casfs.backup.source_reader import ReadResult, SourceReader
from casfs.digest import Digest, SnapshotId, short_id
from casfs.errors import KeyMissingError, PacksRemovedError, RefusedError
from casfs.format.snapshot import Snapshot
from casfs.format.tree import Node, NodeType, TreeRef, replace
from casfs.monitor import Monitor
from casfs.repository.prefetch import Prefetcher
from casfs.repository.repository import Repository
from casfs.store.writer import BlobWriter
from casfs.trees.content import ContentReader
from casfs.trees.file_content import FileContent
from casfs.trees.reader import TreeReader
from casfs.trees.rewrite import rewrite_tree

log = logging.getLogger(__name__)

_MAX_REMEMBERED = 200_000

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class CopiedSnapshot:
    """The outcome for one snapshot; `new_id` is the copy's. `was_there`: an earlier copy was found."""

    snapshot_id: SnapshotId
    new_id: SnapshotId
    was_there: bool
    stored_bytes: int = 0


class SnapshotCopier:
    """Copy snapshots from `source` to `destination`, which is open for writing; one thread."""

    def __init__(self, source: Repository, destination: Repository, monitor: Monitor) -> None:
        self._source = source
        self._destination = destination
        self._monitor = monitor
        self._trees = _Remembered[TreeRef]()
        self._files = _Remembered[tuple[bytes, int, Digest | None]]()
        self._there = _snapshots_of(destination)

    def copy(self, snapshot_id: SnapshotId, snapshot: Snapshot) -> CopiedSnapshot:
        """Copy one snapshot with its time, host, paths and tags.

        Raises RefusedError for a snapshot that no trusted writer published, since its copy would look as if
        one had; BlobError and TreeError where it is damaged, and then publishes nothing.
        """
        if not self._source.snapshots.provenance.is_from_trusted_writer(snapshot_id):
            raise RefusedError(
                f"snapshot {short_id(snapshot_id)} is unproven: no writer that its repository trusts "
                "published it; it is not copied"
            )
        there = self._there.get(_identity(snapshot))
        if there is not None:
            return CopiedSnapshot(snapshot_id, there, was_there=True)
        new_id, stored_bytes = self._destination.snapshots.repeat_until_published(
            lambda: self._copy_and_publish(snapshot), "copying the snapshot"
        )
        self._there[_identity(snapshot)] = new_id
        return CopiedSnapshot(snapshot_id, new_id, False, stored_bytes)

    def _copy_and_publish(self, snapshot: Snapshot) -> tuple[SnapshotId, int]:
        """Store a snapshot's data and publish the copy; return its id and the bytes stored."""
        writer = self._destination.writer()
        new: list[tuple[bytes, TreeRef]] = []
        try:
            root = self._copy_root(writer, snapshot.root, new)
            stats = writer.finish()
        finally:
            writer.close()
        # Only now are the trees durable that later copies refer to.
        for digest, tree in new:
            self._trees.put(digest, tree)
        copied = msgspec.structs.replace(snapshot, root=root, parent=None, replaces=None)
        try:
            new_id = self._destination.snapshots.publish(copied)
        except PacksRemovedError:
            self._trees, self._files = _Remembered(), _Remembered()
            raise
        Protection.protect_published(self._destination, new_id, root)
        return new_id, stats.new_stored_bytes

    def _copy_root(self, writer: BlobWriter, root: Node, new: list[tuple[bytes, TreeRef]]) -> Node:
        destination = self._destination
        reader = SourceReader(
            destination.chunker(),
            writer.put,
            destination.codec.digest,
            on_bytes=self._monitor.progress.read_bytes,
        )
        if root.tree is None:
            return self._copy_file(reader, root, self._source.store.read)
        with Prefetcher(
            self._source, b"", root, skips=lambda ref: ref.digest in self._trees
        ) as ahead:
            trees = TreeReader(ahead.read)

            def entries(node: Node, path: bytes) -> Iterator[Node]:
                assert node.tree is not None
                return trees.nodes(node.tree)

            def change(node: Node, path: bytes) -> Node:
                ahead.path = self._monitor.progress.path = path
                self._monitor.progress.items += 1
                is_file = node.kind == NodeType.FILE
                return self._copy_file(reader, node, ahead.read) if is_file else node

            return rewrite_tree(
                root,
                b"",
                entries=entries,
                new_tree=lambda _: destination.tree_writer(writer.put),
                change=change,
                known=lambda tree: self._trees.get(tree.digest),
                on_tree=lambda old, tree: new.append((old.digest, tree)),
            )

    def _copy_file(self, reader: SourceReader, node: Node, read: Callable[[Digest], bytes]) -> Node:
        """Store the content of a regular file and return its node; raise BlobError and TreeError."""
        key = b"%d:%d:" % (node.levels, node.size) + node.content
        known = self._files.get(key)
        if known is None:
            content = FileContent(node, ContentReader(node.content, node.levels, read), read)
            stored = reader.read_parts(content.parts(), node.size)
            reader.store_pending(stored)
            known = _stored(stored)
            self._files.put(key, known)
            self._monitor.progress.finish_file(node.size)
        records, levels, captured = known
        return replace(node, content=records, levels=levels, captured=captured)


class _Remembered(Generic[V]):
    """The values of the keys that were used last, at most `_MAX_REMEMBERED`."""

    def __init__(self) -> None:
        self._values: OrderedDict[bytes, V] = OrderedDict()

    def get(self, key: bytes) -> V | None:
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def __contains__(self, key: bytes) -> bool:
        return key in self._values

    def put(self, key: bytes, value: V) -> None:
        self._values[key] = value
        if len(self._values) > _MAX_REMEMBERED:
            self._values.popitem(last=False)


def _stored(result: ReadResult) -> tuple[bytes, int, Digest | None]:
    return result.content, result.levels, result.captured


def _identity(snapshot: Snapshot) -> object:
    """Return a key that is equal for a snapshot and its copies, and for no other snapshot."""
    tree = snapshot.root.tree
    sizes = (tree.nodes, tree.total_bytes, tree.flagged) if tree is not None else None
    return snapshot.time_ns, snapshot.host, snapshot.paths, snapshot.tags, sizes, snapshot.stats


def _snapshots_of(repository: Repository) -> dict[object, SnapshotId]:
    """Return the ids of the snapshots by identity; none where this host can write and not read.

    Such a host copies a snapshot a second time rather than miss one.
    """
    try:
        return {
            _identity(found): snapshot_id
            for snapshot_id, found in repository.snapshots.iterate()
            if repository.snapshots.provenance.is_from_trusted_writer(snapshot_id)
        }
    except KeyMissingError:
        log.warning(
            "no key for %s was given, so the snapshots that it has are unknown; all are copied",
            repository.place,
        )
        return {}
