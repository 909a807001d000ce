"""Storing blobs: each one once, in packs, durable in the right order; an error reaches the producer."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from casfs.digest import PackId, digest_of
from casfs.errors import BlobError, StorageError
from casfs.format.codec import MAX_PLAIN_BYTES, BlobKind, Codec
from casfs.format.pack import BLOB_HEADER, PackRef
from casfs.index import index as index_module
from casfs.index.index import Index
from casfs.index.lmdb_env import LmdbEnv, Transaction
from casfs.index.schema import IndexedPack
from casfs.store import pack_builder
from casfs.store import writer as writer_module
from casfs.store.blob_store import BlobStore, pack_name
from casfs.store.writer import BlobWriter, WriteStats
from tests.support.stores import noise, open_store, pack_paths, store_blobs

KIB = 1 << 10


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlobStore]:
    with open_store(tmp_path) as opened:
        yield opened


@pytest.fixture
def small_packs(monkeypatch: pytest.MonkeyPatch) -> int:
    """Sizes that make a pack of a few blobs."""
    monkeypatch.setattr(pack_builder, "_BUFFER_BYTES", 4 * KIB)
    monkeypatch.setattr(writer_module, "_BATCH_BYTES", 32 * KIB)
    return 64 * KIB


def blobs(label: str, count: int, size: int = 10 * KIB) -> list[bytes]:
    return [noise(f"{label} {number}", size) for number in range(count)]


def temporaries(store: BlobStore) -> list[str]:
    assert store.storage.__class__.__name__ == "LocalStorage"
    return os.listdir(store.storage.root / "tmp")  # type: ignore[attr-defined]


class TestStoredBlobs:
    def test_stored_blobs_are_read_back_after_finish(
        self, store: BlobStore, small_packs: int
    ) -> None:
        plains = [b"", b"small", b"compressible " * 5000, *blobs("a", 30)]
        stats = store_blobs(store, plains, pack_bytes=small_packs)
        assert [store.read(digest_of(plain)) for plain in plains] == plains
        assert stats.new_blobs == len(plains)
        assert stats.new_plain_bytes == sum(map(len, plains))
        assert stats.packs == len(list(store.stored_packs())) > 4

    def test_a_blob_is_stored_once_however_often_it_comes(
        self, store: BlobStore, small_packs: int
    ) -> None:
        plains = blobs("a", 20)
        thrice = [plain for plain in plains for _ in range(2)] + plains
        stats = store_blobs(store, thrice, pack_bytes=small_packs)
        again = store_blobs(store, thrice, pack_bytes=small_packs)
        assert (stats.new_blobs, again) == (20, WriteStats())
        directories = [store.read_directory(pack, size) for pack, size in store.stored_packs()]
        stored = [entry.digest for entries in directories for entry in entries]
        assert sorted(stored) == sorted(map(digest_of, plains))

    def test_a_blob_of_every_kind_keeps_its_kind(self, store: BlobStore) -> None:
        for kind in BlobKind:
            store_blobs(store, [kind.name.encode()], kind)
        for kind in BlobKind:
            assert store.locate(digest_of(kind.name.encode())).kind == kind

    def test_write_stats_report_what_the_packs_grew_by(self, store: BlobStore) -> None:
        stats = store_blobs(store, [b"compressible " * 5000, *blobs("a", 3)])
        ((_, size),) = store.stored_packs()
        overhead = 16 + 16 + stats.new_blobs * 44 + 64
        assert stats.new_stored_bytes == size - overhead
        assert stats.new_stored_bytes < stats.new_plain_bytes + stats.new_blobs * BLOB_HEADER.size

    def test_a_blob_beyond_the_greatest_size_is_refused_by_its_digest(
        self, store: BlobStore
    ) -> None:
        plain = bytes(MAX_PLAIN_BYTES + 1)
        with pytest.raises(BlobError, match="more than a blob may have"):
            store_blobs(store, [b"sound", plain])
        assert list(store.stored_packs()) == []
        store_blobs(store, [plain[:-1]])
        assert len(store.read(digest_of(plain[:-1]))) == MAX_PLAIN_BYTES

    def test_a_writer_without_blobs_writes_no_pack(self, store: BlobStore) -> None:
        assert store_blobs(store, []) == WriteStats()
        assert list(store.stored_packs()) == []


class TestWrittenPacks:
    def test_a_pack_is_finished_when_it_is_full(self, store: BlobStore, small_packs: int) -> None:
        store_blobs(store, blobs("a", 40), pack_bytes=small_packs)
        sizes = [size for _, size in store.stored_packs()]
        assert sum(size >= small_packs for size in sizes) >= len(sizes) - 1
        assert max(sizes) < small_packs + 20 * KIB

    def test_a_pack_holds_blobs_in_their_order_whichever_is_compressed_first(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch, small_packs: int
    ) -> None:
        plains = blobs("a", 12)
        real = store.codec.encode_many
        later = threading.Event()

        def encode_many(batch: list[bytes]) -> list[tuple[Codec, bytes]]:
            if plains[0] in batch:
                assert later.wait(60)
            else:
                later.set()
            return real(batch)

        monkeypatch.setattr(store.codec, "encode_many", encode_many)
        store_blobs(store, plains)
        ((pack, size),) = store.stored_packs()
        digests = [entry.digest for entry in store.read_directory(pack, size)]
        assert digests == list(map(digest_of, plains))

    def test_a_pack_is_finished_at_the_greatest_number_of_blobs(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pack_builder, "PACK_BLOBS", 10)
        store_blobs(store, [b"%d" % number for number in range(35)])
        assert sorted(record.blobs for record in store.index.packs()) == [5, 10, 10, 10]

    @pytest.mark.parametrize("in_memory", [False, True])
    def test_a_pack_is_named_by_the_digest_of_its_bytes(
        self, store: BlobStore, tmp_path: Path, in_memory: bool
    ) -> None:
        writer = BlobWriter(store, spool_in_memory=in_memory)
        writer.put(BlobKind.DATA, digest_of(b"x"), b"x")
        writer.finish()
        (path,) = pack_paths(tmp_path)
        assert path.name == digest_of(path.read_bytes()).hex()
        assert path.parent.name == path.name[:2]
        assert temporaries(store) == []

    def test_a_pack_spooled_in_memory_has_no_file_before_it_is_full(self, store: BlobStore) -> None:
        for in_memory in (True, False):
            writer = BlobWriter(store, spool_in_memory=in_memory)
            # A later put packs what is compressed.
            for plain in blobs(f"{in_memory}", 20, 1100 * KIB):
                writer.put(BlobKind.DATA, digest_of(plain), plain)
            assert writer.stats.new_blobs >= 2
            assert len(temporaries(store)) == (0 if in_memory else 1)
            writer.close()
        assert temporaries(store) == []


class TestDryRun:
    def test_a_dry_run_counts_like_a_real_run_and_stores_nothing(
        self, store: BlobStore, small_packs: int
    ) -> None:
        store_blobs(store, blobs("a", 3))
        before = list(store.stored_packs())
        plains = blobs("a", 20) * 2
        writer = BlobWriter(store, dry_run=True, pack_bytes=small_packs)
        for plain in plains:
            writer.put(BlobKind.DATA, digest_of(plain), plain)
        stats = writer.finish()
        assert stats.new_blobs == 17
        assert list(store.stored_packs()) == before
        assert temporaries(store) == []
        real = store_blobs(store, plains, pack_bytes=small_packs)
        assert real.new_stored_bytes == stats.new_stored_bytes
        assert real.new_plain_bytes == stats.new_plain_bytes


class TestDurabilityOrder:
    """Pack data, the pack's name, its folder, the index: one after another, for every pack."""

    def test_the_durable_steps_have_the_same_order_for_every_pack(
        self, tmp_path: Path, small_packs: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[str] = []
        add_packs = Index.add_packs

        def watched(self: Index, packs: Iterable[IndexedPack]) -> None:
            steps.append("index")
            add_packs(self, packs)

        monkeypatch.setattr(Index, "add_packs", watched)
        with open_store(tmp_path, on_step=steps.append) as store:
            stats = store_blobs(store, blobs("a", 40), pack_bytes=small_packs)
        assert stats.packs > 3
        one = ["data packs", "rename packs", "folder packs", "done packs", "index"]
        new_folder = ["data packs", "rename packs", "folder packs", "done packs", *one[2:]]
        while steps:
            length = len(new_folder) if steps[: len(new_folder)] == new_folder else len(one)
            assert steps[:length] in (one, new_folder)
            del steps[:length]

    def test_every_pack_is_whole_on_disk_before_the_index_has_it(
        self, tmp_path: Path, small_packs: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add_packs = Index.add_packs
        seen: list[PackRef] = []

        def watched(self: Index, packs: Iterable[IndexedPack]) -> None:
            added = list(packs)
            for pack, pack_bytes, _ in added:
                path = tmp_path / pack_name(pack)
                assert path.stat().st_size == pack_bytes
                assert PackId(digest_of(path.read_bytes())) == pack.id
                seen.append(pack)
            add_packs(self, added)

        monkeypatch.setattr(Index, "add_packs", watched)
        with open_store(tmp_path) as store:
            stats = store_blobs(store, blobs("a", 40), pack_bytes=small_packs)
        assert len(seen) == stats.packs > 3


def test_a_pack_that_a_crash_left_partly_indexed_is_completed_by_the_next_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "_CHANGED_AT_ONCE", 7)
    monkeypatch.setattr(index_module, "_BLOBS_PER_PAGE", 1)
    plains = blobs("a", 60)
    write = LmdbEnv.write
    left = iter(range(4))

    def interrupted(self: LmdbEnv, change: Callable[[Transaction], object]) -> object:
        if next(left, None) is None:
            raise InterruptedError("killed")
        return write(self, change)

    with open_store(tmp_path) as store:
        monkeypatch.setattr(LmdbEnv, "write", interrupted)
        with pytest.raises(InterruptedError):
            store_blobs(store, plains)
        monkeypatch.setattr(LmdbEnv, "write", write)
        assert store.index.blob_count() == 4 * 7
        (pack,) = store.index.partial_packs()
        # While another process may be adding them, the pack is left alone.
        store.reconcile(is_alone=lambda: False)
        assert store.index.partial_packs() == [pack]
        assert [store.read(digest_of(plain)) for plain in plains] == plains
    with open_store(tmp_path) as store:
        assert store.index.partial_packs() == []
        assert store_blobs(store, plains).new_blobs == 0


class TestWriterFailure:
    def failing_store(self, root: Path, step: str, passes: int) -> Iterator[BlobStore]:
        left = iter(range(passes))

        def on_step(now: str) -> None:
            if now == step and next(left, None) is None:
                raise OSError(28, "No space left on device")

        with open_store(root, on_step=on_step) as store:
            yield store

    @pytest.mark.parametrize("step", ["data packs", "rename packs", "folder packs"])
    @pytest.mark.parametrize("passes", [0, 3])
    def test_a_failed_pack_write_is_raised_by_a_later_put_or_by_finish(
        self, tmp_path: Path, small_packs: int, step: str, passes: int
    ) -> None:
        for store in self.failing_store(tmp_path, step, passes):
            with pytest.raises(StorageError, match="No space left"):
                store_blobs(store, blobs("a", 100), pack_bytes=small_packs)
            assert temporaries(store) == []
            with_entries = {record.pack for record in store.index.packs()}
            assert with_entries <= {pack for pack, _ in store.stored_packs()}
        with open_store(tmp_path) as store:
            stats = store_blobs(store, blobs("a", 100), pack_bytes=small_packs)
            assert (stats.new_blobs < 100) is (passes > 0)
            assert all(store.read(digest_of(plain)) == plain for plain in blobs("a", 100))

    def test_a_failed_lookup_is_raised(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(digests: object) -> list[bool]:
            raise RuntimeError("the index broke")

        monkeypatch.setattr(store.index, "are_stored", fail)
        with pytest.raises(RuntimeError, match="the index broke"):
            store_blobs(store, blobs("a", 3))

    def test_a_failed_writer_raises_on_every_call(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(digests: object) -> list[bool]:
            raise RuntimeError("the index broke")

        monkeypatch.setattr(store.index, "are_stored", fail)
        writer = BlobWriter(store)
        plain = noise("big", 3 << 20)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="the index broke"):
                for _ in range(20):
                    writer.put(BlobKind.DATA, digest_of(plain), plain)
        with pytest.raises(RuntimeError, match="the index broke"):
            writer.finish()
        writer.close()

    def test_a_failed_compression_is_raised_and_leaves_nothing_behind(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch, small_packs: int
    ) -> None:
        real = store.codec.encode_many
        bad = noise("a 50", 10 * KIB)

        def encode_many(plains: list[bytes]) -> list[tuple[Codec, bytes]]:
            if bad in plains:
                raise MemoryError("nothing to compress into")
            return real(plains)

        monkeypatch.setattr(store.codec, "encode_many", encode_many)
        with pytest.raises(MemoryError, match="nothing to compress into"):
            store_blobs(store, blobs("a", 100), pack_bytes=small_packs)
        assert temporaries(store) == []
        assert not any(store.index.are_stored([digest_of(bad)]))


class TestWriterClose:
    def test_a_closed_writer_drops_its_unfinished_pack_and_keeps_the_finished_ones(
        self, store: BlobStore, small_packs: int
    ) -> None:
        writer = BlobWriter(store, pack_bytes=small_packs)
        plains = blobs("a", 100)
        for plain in plains:
            writer.put(BlobKind.DATA, digest_of(plain), plain)
        writer.close()
        writer.close()
        assert temporaries(store) == []
        known = store.index.are_stored(map(digest_of, plains))
        assert not all(known)
        assert {record.pack for record in store.index.packs()} == {
            pack for pack, _ in store.stored_packs()
        }
        assert all(
            store.read(digest_of(plain)) == plain
            for plain, is_known in zip(plains, known, strict=True)
            if is_known
        )

    def test_a_closed_writer_leaves_no_thread(self, store: BlobStore) -> None:
        before = threading.active_count()
        for finish in (True, False):
            writer = BlobWriter(store)
            writer.put(BlobKind.DATA, digest_of(b"x"), b"x")
            if finish:
                writer.finish()
            writer.close()
        assert threading.active_count() <= before
