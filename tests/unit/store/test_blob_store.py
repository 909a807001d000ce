"""The blob store: nothing unverified comes out, and packs and index find back to each other."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from casfs.digest import Digest, PackId, digest_of
from casfs.errors import BlobError, PackError
from casfs.format.pack import BLOB_HEADER, ENTRY, HEADER, TRAILER, PackEntry, PackRef
from casfs.index.schema import Location
from casfs.store import blob_store as blob_store_module
from casfs.store import salvage
from casfs.store.blob_store import BlobStore, pack_name, parse_pack_name
from tests.support.stores import (
    add_pack,
    child,
    flip,
    make_pack,
    noise,
    open_store,
    pack_paths,
    pack_ref,
    read_line,
    store_blobs,
    write_line,
)

TEXT = b"words that compress well, " * 300
PLAINS = [b"one", TEXT, noise("raw", 5000), b"", TEXT * 2, b"last"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with one pack that holds PLAINS."""
    with open_store(tmp_path) as store:
        store_blobs(store, PLAINS)
    return tmp_path


def readable(store: BlobStore, plains: list[bytes]) -> list[bytes]:
    """Return those of the blobs that can be read."""
    found = []
    for plain in plains:
        try:
            found.append(store.read(digest_of(plain)))
        except BlobError:
            continue
    return found


def drop_index(root: Path) -> None:
    shutil.rmtree(root / "index")


def places(root: Path) -> list[PackEntry]:
    with open_store(root) as store:
        ((pack, size),) = store.stored_packs()
        return store.read_directory(pack, size)


