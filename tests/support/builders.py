"""Trees for tests: built in memory from a plan, or backed up from a folder.

A plan is a dict from names to entries: bytes are the content of a file, a dict is a directory, and a
node is itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from casfs.backup.run import BackupOptions, run_backup
from casfs.digest import Digest, SnapshotId, digest_of
from casfs.format.codec import BlobKind
from casfs.format.snapshot import Snapshot
from casfs.format.tree import (
    Capture,
    CaptureState,
    ChangeReason,
    Node,
    NodeExtra,
    NodeType,
    captured_digest,
    replace,
)
from casfs.format.versions import DEFAULT_FORMAT
from casfs.monitor import RecordingMonitor
from casfs.repository.creation import create_repository
from casfs.repository.opening import OpenOptions, open_for_reading, open_for_writing
from casfs.repository.repository import Repository
from casfs.store.blob_store import pack_name
from casfs.trees.content import EXTENT
from casfs.trees.reader import TreeReader
from casfs.trees.writer import FORMAT_SPLIT, TreeSplit, TreeWriter

Plan = Mapping[bytes, Any]

SEED = 7
MTIME_NS = 1_600_000_000_123_456_789


def entry(name: bytes, kind: NodeType = NodeType.FILE, **fields: Any) -> Node:
    """Return a node with the fields that a test does not care for filled in."""
    known: dict[str, Any] = {
        "mode": 0o755 if kind == NodeType.DIRECTORY else 0o644,
        "uid": 0,
        "gid": 0,
        "mtime_ns": MTIME_NS,
        "ctime_ns": MTIME_NS,
        "inode": 1,
        "nlink": 1,
    }
    return Node(name, kind, **(known | fields))


def file(name: bytes, content: bytes = b"", **fields: Any) -> Node:
    """Return the node of a file that consists of one chunk."""
    records = EXTENT.pack(len(content), digest_of(content)) if content else b""
    return entry(name, size=len(content), content=records, **fields)


def flagged(node: Node, seen: bytes = b"seen when read again") -> Node:
    """Return a file's node with the evidence that it changed while it was captured."""
    capture = Capture(ChangeReason.REWRITTEN, 3, digest_of(seen))
    extra = replace(node.extra or NodeExtra(), capture=capture)
    return replace(node, state=CaptureState.CHANGED, captured=captured_digest(node), extra=extra)


class TreeFixture:
    """Trees in memory; `reads` are the digests of the blobs read so far, in order."""

    def __init__(self, split: TreeSplit = FORMAT_SPLIT) -> None:
        self._split = split
        self.blobs: dict[Digest, bytes] = {}
        self.reads: list[Digest] = []
        self.reader = TreeReader(self.read)

    def read(self, digest: Digest) -> bytes:
        self.reads.append(digest)
        return self.blobs[digest]

    def put(self, kind: BlobKind, digest: Digest, data: bytes) -> None:
        self.blobs[digest] = data

    def build(self, plan: Plan, name: bytes = b"", **fields: Any) -> Node:
        """Return the node of a directory with the entries of a plan."""
        writer = TreeWriter(self.put, digest_of, SEED, split=self._split)
        for below in sorted(plan):
            what = plan[below]
            if isinstance(what, Mapping):
                what = self.build(what, below)
            elif isinstance(what, bytes):
                self.put(BlobKind.DATA, digest_of(what), what)
                what = file(below, what)
            writer.add(replace(what, name=below))
        return entry(name, NodeType.DIRECTORY, tree=writer.finish(), **fields)


def reference(node: Node) -> Digest:
    """Return the digest of a directory's tree."""
    assert node.tree is not None
    return Digest(node.tree.digest)


class RepositoryFixture:
    """A repository of its own, and backups of folders into it; `split` is for trees of a plan."""

    def __init__(self, folder: Path, format_: int = DEFAULT_FORMAT) -> None:
        self.root = folder / "repository"
        self.split = FORMAT_SPLIT
        create_repository(self.root, format_=format_)

    def back_up(self, *sources: Path, **options: Any) -> tuple[SnapshotId, Snapshot]:
        """Publish a snapshot of the sources and return it."""
        paths = tuple(bytes(source) for source in sources)
        with self.writing() as repository:
            result = run_backup(
                repository,
                BackupOptions(**({"paths": paths, "host": "here"} | options)),
                RecordingMonitor(),
            )
        assert result.snapshot_id is not None
        return result.snapshot_id, result.snapshot

    def publish(self, plan: Plan, **fields: Any) -> tuple[SnapshotId, Snapshot]:
        """Publish a snapshot of a plan; blobs of files that it gives as nodes are not stored."""
        with self.writing() as repository:
            trees = TreeFixture(self.split)
            root = trees.build(plan)
            writer = repository.writer()
            for digest, data in trees.blobs.items():
                writer.put(BlobKind.TREE, digest, data)
            writer.finish()
            known: dict[str, Any] = {"time_ns": MTIME_NS, "host": "here", "user": "me"}
            snapshot = Snapshot(root, **({"paths": (b".",)} | known | fields))
            return repository.snapshots.publish(snapshot), snapshot

    def store(self, *chunks: bytes) -> None:
        """Store blobs of data."""
        with self.writing() as repository:
            writer = repository.writer()
            for chunk in chunks:
                writer.put(BlobKind.DATA, digest_of(chunk), chunk)
            writer.finish()

    def writing(self) -> Repository:
        return open_for_writing(self.root, "test", OpenOptions(sync=False))

    def reading(self) -> Repository:
        return open_for_reading(self.root)

    def damage(self, digest: Digest) -> None:
        """Flip a bit of a blob where it is stored."""
        with self.reading() as repository:
            place = repository.store.locate(digest)
            path = self.root / pack_name(repository.store.index.pack_ref(place.pack))
        with open(path, "r+b") as pack:
            pack.seek(place.offset + place.stored_bytes // 2)
            byte = pack.read(1)
            pack.seek(-1, 1)
            pack.write(bytes([byte[0] ^ 1]))
