"""Reading ahead: a walk in order finds every blob, whichever thread reads it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from casfs.digest import Digest, digest_of
from casfs.errors import BlobError
from casfs.format.tree import Node, NodeType, TreeRef
from casfs.repository import prefetch as prefetch_module
from casfs.repository.prefetch import Prefetcher
from casfs.repository.repository import Repository
from casfs.store.batch_read import ReadPlan
from casfs.store.blob_store import BlobStore, pack_name
from casfs.trees.content import ContentReader
from casfs.trees.reader import TreeReader
from casfs.trees.writer import TreeWriter
from tests.support.builders import RepositoryFixture, entry
from tests.support.far import FarRepository
from tests.support.storage_double import Call
from tests.support.stores import flip, noise

FILES = 40
HUNG_S = 60


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RepositoryFixture:
    """A repository of files in some folders, and batches of a few blobs."""
    few = replace(prefetch_module._NEAR, batch_blobs=4)
    monkeypatch.setattr(prefetch_module, "_NEAR", few)
    source = tmp_path / "source"
    for number in range(FILES):
        path = source / f"{number % 5}" / f"{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise(f"file {number % 30}", 2000))
    (source / "3" / "big").write_bytes(noise("big", 9_000_000))
    (source / "3" / "empty").write_bytes(b"")
    repo = RepositoryFixture(tmp_path)
    repo.back_up(source)
    return repo


@pytest.fixture
def repository(repo: RepositoryFixture) -> Iterator[Repository]:
    with repo.reading() as opened:
        yield opened


@pytest.fixture
def own_reads(monkeypatch: pytest.MonkeyPatch) -> list[Digest]:
    """The digests of the blobs that the one who goes through the tree had to read himself."""
    found: list[Digest] = []
    real = BlobStore.read

    def read(self: BlobStore, digest: Digest) -> bytes:
        if threading.current_thread() is threading.main_thread():
            found.append(digest)
        return real(self, digest)

    monkeypatch.setattr(BlobStore, "read", read)
    return found


def root_of(repository: Repository) -> Node:
    _, snapshot = repository.snapshots.resolve("latest")
    return snapshot.root


def go(ahead: Prefetcher, root: Node, skip: bytes = b"?") -> dict[bytes, bytes | BlobError]:
    """Go through a tree as a restore does and return the contents of its files."""
    contents: dict[bytes, bytes | BlobError] = {}
    for path, node in TreeReader(ahead.read).walk(root):
        ahead.path = path
        if node.kind != NodeType.FILE or path.split(b"/")[-2] == skip:
            continue
        try:
            extents = ContentReader(node.content, node.levels, ahead.read).extents()
            contents[path] = b"".join(ahead.read(one.digest) for one in extents if one.digest)
        except BlobError as error:
            contents[path] = error
    return contents


def wanted(repository: Repository, skip: bytes = b"?") -> dict[bytes, bytes]:
    read = repository.store.read
    return {
        path: b"".join(read(one.digest) for one in repository.content(node).extents() if one.digest)
        for path, node in repository.trees.walk(root_of(repository))
        if node.kind == NodeType.FILE and path.split(b"/")[-2] != skip
    }


def test_the_prefetcher_reads_every_blob_of_a_walk_ahead(
    repository: Repository, own_reads: list[Digest]
) -> None:
    root = root_of(repository)
    with Prefetcher(repository, b"", root) as ahead:
        found = go(ahead, root)
    assert own_reads == []
    assert found == wanted(repository)
    assert len(found) == FILES + 2


def test_the_prefetcher_follows_a_walk_that_skips_a_folder(
    repository: Repository, own_reads: list[Digest]
) -> None:
    root = root_of(repository)
    with Prefetcher(repository, b"", root) as ahead:
        found = go(ahead, root, skip=b"1")
    assert own_reads == []
    assert found == wanted(repository, skip=b"1")


def test_a_blob_outside_the_walk_is_read_directly(repository: Repository) -> None:
    root = root_of(repository)
    last = max(wanted(repository))
    node = repository.trees.resolve(root, last)
    assert node is not None
    digest = Digest(node.content[8:40])
    with Prefetcher(repository, b"", root) as ahead:
        assert digest_of(ahead.read(digest)) == digest


def test_damage_reaches_the_reader_of_the_damaged_blob_only(
    repo: RepositoryFixture, own_reads: list[Digest]
) -> None:
    bad = noise("file 7", 2000)
    with repo.reading() as repository:
        location = repository.store.locate(digest_of(bad))
        pack = repository.store.index.pack_ref(location.pack)
        flip(repo.root / pack_name(pack), location.offset + 100)
    with repo.reading() as repository:
        root = root_of(repository)
        with Prefetcher(repository, b"", root) as ahead:
            found = go(ahead, root)
    damaged = [path for path, content in found.items() if isinstance(content, BlobError)]
    assert [path.split(b"/")[-1] for path in damaged] == [b"37", b"7"]
    assert set(own_reads) == {digest_of(bad)}


def test_an_unreadable_tree_ends_prefetching_and_the_rest_is_read_directly(
    repo: RepositoryFixture, own_reads: list[Digest]
) -> None:
    with repo.reading() as repository:
        root = root_of(repository)
        folder = next(
            node for path, node in repository.trees.walk(root) if path.endswith(b"source/2")
        )
        assert folder.tree is not None
        location = repository.store.locate(Digest(folder.tree.digest))
        pack = repository.store.index.pack_ref(location.pack)
        flip(repo.root / pack_name(pack), location.offset + 5)
        own_reads.clear()
        with Prefetcher(repository, b"", root) as ahead, pytest.raises(BlobError):
            go(ahead, root)
        assert own_reads == [Digest(folder.tree.digest)]
        with Prefetcher(repository, b"", root) as ahead:
            ahead.path = b"zzz"
            assert ahead.read(digest_of(noise("file 29", 2000))) == noise("file 29", 2000)


def prefetching_threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("casfs-prefetch")]


def test_the_prefetcher_can_be_closed_at_any_moment_and_leaves_no_thread(
    repository: Repository,
) -> None:
    root = root_of(repository)
    for count in range(8):
        with Prefetcher(repository, b"", root) as ahead:
            for path, _ in zip(wanted(repository), range(count), strict=False):
                ahead.path = path
                ahead.read(digest_of(noise("file 0", 2000)))
    assert prefetching_threads() == []


def test_a_prefetch_of_more_directories_than_anybody_can_read_is_closed_at_once(
    tmp_path: Path,
) -> None:
    repo = RepositoryFixture(tmp_path)
    with repo.writing() as repository:
        writer = repository.writer()

        def tree_of(*nodes: Node) -> TreeRef:
            tree = TreeWriter(writer.put, repository.codec.digest, repository.tree_seed)
            for node in nodes:
                tree.add(node)
            return tree.finish()

        ref = tree_of()
        for _ in range(40):
            ref = tree_of(*(entry(name, NodeType.DIRECTORY, tree=ref) for name in (b"a", b"b")))
        writer.finish()
    with repo.reading() as repository:
        root = entry(b"", NodeType.DIRECTORY, tree=ref)
        prefetcher = Prefetcher(repository, b"", root)
        closing = threading.Thread(target=prefetcher.close, daemon=True)
        closing.start()
        closing.join(HUNG_S)
        assert not closing.is_alive()


class TestDistance:
    @pytest.fixture
    def far(
        self, repo: RepositoryFixture, own_home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> FarRepository:
        """A repository at a distance with the same files."""
        far = FarRepository.create(monkeypatch)
        far.back_up(repo.root.parent / "source")
        return far

    def test_a_walk_reads_few_ranges_and_every_blob_ahead(
        self, far: FarRepository, own_reads: list[Digest]
    ) -> None:
        with far.reading() as repository:
            root = root_of(repository)
            expected = wanted(repository)
            far.requests()
            own_reads.clear()
            with Prefetcher(repository, b"", root) as ahead:
                found = go(ahead, root)
            assert own_reads == []
            assert found == expected
            assert len(found) == FILES + 2
            # 9 MB of one file and 60 KB of small ones, in reads of 8 MiB.
            assert far.requests().count("read packs") <= 3

    def test_several_ranges_are_read_at_the_same_time(
        self, far: FarRepository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        small = replace(ReadPlan.of(far.storage), read_bytes=1 << 20)
        monkeypatch.setattr(ReadPlan, "of", lambda storage: small)
        together = threading.Barrier(4, timeout=HUNG_S)
        with far.reading() as repository:
            root = root_of(repository)
            expected = wanted(repository)

            def meet(call: Call) -> None:
                if call.size > 500_000:
                    with suppress(threading.BrokenBarrierError):
                        together.wait()
                    if not together.broken:
                        far.storage.script.before = None

            far.storage.script.before = meet
            with Prefetcher(repository, b"", root) as ahead:
                assert go(ahead, root) == expected
            assert not together.broken

    def test_damage_is_read_again_by_the_walk_alone(
        self, far: FarRepository, own_reads: list[Digest]
    ) -> None:
        bad = digest_of(noise("file 7", 2000))
        with far.reading() as repository:
            at = repository.store.locate(bad)
            name = pack_name(repository.store.index.pack_ref(at.pack))
            data = bytearray(far.storage.inner.read(name))
            data[at.offset + 100] ^= 1
            far.storage.inner.write(name, bytes(data))
            root = root_of(repository)
            with Prefetcher(repository, b"", root) as ahead:
                found = go(ahead, root)
            damaged = [path for path, data in found.items() if isinstance(data, BlobError)]
            assert [path.split(b"/")[-1] for path in damaged] == [b"37", b"7"]
            assert set(own_reads) == {bad}

    def test_a_far_prefetch_can_be_closed_at_any_moment(self, far: FarRepository) -> None:
        with far.reading() as repository:
            root = root_of(repository)
            repository.store.read(digest_of(noise("file 0", 2000)))
            for _ in range(4):
                with Prefetcher(repository, b"", root):
                    pass
            assert prefetching_threads() == []
