"""The blobs that snapshots need, found in few look-ups of the index."""

from __future__ import annotations

from pathlib import Path

import pytest

from casfs.digest import Digest, digest_of
from casfs.format.codec import BlobKind
from casfs.format.tree import Node, NodeType
from casfs.index.index import Index
from casfs.index.schema import Location
from casfs.repository import needed_blobs
from casfs.repository.creation import create_repository
from casfs.repository.needed_blobs import NeededBlobs
from casfs.repository.opening import OpenOptions, open_for_writing
from casfs.repository.repository import Repository
from casfs.store.pack_shares import stored_bytes
from casfs.store.writer import BlobWriter
from casfs.trees.content import HOLE, ContentWriter

AT_ONCE = 100


def file_of(writer: BlobWriter, name: bytes, chunks: list[bytes]) -> Node:
    """Store a file of these chunks, with a hole after each."""
    content = ContentWriter(writer.put, digest_of)
    for chunk in chunks:
        writer.put(BlobKind.DATA, digest_of(chunk), chunk)
        content.add(len(chunk), digest_of(chunk))
        content.add(1, HOLE)
    records, levels = content.finish()
    size = sum(len(chunk) + 1 for chunk in chunks)
    return Node(
        *(name, NodeType.FILE, 0o644, 0, 0, 0, 0, 1, 1, size), content=records, levels=levels
    )


def store_root(repository: Repository, files: list[tuple[bytes, list[bytes]]]) -> Node:
    writer = repository.writer()
    tree = repository.tree_writer(writer.put)
    for name, chunks in files:
        tree.add(file_of(writer, name, chunks))
    root = Node(b"", NodeType.DIRECTORY, 0o755, 0, 0, 0, 0, 1, 2, tree=tree.finish())
    writer.finish()
    return root


def test_the_blobs_of_the_files_of_a_directory_are_looked_up_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_repository(tmp_path / "repository")
    asked: list[int] = []
    lookup_many, lookup = Index.lookup_many, Index.lookup

    def counted_many(self: Index, digests: list[Digest]) -> list[Location | None]:
        asked.append(len(digests))
        return lookup_many(self, digests)

    def counted(self: Index, digest: Digest) -> Location | None:
        asked.append(1)
        return lookup(self, digest)

    small = [(b"small %04d" % number, [b"chunk %d" % number]) for number in range(250)]
    # Its chunks are in content lists, which are blobs too; it repeats those of the small files.
    large = (b"large", [b"chunk %d" % number for number in range(3000)])
    with open_for_writing(tmp_path / "repository", "backup", OpenOptions(sync=False)) as repository:
        root = store_root(repository, [large, *small])
        monkeypatch.setattr(needed_blobs, "_ASKED_AT_ONCE", AT_ONCE)
        monkeypatch.setattr(Index, "lookup_many", counted_many)
        monkeypatch.setattr(Index, "lookup", counted)
        needed = NeededBlobs(repository)
        needed.add(root)
        needed.add(root)
        monkeypatch.undo()
        assert needed.count == repository.store.index.blob_count() > 3000
        assert stored_bytes(repository.store.index, needed.shares) > 0
        assert all(at.ordinal in needed.blobs for _, at in repository.store.index.blobs())
    lists = needed.count - 3000
    assert max(asked) == AT_ONCE
    assert len(asked) <= 3250 / AT_ONCE + 1 + 3 * lists
