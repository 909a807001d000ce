"""Scrubbing: what is read first, what is remembered, and how damage heals."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from casfs.digest import PackId, digest_of
from casfs.errors import BlobError
from casfs.format.codec import BlobKind
from casfs.format.pack import PackEntry
from casfs.format.snapshot import Snapshot
from casfs.maintenance import scrub as scrub_module
from casfs.maintenance.check import Checker, CheckResult
from casfs.maintenance.prune import PruneOptions, Pruner
from casfs.maintenance.scrub import PackSelection
from casfs.monitor import RecordingMonitor
from casfs.repository.opening import open_for_maintenance, open_for_reading
from casfs.restore.restorer import RestoreOptions, Restorer
from casfs.storage.locks import LockMode
from casfs.store.blob_store import pack_name
from casfs.store.duplicates import Duplicates
from tests.support.builders import Keeper
from tests.support.stores import add_pack, flip, make_pack, noise, pack_paths

DAY_S = 86_400
CHUNKS = [noise(f"chunk {number}", 3000) for number in range(5)]


def check(keeper: Keeper, **choice: Any) -> CheckResult:
    with open_for_reading(keeper.root, may_write_index=True) as repository:
        return Checker(repository, RecordingMonitor()).check(PackSelection(**choice))


def verified(keeper: Keeper) -> dict[str, int]:
    with keeper.reading() as repository:
        return {r.pack.hex(): r.verified_s for r in repository.store.index.packs()}


def set_verified(keeper: Keeper, *ages_s: float) -> list[str]:
    """Pretend that packs were verified so long ago; return their names in that order."""
    with keeper.writing() as repository:
        index = repository.store.index
        records = sorted(index.packs(), key=lambda record: record.pack)
        for record, age_s in zip(records, ages_s, strict=True):
            index.mark_verified([record.ordinal], int(time.time() - age_s))
        return [record.pack.hex() for record in records]


@pytest.fixture
def packs(keeper: Keeper) -> list[Path]:
    """Four packs of one blob each."""
    for chunk in CHUNKS[:4]:
        keeper.store(chunk)
    return pack_paths(keeper.root)


class TestVerificationMarks:
    def test_scrub_marks_intact_packs_and_no_damaged_ones(
        self, keeper: Keeper, packs: list[Path]
    ) -> None:
        flip(packs[2], 100)
        before = int(time.time())
        check(keeper)
        marks = verified(keeper)
        assert marks.pop(packs[2].name) == 0
        assert all(mark >= before for mark in marks.values()) and len(marks) == 3

    def test_scrub_does_not_mark_a_pack_with_a_damaged_directory(
        self, keeper: Keeper, packs: list[Path]
    ) -> None:
        flip(packs[1], -10)
        check(keeper)
        assert verified(keeper)[packs[1].name] == 0

    def test_a_check_of_the_structure_marks_no_pack(
        self, keeper: Keeper, packs: list[Path]
    ) -> None:
        with open_for_reading(keeper.root, may_write_index=True) as repository:
            Checker(repository, RecordingMonitor()).check()
        assert set(verified(keeper).values()) == {0}

    def test_a_reader_without_write_access_checks_and_marks_nothing(
        self, keeper: Keeper, packs: list[Path]
    ) -> None:
        flip(packs[2], 100)
        with keeper.reading() as repository:
            result = Checker(repository, RecordingMonitor()).check(PackSelection())
        assert len(result.damage) == 2
        assert set(verified(keeper).values()) == {0}

    def test_an_interrupted_scrub_keeps_its_marks(
        self, keeper: Keeper, packs: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gather = scrub_module.Scrubber._merge
        gathered = 0

        def stop(*arguments: Any) -> None:
            nonlocal gathered
            gather(*arguments)
            gathered += 1
            if gathered == 2:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(scrub_module.Scrubber, "_merge", stop)
            with pytest.raises(KeyboardInterrupt):
                check(keeper)
        assert sum(mark > 0 for mark in verified(keeper).values()) == 2
        assert check(keeper, older_than_s=DAY_S).packs_read == 2


class TestPackSelection:
    def test_scrub_reads_only_packs_not_verified_for_the_given_time(
        self, keeper: Keeper, packs: list[Path]
    ) -> None:
        set_verified(keeper, 10 * DAY_S, 40 * DAY_S, 29 * DAY_S, 31 * DAY_S)
        assert check(keeper, older_than_s=30 * DAY_S).packs_read == 2
        assert check(keeper, older_than_s=30 * DAY_S).packs_read == 0

    def test_scrub_reads_the_longest_unverified_packs_first(
        self, keeper: Keeper, packs: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = set_verified(keeper, 3, 1_000, 20, 500)
        read: list[str] = []
        read_pack = scrub_module.Scrubber._read_pack

        def watched(self: scrub_module.Scrubber, pack: Any, pack_bytes: int) -> Any:
            read.append(pack.hex())
            return read_pack(self, pack, pack_bytes)

        monkeypatch.setattr(scrub_module, "_THREADS", 1)
        monkeypatch.setattr(scrub_module.Scrubber, "_read_pack", watched)
        check(keeper)
        assert read == [names[1], names[3], names[2], names[0]]

    def test_scrub_stops_when_its_time_is_up_and_reports_what_is_left(
        self, keeper: Keeper, packs: list[Path]
    ) -> None:
        result = check(keeper, max_duration_s=0)
        assert (result.packs_read, result.packs_left) == (0, 4)
        result = check(keeper, max_duration_s=3600)
        assert (result.packs_read, result.packs_left) == (4, 0)


class TestVerifiedPacks:
    def test_a_full_restore_marks_the_packs_that_it_read(
        self, keeper: Keeper, tmp_path: Path
    ) -> None:
        keeper.store(noise("nobody's", 100))
        _, snapshot = keeper.publish({b"f": CHUNKS[0], b"d": {b"g": CHUNKS[1]}})
        target = bytes(tmp_path / "target")
        with keeper.reading() as repository:
            restorer = Restorer(repository, RestoreOptions(), RecordingMonitor())
            restorer.restore(b"", snapshot.root, target, False)
        assert sorted(mark > 0 for mark in verified(keeper).values()) == [False, True]

    def test_a_blob_that_was_not_read_leaves_its_pack_unverified(self, keeper: Keeper) -> None:
        keeper.store(*CHUNKS)
        with keeper.reading() as repository:
            for _ in range(2):
                for chunk in CHUNKS[1:]:
                    repository.store.read(digest_of(chunk))
        assert set(verified(keeper).values()) == {0}
        with keeper.reading() as repository:
            for chunk in CHUNKS:
                repository.store.read(digest_of(chunk))
        assert set(verified(keeper).values()) != {0}

    def test_a_damaged_directory_leaves_its_pack_unverified(self, keeper: Keeper) -> None:
        keeper.store(*CHUNKS)
        (path,) = pack_paths(keeper.root)
        with keeper.reading() as repository:
            flip(path, -100)
            for chunk in CHUNKS:
                repository.store.read(digest_of(chunk))
        assert set(verified(keeper).values()) == {0}


def settled(keeper: Keeper, source: Path) -> Snapshot:
    """Back up until the files are old enough to be trusted, so that nothing is stored any more."""
    while True:
        _, snapshot = keeper.back_up(source)
        if snapshot.stats.unchanged == snapshot.stats.files and not snapshot.stats.new_blobs:
            return snapshot


class TestHealing:
    def test_a_backup_that_sees_a_damaged_chunk_stores_it_again(
        self, keeper: Keeper, tmp_path: Path
    ) -> None:
        source = tmp_path / "source"
        source.mkdir()
        content = noise("content", 100_000)
        (source / "file").write_bytes(content)
        (source / "other").write_bytes(b"other")
        settled(keeper, source)
        keeper.damage(digest_of(content))
        # Nobody knows of it yet, so an unchanged file is taken for stored.
        _, snapshot = keeper.back_up(source)
        assert snapshot.stats.new_blobs == 0
        assert {found.what for found in check(keeper).damage} == {"pack", "blob", "file"}
        _, snapshot = keeper.back_up(source)
        assert snapshot.stats.new_blobs == 1
        with keeper.reading() as repository:
            result = Checker(repository, RecordingMonitor()).check(PackSelection())
            # The damaged copy is still in its pack; no file has lost anything any more.
            assert "file" not in {found.what for found in result.damage}
            assert repository.store.read(digest_of(content)) == content

    def test_prune_removes_a_damaged_pack_whose_needed_blobs_are_intact(
        self, keeper: Keeper
    ) -> None:
        keeper.store(*CHUNKS)
        keeper.publish({b"f": CHUNKS[4]})
        keeper.publish({b"g": CHUNKS[0]})
        keeper.damage(digest_of(CHUNKS[1]))
        keeper.damage(digest_of(CHUNKS[4]))
        check(keeper)
        with keeper.writing() as repository:
            writer = repository.writer()
            writer.put(BlobKind.DATA, digest_of(CHUNKS[4]), CHUNKS[4])
            writer.finish()
        assert {found.what for found in check(keeper).damage} == {"pack", "blob"}
        with open_for_maintenance(keeper.root, "prune") as repository:
            Pruner(repository, PruneOptions(unused_share=1.0), RecordingMonitor()).prune()
        result = check(keeper)
        assert result.damage == []
        assert result.packs_read == 4

    def test_a_damaged_copy_is_not_trusted_where_the_indexed_pack_is_missing(
        self, keeper: Keeper
    ) -> None:
        """As where an older index is put back, which names a pack that a prune has replaced since."""
        keeper.store(CHUNKS[0])
        (named,) = pack_paths(keeper.root)
        data, entries = make_pack(CHUNKS[:2])
        other = keeper.root / pack_name(add_pack(keeper.root, data))
        with keeper.writing() as repository:
            assert len(repository.store.index.packs()) == 2
        flip(other, entries[0].offset)
        named.unlink()
        assert {found.what for found in check(keeper).damage} == {"pack", "blob"}
        with keeper.writing() as repository:
            digests = [digest_of(chunk) for chunk in CHUNKS[:2]]
            # The sound one was named there before, so what the check has not marked is trusted.
            assert repository.store.index.are_stored(digests) == [False, True]

    def test_swapped_packs_are_replaced_although_all_their_blobs_were_read(
        self, keeper: Keeper
    ) -> None:
        keeper.publish({b"f": CHUNKS[0]})
        keeper.publish({b"g": CHUNKS[1], b"h": CHUNKS[2]})
        first, second = pack_paths(keeper.root)
        data = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)
        with open_for_maintenance(keeper.root, "repair", mode=LockMode.EXCLUSIVE) as repository:
            repository.store.rebuild()
        assert {found.what for found in check(keeper).damage} == {"pack"}
        with keeper.reading() as repository:
            for digest, _ in list(repository.store.index.blobs()):
                repository.store.read(digest)
        with open_for_maintenance(keeper.root, "prune") as repository:
            Pruner(repository, PruneOptions(unused_share=1.0), RecordingMonitor()).prune()
        assert check(keeper).damage == []

    def test_a_backup_that_sees_a_damaged_tree_stores_it_again(
        self, keeper: Keeper, tmp_path: Path
    ) -> None:
        source = tmp_path / "source"
        (source / "folder").mkdir(parents=True)
        (source / "folder" / "file").write_bytes(b"content")
        snapshot = settled(keeper, source)
        with keeper.reading() as repository:
            folder = repository.trees.resolve(snapshot.root, bytes(source / "folder").strip(b"/"))
        assert folder is not None and folder.tree is not None
        keeper.damage(folder.tree.digest)  # type: ignore[arg-type]
        assert {found.what for found in check(keeper).damage} == {"pack", "blob", "tree"}
        keeper.back_up(source)
        assert "tree" not in {found.what for found in check(keeper).damage}

    def test_a_blob_that_reads_correctly_again_is_trusted_again(
        self, keeper: Keeper, packs: list[Path]
    ) -> None:
        """As where the disk, and not the data, was at fault."""
        digest = digest_of(CHUNKS[0])
        keeper.damage(digest)
        check(keeper)
        with keeper.reading() as repository:
            assert repository.store.index.are_stored([digest]) == [False]
        keeper.damage(digest)
        assert check(keeper).damage == []
        with keeper.reading() as repository:
            assert repository.store.index.are_stored([digest]) == [True]

    def test_a_check_without_reading_reports_what_the_last_scrub_found(
        self, keeper: Keeper, packs: list[Path]
    ) -> None:
        keeper.publish({b"f": CHUNKS[4]})
        keeper.damage(digest_of(CHUNKS[4]))
        check(keeper)
        with keeper.reading() as repository:
            found = Checker(repository, RecordingMonitor()).check().damage
        assert [(one.what, one.path) for one in found] == [("file", b"f")]


class TestDuplicates:
    def test_a_read_falls_back_to_an_intact_copy_in_another_pack(self, keeper: Keeper) -> None:
        keeper.store(CHUNKS[0])
        keeper.damage(digest_of(CHUNKS[0]))
        data, _ = make_pack([CHUNKS[0], CHUNKS[1]])
        add_pack(keeper.root, data)
        with keeper.reading() as repository:
            assert repository.store.read(digest_of(CHUNKS[0])) == CHUNKS[0]

    def test_a_read_succeeds_despite_a_wrong_location_in_the_index(self, keeper: Keeper) -> None:
        data, entries = make_pack(CHUNKS)
        wrong = [entry._replace(offset=entry.offset + 1) for entry in entries]
        pack = add_pack(keeper.root, data)
        with keeper.writing() as repository:
            repository.store.index.rebuild(lambda: [(pack, len(data), wrong)])
        with keeper.reading() as repository:
            for chunk in CHUNKS:
                assert repository.store.read(digest_of(chunk)) == chunk

    def test_one_search_of_all_packs_serves_all_lost_blobs(
        self, keeper: Keeper, packs: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with keeper.reading() as repository:
            searched: list[PackId] = []
            store = repository.store

            def read(pack: PackId, size: int) -> list[PackEntry]:
                searched.append(pack)
                return store.read_directory(pack, size)

            copies = Duplicates(store.index, store.stored_packs, read)
            monkeypatch.setattr(repository.store, "_duplicates", copies)
            for number in range(200):
                with pytest.raises(BlobError, match="missing"):
                    repository.store.read(digest_of(b"%d" % number))
            assert len(searched) == len(set(searched)) == len(packs)

    def test_a_copy_is_found_however_many_other_blobs_are_lost(self, keeper: Keeper) -> None:
        lost = [b"lost %d" % number for number in range(200)]
        keeper.store(*lost, CHUNKS[0])
        for chunk in (*lost, CHUNKS[0]):
            keeper.damage(digest_of(chunk))
        data, _ = make_pack([CHUNKS[0]])
        add_pack(keeper.root, data)
        with keeper.reading() as repository:
            for chunk in lost:
                with pytest.raises(BlobError):
                    repository.store.read(digest_of(chunk))
            assert repository.store.read(digest_of(CHUNKS[0])) == CHUNKS[0]

    def test_a_copy_is_found_in_a_pack_with_a_damaged_directory(self, keeper: Keeper) -> None:
        keeper.store(CHUNKS[0])
        keeper.damage(digest_of(CHUNKS[0]))
        data, _ = make_pack([CHUNKS[0], CHUNKS[1]])
        pack = add_pack(keeper.root, data)
        flip(keeper.root / pack_name(pack), -1)
        with keeper.reading() as repository:
            assert repository.store.read(digest_of(CHUNKS[0])) == CHUNKS[0]
