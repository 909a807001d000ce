"""Writing into a repository of format 1: the same trees, packs and snapshots as before there was a format 2.

The constants are what an early version wrote. Compressed bytes are left out, since they depend on the version
of zstd.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
import zstandard

from casfs.digest import SnapshotId, digest_of
from casfs.format.codec import BlobKind
from casfs.format.snapshot import HEADER, Snapshot
from casfs.format.tree import Node, NodeExtra, NodeType, replace
from casfs.format.versions import NEWEST_FORMAT, OLDEST_FORMAT
from casfs.repository.repository import Repository
from casfs.trees.content import Put
from tests.support.builders import Plan, RepositoryFixture, entry, file
from tests.support.stores import noise, pack_paths, pack_ref

PLAN: Plan = {
    b"data": noise("data", 20_000),
    b"empty": b"",
    b"folder": {
        b"many": {b"%04d" % number: b"" for number in range(3000)},
        b"noted": file(b"noted", b"", extra=NodeExtra(xattrs=((b"user.note", b"kept"),))),
    },
    b"link": entry(b"link", NodeType.SYMLINK, size=4, content=b"data"),
}

BLOBS = [
    ("DATA", "d0207dfc2326a74e3df4f5f2528dad6e", 20000),
    ("TREE", "5e02d0cf98611549b05be96db780af21", 76653),
    ("TREE", "5de7b404445a91bfe5285a68e0116f61", 55357),
    ("TREE", "4c235f05496c14eb43cb9c778cec61d0", 97),
    ("TREE", "38f4dd8fc54a58780d986c2e0542827a", 153),
    ("TREE", "7593de7b8c5c67d713c17c749f891aa6", 267),
]
SNAPSHOT = "d765494d778e897493ff4ade719a367709bcdc1ae89e6eae0dc245984f5ce40e"


def build(repository: Repository, put: Put, plan: Plan, name: bytes = b"") -> Node:
    tree = repository.tree_writer(put)
    for below in sorted(plan):
        what = plan[below]
        if isinstance(what, Mapping):
            what = build(repository, put, what, below)
        elif isinstance(what, bytes):
            if what:
                put(BlobKind.DATA, digest_of(what), what)
            what = file(below, what)
        tree.add(replace(what, name=below))
    return entry(name, NodeType.DIRECTORY, tree=tree.finish())


def publish(repo: RepositoryFixture) -> SnapshotId:
    with repo.writing() as repository:
        writer = repository.writer()
        root = build(repository, writer.put, PLAN)
        writer.finish()
        return repository.snapshots.publish(
            Snapshot(
                root,
                time_ns=10**18,
                host="frozen",
                user="me",
                paths=(b".",),
                program="by hand",
            )
        )


def blobs_of(repo: RepositoryFixture, *, is_meta: bool) -> list[tuple[str, str, int]]:
    """Return kind, begin of the digest and plaintext size of the blobs of the only pack of a kind."""
    (path,) = [path for path in pack_paths(repo.root) if pack_ref(path).is_meta == is_meta]
    with repo.reading() as repository:
        entries = repository.store.read_directory(pack_ref(path), path.stat().st_size)
    return [(BlobKind(one.kind).name, one.digest.hex()[:32], one.plain_bytes) for one in entries]


def payload_of(repo: RepositoryFixture, snapshot_id: SnapshotId) -> bytes:
    data = (repo.root / "snapshots" / snapshot_id.hex()).read_bytes()
    return zstandard.decompress(data[HEADER.size :])


def test_a_writer_of_format_1_stores_what_it_always_stored(tmp_path: Path) -> None:
    repo = RepositoryFixture(tmp_path, OLDEST_FORMAT)
    snapshot_id = publish(repo)
    assert blobs_of(repo, is_meta=False) == BLOBS
    assert digest_of(payload_of(repo, snapshot_id)).hex() == SNAPSHOT
    assert (repo.root / "config").read_bytes().startswith(b"casfs repository, format 1\n")
    assert not (repo.root / "meta").exists()


def test_a_writer_of_format_1_changes_no_tree_that_it_takes_over(tmp_path: Path) -> None:
    """As in a backup that finds a directory unchanged, whose node comes from the parent snapshot."""
    repo = RepositoryFixture(tmp_path, OLDEST_FORMAT)
    snapshot_id = publish(repo)
    with repo.writing() as repository:
        snapshot = repository.snapshots.load(snapshot_id)
        again = repository.snapshots.publish(snapshot)
        assert snapshot.root.tree is not None
        nodes = repository.trees.unsplit_entries(snapshot.root.tree)
        tree = repository.tree_writer(lambda kind, digest, data: None)
        for node in nodes or ():
            tree.add(node)
        assert tree.finish() == snapshot.root.tree
    assert again == snapshot_id


def test_format_2_differs_in_the_packs_and_in_the_counts_of_its_trees(tmp_path: Path) -> None:
    repo = RepositoryFixture(tmp_path, NEWEST_FORMAT)
    snapshot_id = publish(repo)
    assert blobs_of(repo, is_meta=False) == BLOBS[:1]
    found = blobs_of(repo, is_meta=True)
    # Two leaves, the branch above them, and two directories: each reference is a byte longer.
    grown_bytes = [0, 0, 2, 1, 1]
    assert [now[2] - was[2] for was, now in zip(BLOBS[1:], found, strict=True)] == grown_bytes
    assert [now[1] == was[1] for was, now in zip(BLOBS[1:], found, strict=True)] == [
        not grown for grown in grown_bytes
    ]
    root = msgspec.msgpack.decode(payload_of(repo, snapshot_id))["root"]
    assert root[15][1:] == [3006, 20_000, 0, 1]


@pytest.mark.parametrize("format_", [OLDEST_FORMAT, NEWEST_FORMAT])
def test_the_count_of_a_tree_is_known_in_format_2_only(tmp_path: Path, format_: int) -> None:
    repo = RepositoryFixture(tmp_path, format_)
    snapshot_id = publish(repo)
    with repo.reading() as repository:
        tree = repository.snapshots.load(snapshot_id).root.tree
    assert tree is not None
    assert tree.xattrs == (None if format_ == OLDEST_FORMAT else 1)