class TestBlobReads:
    def test_a_blob_that_was_never_stored_is_missing(self, root: Path) -> None:
        with open_store(root) as store, pytest.raises(BlobError, match="missing") as caught:
            store.read(digest_of(b"never stored"))
        assert caught.value.pack is None
        assert caught.value.digest == digest_of(b"never stored")

    def test_a_damaged_blob_is_reported_with_its_pack_and_affects_no_other(
        self, root: Path
    ) -> None:
        (path,) = pack_paths(root)
        entry = next(e for e in places(root) if e.digest == digest_of(PLAINS[2]))
        flip(path, entry.offset + 2500)
        with open_store(root) as store:
            with pytest.raises(BlobError) as caught:
                store.read(entry.digest)
            assert readable(store, PLAINS) == PLAINS[:2] + PLAINS[3:]
        assert caught.value.pack == bytes.fromhex(path.name)
        assert caught.value.digest == entry.digest
        assert path.name[:12] in str(caught.value)
        assert entry.digest.hex()[:12] in str(caught.value)

    def test_any_flipped_bit_of_a_payload_is_detected(self, root: Path) -> None:
        (path,) = pack_paths(root)
        entry = next(e for e in places(root) if e.digest == digest_of(TEXT))
        for place in range(entry.offset, entry.offset + entry.stored_bytes):
            flip(path, place)
            with open_store(root) as store, pytest.raises(BlobError):
                store.read(entry.digest)
            flip(path, place)
        with open_store(root) as store:
            assert store.read(entry.digest) == TEXT

    def test_a_missing_or_cut_pack_is_reported(self, root: Path) -> None:
        (path,) = pack_paths(root)
        with open_store(root) as store:
            os.truncate(path, HEADER.size + BLOB_HEADER.size + 2)
            with pytest.raises(BlobError, match="too short") as caught:
                store.read(digest_of(PLAINS[0]))
            assert caught.value.pack == bytes.fromhex(path.name)
        path.unlink()
        with open_store(root) as store, pytest.raises(BlobError, match="missing"):
            store.read(digest_of(PLAINS[0]))

    def test_a_pack_that_vanishes_while_the_store_is_open_is_reported(self, root: Path) -> None:
        (path,) = pack_paths(root)
        with open_store(root) as store:
            path.unlink()
            with pytest.raises(BlobError, match="its pack is missing") as caught:
                store.read(digest_of(PLAINS[0]))
        assert caught.value.pack == bytes.fromhex(path.name)

    @pytest.mark.parametrize(
        "change",
        [
            {"offset": 17},
            {"offset": 4_000_000_000},
            {"stored_bytes": 1},
            {"stored_bytes": 0},
            {"plain_bytes": 4},
            {"plain_bytes": 4_000_000_000},
            {"codec": 1},
            {"codec": 200},
        ],
    )
    def test_a_wrong_index_entry_gives_an_error_and_no_wrong_bytes(
        self, root: Path, change: dict[str, int]
    ) -> None:
        with open_store(root) as store:
            wrong = dict(_fields(store.locate(digest_of(b"one"))) | change)
            with pytest.raises(BlobError):
                store.read_at(digest_of(b"one"), Location(**wrong))

    def test_a_blob_that_moves_during_a_read_is_looked_up_again(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with open_store(root) as store:
            right = store.locate(digest_of(b"one"))
            stale = Location(**(_fields(right) | {"offset": right.offset + 1}))
            answers = iter([stale, right])
            monkeypatch.setattr(store.index, "lookup", lambda digest: next(answers))
            assert store.read(digest_of(b"one")) == b"one"

    def test_a_nonblocking_read_returns_verified_bytes_or_nothing(self, root: Path) -> None:
        (path,) = pack_paths(root)
        with open_store(root) as store:
            assert store.read(digest_of(TEXT)) == TEXT
            assert store.read_nonblocking(digest_of(TEXT), 1 << 20) in (TEXT, None)
            assert store.read_nonblocking(digest_of(TEXT), 1) is None
            assert store.read_nonblocking(digest_of(b"never stored"), 1 << 20) is None
            assert store.prefetch([digest_of(b"one")]) == 3
            assert store.prefetch([digest_of(b"never stored"), digest_of(b"one")]) == 3
            flip(path, store.locate(digest_of(TEXT)).offset + 20)
            assert store.read_nonblocking(digest_of(TEXT), 1 << 20) is None


def _fields(location: Location) -> dict[str, int]:
    return location._asdict()


class TestIndexReconciliation:
    def test_a_deleted_index_is_rebuilt_with_every_blob(self, root: Path) -> None:
        with open_store(root) as store:
            store_blobs(store, [b"in a second pack"])
        drop_index(root)
        with open_store(root) as store:
            assert readable(store, [*PLAINS, b"in a second pack"]) == [*PLAINS, b"in a second pack"]
            assert store.index.blob_count() == len(PLAINS) + 1

    def test_an_index_that_lacks_a_pack_is_brought_up_to_date(self, root: Path) -> None:
        data, _ = make_pack([b"sealed", b"but a crash came before the index"])
        pack = add_pack(root, data)
        with open_store(root) as store:
            losses = store.index.loss_epoch()
            assert store.read(digest_of(b"sealed")) == b"sealed"
            assert pack in {record.pack for record in store.index.packs()}
            assert losses == 1

    def test_an_index_with_a_lost_pack_is_rebuilt_and_loses_its_completeness(
        self, root: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with open_store(root) as store:
            store_blobs(store, [b"in a second pack"])
            store.index.mark_complete(b"snapshot", store.index.loss_epoch())
        lost = max(pack_paths(root), key=lambda path: path.stat().st_size)
        kept = lost.read_bytes()
        lost.unlink()
        with open_store(root) as store:
            assert "1 packs that the index names are missing" in caplog.text
            assert store.index.are_stored(map(digest_of, PLAINS)) == [False] * len(PLAINS)
            assert store.read(digest_of(b"in a second pack")) == b"in a second pack"
            assert not store.index.is_complete(b"snapshot")
            stats = store_blobs(store, PLAINS)
            assert stats.new_blobs == len(PLAINS)
        with open_store(root) as store:
            assert readable(store, PLAINS) == PLAINS
        lost.write_bytes(kept)
        with open_store(root) as store:
            assert readable(store, PLAINS) == PLAINS

    def test_reconciliation_finds_a_second_copy_of_the_blobs_of_a_lost_pack(
        self, root: Path
    ) -> None:
        data, _ = make_pack(PLAINS)
        second = add_pack(root, data)
        with open_store(root) as store:
            assert store.index.blob_count() == len(PLAINS)
        for path in pack_paths(root):
            if path.name != second.id.hex():
                path.unlink()
        with open_store(root) as store:
            assert readable(store, PLAINS) == PLAINS

    def test_an_index_is_not_rebuilt_for_a_pack_added_between_two_listings(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        with open_store(root) as store:
            losses = store.index.loss_epoch()
            entries = store.storage.list
            monkeypatch.setattr(store.storage, "list", lambda prefix: iter(()))
            store.reconcile()
            monkeypatch.setattr(store.storage, "list", entries)
            assert store.index.loss_epoch() == losses
            assert store.index.blob_count() == len(PLAINS)
        assert caplog.text == ""

    def test_an_index_of_another_version_is_rebuilt(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("casfs.index.index.INDEX_VERSION", b"2")
        with open_store(root) as store:
            assert store.index.is_current()
            assert readable(store, PLAINS) == PLAINS


class TestForeignFiles:
    def test_foreign_files_among_the_packs_are_kept_and_named(
        self, root: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        foreign = ["packs/note.txt", "packs/ab/short", f"packs/ab/{'c' * 64}", f"packs/{'a' * 64}"]
        for name in foreign:
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(b"not a pack")
        with open_store(root) as store:
            assert len(list(store.stored_packs())) == 1
        for name in foreign:
            assert (root / name).exists()
            assert f"{name} is not a casfs pack" in caplog.text


class TestDamagedDirectory:
    """What ends a pack may be damaged in any way: all intact blobs are found nevertheless."""

    @staticmethod
    def directory_bytes() -> int:
        return len(PLAINS) * ENTRY.size

    @pytest.mark.parametrize(
        "where",
        [
            pytest.param(-1, id="the magic at the end"),
            pytest.param(-TRAILER.size, id="the directory's offset"),
            pytest.param(-TRAILER.size + 8, id="the directory's size"),
            pytest.param(-TRAILER.size + 12, id="the number of entries"),
            pytest.param(-TRAILER.size + 20, id="the directory's digest"),
            pytest.param(-TRAILER.size - 10, id="an entry"),
            pytest.param(-TRAILER.size - len(PLAINS) * ENTRY.size, id="the first digest"),
            pytest.param(0, id="the pack's magic"),
            pytest.param(8, id="the pack's version"),
        ],
    )
    def test_a_damaged_pack_directory_loses_no_blob(
        self, root: Path, where: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        (path,) = pack_paths(root)
        flip(path, where)
        drop_index(root)
        with open_store(root) as store:
            assert readable(store, PLAINS) == PLAINS
            with pytest.raises(PackError):
                store.read_directory(pack_ref(path), path.stat().st_size)
        assert path.name[:12] in caplog.text
        assert "scanning it for intact blobs" in caplog.text

    @pytest.mark.parametrize("number", range(len(PLAINS)))
    def test_a_damaged_pack_directory_and_record_lose_only_that_blob(
        self, root: Path, number: int
    ) -> None:
        (path,) = pack_paths(root)
        entry = places(root)[number]
        flip(path, -1)
        flip(path, entry.offset - BLOB_HEADER.size)
        drop_index(root)
        with open_store(root) as store:
            rest = [plain for plain in PLAINS if digest_of(plain) != entry.digest]
            assert readable(store, rest) == rest
            assert not store.index.are_stored([entry.digest])[0]

    def test_a_damaged_pack_directory_and_payload_lose_only_that_blob(self, root: Path) -> None:
        (path,) = pack_paths(root)
        entry = next(e for e in places(root) if e.digest == digest_of(PLAINS[2]))
        flip(path, -1)
        flip(path, entry.offset + 1)
        drop_index(root)
        with open_store(root) as store:
            assert readable(store, PLAINS) == PLAINS[:2] + PLAINS[3:]

    def test_a_cut_pack_yields_every_whole_blob(self, root: Path) -> None:
        (path,) = pack_paths(root)
        entries = places(root)
        whole = path.read_bytes()
        for entry in entries:
            path.write_bytes(whole[: entry.offset + entry.stored_bytes])
            drop_index(root)
            with open_store(root) as store:
                count = entries.index(entry) + 1
                wanted = {e.digest for e in entries[:count]}
                assert wanted <= {digest for digest, _ in store.index.blobs()}

    @pytest.mark.parametrize("data", [b"", b"x", b"CASFSPAK", bytes(5000), noise("junk", 5000)])
    def test_a_file_that_is_no_pack_yields_no_blob(self, root: Path, data: bytes) -> None:
        pack = add_pack(root, data)
        with open_store(root) as store:
            assert readable(store, PLAINS) == PLAINS
            assert pack in {record.pack for record in store.index.packs()}

    def test_a_pack_directory_with_wrong_digests_gives_an_error_and_no_wrong_bytes(
        self, root: Path
    ) -> None:
        data, entries = make_pack([b"evil", b"sound"])
        name = digest_of(b"what a snapshot needs")
        lying = data.replace(entries[0].digest, name)
        offset, size, count, _, variant, magic = TRAILER.unpack(lying[-TRAILER.size :])
        digest = digest_of(lying[offset : offset + size])
        trailer = TRAILER.pack(offset, size, count, digest, variant, magic)
        add_pack(root, lying[: -TRAILER.size] + trailer)
        with open_store(root) as store:
            with pytest.raises(BlobError, match="digest mismatch"):
                store.read(name)
            assert store.read(digest_of(b"sound")) == b"sound"

    def test_a_pack_is_not_read_beyond_the_greatest_size(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data, _ = make_pack([b"within", noise("filling", 3000), b"beyond"])
        add_pack(root, data)
        # The store's own pack has some 5,600 bytes; this bound lies before both directories.
        for module in (blob_store_module, salvage):
            monkeypatch.setattr(module, "MAX_PACK_BYTES", 1000)
        drop_index(root)
        with open_store(root) as store:
            assert store.read(digest_of(b"within")) == b"within"
            assert not any(store.index.are_stored([digest_of(b"beyond"), digest_of(b"last")]))


def test_a_pack_is_in_the_folder_of_its_first_byte() -> None:
    name = PackId(bytes(range(0xA0, 0xC0)))
    for is_meta, begin in ((False, "packs/a0/a0a1a2"), (True, "meta/a0/a0a1a2")):
        pack = PackRef(name, is_meta)
        assert pack_name(pack).startswith(begin)
        assert parse_pack_name(pack_name(pack)) == pack


WRITER = """
import sys
from pathlib import Path
from tests.support.stores import noise, open_store, store_blobs

with open_store(Path(sys.argv[1])) as store:
    print("open", flush=True)
    sys.stdin.readline()
    plains = [noise(f"blob {n}", 3000) for n in range(int(sys.argv[2]), int(sys.argv[3]))]
    for begin in range(0, len(plains), 25):
        store_blobs(store, plains[begin : begin + 25])
    print("done", flush=True)
"""


def test_two_processes_store_concurrently_without_loss(tmp_path: Path) -> None:
    with open_store(tmp_path):
        pass
    with (
        child(WRITER, tmp_path, 0, 200) as first,
        child(WRITER, tmp_path, 100, 300) as second,
    ):
        assert (read_line(first), read_line(second)) == ("open", "open")
        write_line(first)
        write_line(second)
        assert (read_line(first), read_line(second)) == ("done", "done")
    plains = [noise(f"blob {n}", 3000) for n in range(300)]
    with open_store(tmp_path) as store:
        assert readable(store, plains) == plains
        assert store.index.blob_count() == 300
        assert {r.pack for r in store.index.packs()} == {pack for pack, _ in store.stored_packs()}
        assert store.index.loss_epoch() == 1
    drop_index(tmp_path)
    with open_store(tmp_path) as store:
        assert readable(store, plains) == plains
        assert store.index.blob_count() == 300


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.WARNING, "casfs"):
        yield


def test_a_digest_stays_bytes_all_the_way(root: Path) -> None:
    with open_store(root) as store:
        assert all(type(digest) is bytes for digest, _ in store.index.blobs())
        assert store.locate(Digest(bytes(digest_of(b"one")))).plain_bytes == 3
