"""The event loop never blocks: what it reads at once, what a worker reads, and prefetching."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from casfs_mount.background import BackgroundPool
from casfs_mount.blob_reader import BlobReader
from casfs_mount.event_loop_guard import EventLoopGuard, WouldBlock
from casfs_mount.inodes import Numbering
from casfs_mount.prefetch import Prefetcher
from casfs_mount.tree_cache import TreeCache

from casfs.digest import Digest, digest_of
from casfs.errors import IndexUnusableError
from casfs.format.tree import Node
from casfs.repository.opening import open_for_reading
from casfs.store.blob_store import pack_name
from tests.support.builders import Plan, RepositoryFixture, TreeFixture, reference


@pytest.fixture
def repo(tmp_path: Path) -> RepositoryFixture:
    return RepositoryFixture(tmp_path)


class TestBlobReader:
    def test_the_event_loop_reads_a_blob_that_the_kernel_has_cached(
        self, repo: RepositoryFixture
    ) -> None:
        repo.store(b"small", bytes(1 << 20))
        with repo.reading() as repository:
            guard = EventLoopGuard()
            blobs = BlobReader(repository.store, guard)
            assert blobs.read(digest_of(b"small")) == b"small"
            guard.bind()
            assert blobs.read(digest_of(b"small")) == b"small"

    def test_the_event_loop_does_not_wait_for_a_blob_outside_the_page_cache(
        self, repo: RepositoryFixture
    ) -> None:
        repo.store(b"small")
        with repo.reading() as repository:
            guard = EventLoopGuard()
            blobs = BlobReader(repository.store, guard)
            assert blobs.read(digest_of(b"small")) == b"small"
            place = repository.store.locate(digest_of(b"small"))
            path = repo.root / pack_name(repository.store.index.pack_ref(place.pack))
            drop_from_memory(path)
            guard.bind()
            with pytest.raises(WouldBlock):
                blobs.read(digest_of(b"small"))

    def test_the_event_loop_leaves_large_blobs_to_a_worker(self, repo: RepositoryFixture) -> None:
        large = os.urandom(1 << 20)
        repo.store(large)
        with repo.reading() as repository:
            guard = EventLoopGuard()
            blobs = BlobReader(repository.store, guard)
            assert blobs.read(digest_of(large)) == large
            guard.bind()
            with pytest.raises(WouldBlock):
                blobs.read(digest_of(large))

    def test_the_event_loop_leaves_damaged_or_missing_blobs_to_a_worker(
        self, repo: RepositoryFixture
    ) -> None:
        repo.store(b"damaged")
        repo.damage(digest_of(b"damaged"))
        with repo.reading() as repository:
            guard = EventLoopGuard()
            blobs = BlobReader(repository.store, guard)
            guard.bind()
            for digest in (digest_of(b"damaged"), digest_of(b"missing")):
                with pytest.raises(WouldBlock):
                    blobs.read(digest)
                assert blobs.prefetch([digest]) == (0 if digest == digest_of(b"missing") else 7)

    def test_the_event_loop_avoids_a_slow_index_for_a_while(
        self, repo: RepositoryFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        repo.store(b"small")
        now, faults, slow = 100.0, 0, True
        with repo.reading() as repository:
            guard = EventLoopGuard()
            blobs = BlobReader(
                repository.store, guard, clock=lambda: now, major_faults=lambda: faults
            )
            blobs.read(digest_of(b"small"))
            whole = repository.store.read_nonblocking

            def read_nonblocking(digest: Digest, most: int) -> bytes | None:
                nonlocal now
                now += 0.05 if slow else 0.0
                return whole(digest, most)

            monkeypatch.setattr(repository.store, "read_nonblocking", read_nonblocking)
            guard.bind()
            assert blobs.read(digest_of(b"small")) == b"small"
            assert blobs.read(digest_of(b"small")) == b"small", "another program took the time"
            faults = 1
            assert blobs.read(digest_of(b"small")) == b"small"
            slow = False
            with pytest.raises(WouldBlock):
                blobs.read(digest_of(b"small"))
            now += 1
            assert blobs.read(digest_of(b"small")) == b"small"

    def test_a_blob_of_an_unusable_index_is_not_prefetched(
        self, repo: RepositoryFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with repo.reading() as repository:

            def fail(digests: Sequence[Digest]) -> int:
                raise IndexUnusableError("gone")

            monkeypatch.setattr(repository.store, "prefetch", fail)
            assert BlobReader(repository.store, EventLoopGuard()).prefetch([digest_of(b"")]) == 0


def drop_from_memory(path: Path) -> None:
    """Drop a file's pages from the page cache, and verify that without loading any."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(
            file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
        ) as area:
            resident = (ctypes.c_ubyte * 1)()
            address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(area)))
            assert ctypes.CDLL(None).mincore(address, mmap.PAGESIZE, resident) == 0
            del address
            gc.collect()
        if resident[0] & 1:
            pytest.skip("this file system keeps what it was asked to drop")


class Prompt(BackgroundPool):
    """Runs background tasks at once and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def submit(self, task: Callable[[], None]) -> bool:
        self.count += 1
        task()
        return True


class Asked(BlobReader):
    """Blobs in memory; remembers what was asked for ahead."""

    files_ahead = 64

    def __init__(self, trees: TreeFixture, is_far: bool) -> None:
        self.asked: list[bytes] = []
        self.around: list[bytes] = []
        self.trees = trees
        self.is_far = is_far

    def prefetch(self, digests: Sequence[Digest]) -> int:
        self.asked += digests
        return sum(len(self.trees.blobs[digest]) for digest in digests)

    def prefetch_around(self, digest: Digest) -> None:
        self.around.append(digest)


DEEP: Plan = {
    b"%02d" % a: {
        b"%02d" % b: {b"%02d.%02d.%02d" % (a, b, c): b"" for c in range(3)} for b in range(10)
    }
    for a in range(20)
}


class Walk:
    """A tree, a client that walks it, and a prefetcher that sees the client."""

    def __init__(self, plan: Plan, is_far: bool = True) -> None:
        self.trees = TreeFixture()
        self.root = self.trees.build(plan)
        self.pieces = TreeCache(self.trees.read)
        self.numbers = Numbering(self.root, 1, self.pieces)
        self.blobs = Asked(self.trees, is_far)
        self.background = Prompt()
        self.prefetcher = Prefetcher(self.numbers, self.pieces, self.blobs, self.background)
        self.waits = 0

    def list(self, number: int, directory: Node) -> int:
        """List a directory and all below it; return how many directories there are."""
        assert directory.tree is not None
        waited = not self.pieces.holds(directory.tree)
        self.waits += waited
        self.prefetcher.on_readdir(number, waited)
        found = 1
        for below, node, _ in self.numbers.entries(number, directory):
            if node.tree is not None:
                found += self.list(below, node)
        return found


def test_a_tree_is_requested_with_what_lies_around_it_in_its_pack(
    repo: RepositoryFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.store(b"one", b"two")
    with open_for_reading(repo.root) as repository:
        store = repository.store
        location = store.locate(digest_of(b"two"))
        asked: list[tuple[str, int, int]] = []
        monkeypatch.setattr(store.storage, "prefetch", lambda *what: asked.append(what))
        now = 100.0
        blobs = BlobReader(store, EventLoopGuard(), clock=lambda: now)
        assert not blobs.is_far
        blobs.prefetch_around(digest_of(b"missing"))
        blobs.prefetch_around(digest_of(b"two"))
        blobs.prefetch_around(digest_of(b"one"))
        ((name, begin, size),) = asked
        assert name == pack_name(store.index.pack_ref(location.pack))
        assert begin <= location.offset < begin + size - location.stored_bytes
        now += 60
        blobs.prefetch_around(digest_of(b"one"))
        assert len(asked) == 2, "its pages may have been dropped since"


class TestPrefetcher:
    def test_the_prefetcher_lets_a_walk_wait_only_once(self) -> None:
        walk = Walk(DEEP)
        assert walk.list(1, walk.root) == 1 + 20 + 200
        assert walk.waits == 1
        assert len(walk.trees.reads) == len(set(walk.trees.reads))

    def test_the_prefetcher_reads_a_bounded_number_of_directories_ahead(self) -> None:
        walk = Walk(DEEP)
        walk.prefetcher.on_readdir(1, True)
        assert 60 <= len(walk.trees.reads) <= 70

    def test_the_prefetcher_does_nothing_for_a_reader_that_does_not_wait(self) -> None:
        walk = Walk(DEEP)
        for number in range(1, 200, 7):
            walk.prefetcher.on_readdir(number, False)
            walk.prefetcher.on_open(number, False)
        assert walk.background.count == 0

    def test_the_prefetcher_requests_trees_from_a_disk_and_decodes_none(self) -> None:
        walk = Walk(DEEP, is_far=False)
        walk.prefetcher.on_readdir(1, True)
        assert walk.blobs.around == [reference(walk.root)]
        assert walk.trees.reads == []
        (number,) = [n for n, node, _ in walk.numbers.entries(1, walk.root) if node.name == b"15"]
        walk.prefetcher.on_readdir(number, False)
        assert len(walk.blobs.around) == 1
        walk.prefetcher.on_readdir(number, True)
        assert walk.blobs.around[1:] == [reference(walk.numbers.node(number))]

    def test_the_prefetcher_restarts_where_a_reader_waits_far_away(self) -> None:
        walk = Walk(DEEP)
        walk.prefetcher.on_readdir(1, True)
        (number,) = [n for n, node, _ in walk.numbers.entries(1, walk.root) if node.name == b"15"]
        before = len(walk.trees.reads)
        walk.prefetcher.on_readdir(number, True)
        assert len(walk.trees.reads) > before + 30
        assert walk.numbers.path(number) == b"15"

    def test_the_prefetcher_ignores_a_damaged_tree(self) -> None:
        walk = Walk(DEEP)
        found = walk.numbers.child(1, walk.root, b"01")
        assert found is not None
        damaged = reference(found[1])
        walk.trees.blobs[damaged] = b"\xc1"
        background = BackgroundPool()
        prefetcher = Prefetcher(walk.numbers, walk.pieces, walk.blobs, background)
        prefetcher.on_readdir(1, True)
        done = threading.Event()
        while not background.submit(done.set):
            pass
        assert done.wait(30) and background.close(30)

    def test_the_prefetcher_requests_the_files_after_an_opened_one_in_batches(self) -> None:
        content = {b"%04d" % n: b"content %d" % n for n in range(300)}
        walk = Walk(content)
        entries = list(walk.numbers.entries(1, walk.root))
        for i, (number, _, _) in enumerate(entries):
            walk.prefetcher.on_open(number, i == 0)
        assert walk.background.count < 15
        asked = [walk.trees.blobs[Digest(digest)] for digest in walk.blobs.asked]
        assert asked == [content[name] for name in sorted(content)][1:]

    def test_the_prefetcher_requests_few_large_files(self) -> None:
        content = {b"%04d" % n: bytes([n]) * (3 << 20) for n in range(30)}
        walk = Walk(content)
        walk.prefetcher.on_open(2, True)
        assert len(walk.blobs.asked) == 3

    def test_the_prefetcher_requests_nothing_after_the_last_file(self) -> None:
        walk = Walk({b"only": b"one"})
        walk.prefetcher.on_open(2, True)
        walk.prefetcher.on_open(1, True)
        assert walk.blobs.asked == []


def test_a_reader_of_the_repository_returns_only_cached_blobs_without_waiting(
    repo: RepositoryFixture,
) -> None:
    repo.store(b"one", b"two")
    with open_for_reading(repo.root) as repository:
        store = repository.store
        place = store.locate(digest_of(b"one"))
        name = pack_name(store.index.pack_ref(place.pack))
        assert store.read_nonblocking(digest_of(b"one"), 1 << 20) is None, "the pack is not open"
        assert store.read(digest_of(b"two")) == b"two"
        assert store.read_nonblocking(digest_of(b"one"), 1 << 20) == b"one"
        assert store.read_nonblocking(digest_of(b"one"), 2) is None
        assert store.storage.read_nonblocking(name, 0, 1 << 30) is None
        store.storage.prefetch("packs/00/nothing", 0, 10)
        repository.store.index.prefetch(1 << 30)
