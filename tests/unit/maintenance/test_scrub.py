"""Scrubbing: what is read first, what is remembered, and how damage heals."""

from __future__ import annotations

import errno
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from casfs.digest import digest_of
from casfs.errors import BlobError, StorageError
from casfs.format.codec import BlobKind
from casfs.format.pack import PackEntry, PackRef, encode_end
from casfs.format.snapshot import Snapshot
from casfs.maintenance import scrub as scrub_module
from casfs.maintenance.check import Checker, CheckResult
from casfs.maintenance.prune import Pruner
from casfs.maintenance.prune_plan import PruneOptions
from casfs.maintenance.scrub import PackSelection
from casfs.monitor import RecordingMonitor
from casfs.repository.opening import open_for_maintenance, open_for_reading
from casfs.restore.restorer import RestoreOptions, Restorer
from casfs.storage.locks import LockMode
from casfs.store.blob_store import pack_name
from casfs.store.duplicates import Duplicates
from casfs.store.layout import PackLayout
from tests.support.builders import RepositoryFixture
from tests.support.stores import add_pack, flip, make_pack, noise, pack_paths, store_blobs

DAY_S = 86_400
KIB = 1 << 10
CHUNKS = [noise(f"chunk {number}", 3000) for number in range(5)]


def check(repo: RepositoryFixture, **choice: Any) -> CheckResult:
    with open_for_reading(repo.root, may_write_index=True) as repository:
        return Checker(repository, RecordingMonitor()).check(PackSelection(**choice))


def verified(repo: RepositoryFixture) -> dict[str, int]:
    with repo.reading() as repository:
        return {r.pack.id.hex(): r.verified_s for r in repository.store.index.packs()}


def set_verified(repo: RepositoryFixture, *ages_s: float) -> list[str]:
    """Pretend that packs were verified so long ago; return their names in that order."""
    with repo.writing() as repository:
        index = repository.store.index
        records = sorted(index.packs(), key=lambda record: record.pack)
        for record, age_s in zip(records, ages_s, strict=True):
            index.mark_verified([record.ordinal], int(time.time() - age_s))
        return [record.pack.id.hex() for record in records]


@pytest.fixture
def packs(repo: RepositoryFixture) -> list[Path]:
    """Four packs of one blob each."""
    for chunk in CHUNKS[:4]:
        repo.store(chunk)
    return pack_paths(repo.root)


class TestVerificationMarks:
    def test_scrub_marks_intact_packs_and_no_damaged_ones(
        self, repo: RepositoryFixture, packs: list[Path]
    ) -> None:
        flip(packs[2], 100)
        before = int(time.time())
        check(repo)
        marks = verified(repo)
        assert marks.pop(packs[2].name) == 0
        assert all(mark >= before for mark in marks.values()) and len(marks) == 3

    def test_scrub_does_not_mark_a_pack_with_a_damaged_directory(
        self, repo: RepositoryFixture, packs: list[Path]
    ) -> None:
        flip(packs[1], -10)
        check(repo)
        assert verified(repo)[packs[1].name] == 0

    def test_a_check_of_the_structure_marks_no_pack(
        self, repo: RepositoryFixture, packs: list[Path]
    ) -> None:
        with open_for_reading(repo.root, may_write_index=True) as repository:
            Checker(repository, RecordingMonitor()).check()
        assert set(verified(repo).values()) == {0}

    def test_a_reader_without_write_access_checks_and_marks_nothing(
        self, repo: RepositoryFixture, packs: list[Path]
    ) -> None:
        flip(packs[2], 100)
        with repo.reading() as repository:
            result = Checker(repository, RecordingMonitor()).check(PackSelection())
        assert len(result.damage) == 2
        assert set(verified(repo).values()) == {0}

    def test_an_interrupted_scrub_keeps_its_marks(
        self, repo: RepositoryFixture, packs: list[Path], monkeypatch: pytest.MonkeyPatch
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
                check(repo)
        assert sum(mark > 0 for mark in verified(repo).values()) == 2
        assert check(repo, older_than_s=DAY_S).packs_read == 2


class TestFailingDisk:
    def test_a_group_on_a_bad_sector_is_verified_with_one_read_for_all_its_blobs(
        self, repo: RepositoryFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        texts = [b"text number %d " % number * 20 for number in range(100)]
        with repo.writing() as repository:
            store_blobs(repository.store, texts, layout=PackLayout(group_bytes=4 * KIB))
        failed: list[int] = []
        with open_for_reading(repo.root, may_write_index=True) as repository:
            store = repository.store
            bad = max(at.offset for _, at in store.index.blobs()) + 10
            lost = [digest for digest, at in store.index.blobs() if at.offset == bad - 10]
            real = store.storage.read

            def read(name: str, offset: int, size: int) -> bytes:
                if offset <= bad < offset + size:
                    failed.append(offset)
                    raise StorageError("read", name, OSError(errno.EIO, "Input/output error"))
                return real(name, offset, size)

            monkeypatch.setattr(store.storage, "read", read)
            result = Checker(repository, RecordingMonitor()).check(PackSelection())
        found = {finding.blob for finding in result.damage if finding.blob is not None}
        assert found == set(lost) and len(lost) > 5
        # The search for another copy of each blob reads the known one again.
        assert failed.count(bad - 10) == 1 + len(lost)


class TestHostilePacks:
    def test_payloads_much_larger_than_their_blobs_take_bounded_memory(
        self, repo: RepositoryFixture
    ) -> None:
        """Every credential that can create objects can add such a pack."""
        size = 1 << 20
        data, entries = make_pack(noise(f"{number}", size) for number in range(64))
        end = len(data) - len(encode_end(entries, 0))
        lies = [entry._replace(plain_bytes=1) for entry in entries]
        add_pack(repo.root, data[:end] + encode_end(lies, end))
        tracemalloc.start()
        try:
            result = check(repo)
            _, most_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len([finding for finding in result.damage if finding.blob is not None]) == 64
        assert most_bytes < 40 * size


class TestPackSelection:
    def test_scrub_reads_only_packs_not_verified_for_the_given_time(
        self, repo: RepositoryFixture, packs: list[Path]
    ) -> None:
        set_verified(repo, 10 * DAY_S, 40 * DAY_S, 29 * DAY_S, 31 * DAY_S)
        assert check(repo, older_than_s=30 * DAY_S).packs_read == 2
        assert check(repo, older_than_s=30 * DAY_S).packs_read == 0

    def test_scrub_reads_the_longest_unverified_packs_first(
        self, repo: RepositoryFixture, packs: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = set_verified(repo, 3, 1_000, 20, 500)
        read: list[str] = []
        read_pack = scrub_module.Scrubber._read_pack

        def watched(self: scrub_module.Scrubber, pack: Any, pack_bytes: int) -> Any:
            read.append(pack.id.hex())
            return read_pack(self, pack, pack_bytes)

        monkeypatch.setattr(scrub_module, "_THREADS", 1)
        monkeypatch.setattr(scrub_module.Scrubber, "_read_pack", watched)
        check(repo)
        assert read == [names[1], names[3], names[2], names[0]]

    def test_scrub_stops_when_its_time_is_up_and_reports_what_is_left(
        self, repo: RepositoryFixture, packs: list[Path]
    ) -> None:
        result = check(repo, max_duration_s=0)
        assert (result.packs_read, result.packs_left) == (0, 4)
        result = check(repo, max_duration_s=3600)
        assert (result.packs_read, result.packs_left) == (4, 0)


class TestVerifiedPacks:
    def test_a_full_restore_marks_the_packs_that_it_read(
        self, repo: RepositoryFixture, tmp_path: Path
    ) -> None:
        repo.store(noise("nobody's", 100))
        _, snapshot = repo.publish({b"f": CHUNKS[0], b"d": {b"g": CHUNKS[1]}})
        target = bytes(tmp_path / "target")
        with repo.reading() as repository:
            restorer = Restorer(repository, RestoreOptions(), RecordingMonitor())
            restorer.restore(b"", snapshot.root, target, False)
        assert sorted(mark > 0 for mark in verified(repo).values()) == [False, True]

    def test_a_blob_that_was_not_read_leaves_its_pack_unverified(
        self, repo: RepositoryFixture
    ) -> None:
        repo.store(*CHUNKS)
        with repo.reading() as repository:
            for _ in range(2):
                for chunk in CHUNKS[1:]:
                    repository.store.read(digest_of(chunk))
        assert set(verified(repo).values()) == {0}
        with repo.reading() as repository:
            for chunk in CHUNKS:
                repository.store.read(digest_of(chunk))
        assert set(verified(repo).values()) != {0}

    def test_a_damaged_directory_leaves_its_pack_unverified(self, repo: RepositoryFixture) -> None:
        repo.store(*CHUNKS)
        (path,) = pack_paths(repo.root)
        with repo.reading() as repository:
            flip(path, -100)
            for chunk in CHUNKS:
                repository.store.read(digest_of(chunk))
        assert set(verified(repo).values()) == {0}


def settled(repo: RepositoryFixture, source: Path) -> Snapshot:
    """Back up until the files are old enough to be trusted, so that nothing is stored any more."""
    while True:
        _, snapshot = repo.back_up(source)
        if snapshot.stats.unchanged == snapshot.stats.files and not snapshot.stats.new_blobs:
            return snapshot


class TestHealing:
    def test_a_backup_that_sees_a_damaged_chunk_stores_it_again(
        self, repo: RepositoryFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # A relative path: of an absolute one, the folders above change while other tests run.
        monkeypatch.chdir(tmp_path)
        source = Path("source")
        source.mkdir()
        content = noise("content", 100_000)
        (source / "file").write_bytes(content)
        (source / "other").write_bytes(b"other")
        settled(repo, source)
        repo.damage(digest_of(content))
        # The damage is not known yet, so an unchanged file counts as stored.
        _, snapshot = repo.back_up(source)
        assert snapshot.stats.new_blobs == 0
        assert {found.what for found in check(repo).damage} == {"pack", "blob", "file"}
        _, snapshot = repo.back_up(source)
        assert snapshot.stats.new_blobs == 1
        with repo.reading() as repository:
            result = Checker(repository, RecordingMonitor()).check(PackSelection())
            # The damaged copy is still in its pack; no file has lost anything any more.
            assert "file" not in {found.what for found in result.damage}
            assert repository.store.read(digest_of(content)) == content

    def test_prune_removes_a_damaged_pack_whose_needed_blobs_are_intact(
        self, repo: RepositoryFixture
    ) -> None:
        repo.store(*CHUNKS)
        repo.publish({b"f": CHUNKS[4]})
        repo.publish({b"g": CHUNKS[0]})
        repo.damage(digest_of(CHUNKS[1]))
        repo.damage(digest_of(CHUNKS[4]))
        check(repo)
        with repo.writing() as repository:
            writer = repository.writer()
            writer.put(BlobKind.DATA, digest_of(CHUNKS[4]), CHUNKS[4])
            writer.finish()
        assert {found.what for found in check(repo).damage} == {"pack", "blob"}
        with open_for_maintenance(repo.root, "prune") as repository:
            Pruner(repository, PruneOptions(unused_share=1.0), RecordingMonitor()).prune()
        result = check(repo)
        assert result.damage == []
        assert result.packs_read == 4

    def test_a_damaged_copy_is_not_trusted_where_the_indexed_pack_is_missing(
        self, repo: RepositoryFixture
    ) -> None:
        """As where an older index is put back, which names a pack that a prune has replaced since."""
        repo.store(CHUNKS[0])
        (named,) = pack_paths(repo.root)
        data, entries = make_pack(CHUNKS[:2])
        other = repo.root / pack_name(add_pack(repo.root, data))
        with repo.writing() as repository:
            assert len(repository.store.index.packs()) == 2
        flip(other, entries[0].offset)
        named.unlink()
        assert {found.what for found in check(repo).damage} == {"pack", "blob"}
        with repo.writing() as repository:
            digests = [digest_of(chunk) for chunk in CHUNKS[:2]]
            # The index named the intact copy before, so what the check has not marked is trusted.
            assert repository.store.index.are_stored(digests) == [False, True]

    def test_swapped_packs_are_replaced_although_all_their_blobs_were_read(
        self, repo: RepositoryFixture
    ) -> None:
        repo.publish({b"f": CHUNKS[0]})
        repo.publish({b"g": CHUNKS[1], b"h": CHUNKS[2]})
        first, second = pack_paths(repo.root)
        data = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)
        with open_for_maintenance(repo.root, "repair", mode=LockMode.EXCLUSIVE) as repository:
            repository.store.rebuild()
        assert {found.what for found in check(repo).damage} == {"pack"}
        with repo.reading() as repository:
            for digest, _ in list(repository.store.index.blobs()):
                repository.store.read(digest)
        with open_for_maintenance(repo.root, "prune") as repository:
            Pruner(repository, PruneOptions(unused_share=1.0), RecordingMonitor()).prune()
        assert check(repo).damage == []

    def test_a_backup_that_sees_a_damaged_tree_stores_it_again(
        self, repo: RepositoryFixture, tmp_path: Path
    ) -> None:
        source = tmp_path / "source"
        (source / "folder").mkdir(parents=True)
        (source / "folder" / "file").write_bytes(b"content")
        snapshot = settled(repo, source)
        with repo.reading() as repository:
            folder = repository.trees.resolve(snapshot.root, bytes(source / "folder").strip(b"/"))
        assert folder is not None and folder.tree is not None
        repo.damage(folder.tree.digest)  # type: ignore[arg-type]
        assert {found.what for found in check(repo).damage} == {"pack", "blob", "tree"}
        repo.back_up(source)
        assert "tree" not in {found.what for found in check(repo).damage}

    def test_a_blob_that_reads_correctly_again_is_trusted_again(
        self, repo: RepositoryFixture, packs: list[Path]
    ) -> None:
        """As where the disk, and not the data, was at fault."""
        digest = digest_of(CHUNKS[0])
        repo.damage(digest)
        check(repo)
        with repo.reading() as repository:
            assert repository.store.index.are_stored([digest]) == [False]
        repo.damage(digest)
        assert check(repo).damage == []
        with repo.reading() as repository:
            assert repository.store.index.are_stored([digest]) == [True]

    def test_a_check_without_reading_reports_what_the_last_scrub_found(
        self, repo: RepositoryFixture, packs: list[Path]
    ) -> None:
        repo.publish({b"f": CHUNKS[4]})
        repo.damage(digest_of(CHUNKS[4]))
        check(repo)
        with repo.reading() as repository:
            found = Checker(repository, RecordingMonitor()).check().damage
        assert [(one.what, one.path) for one in found] == [("file", b"f")]


class TestDuplicates:
    def test_a_read_falls_back_to_an_intact_copy_in_another_pack(
        self, repo: RepositoryFixture
    ) -> None:
        repo.store(CHUNKS[0])
        repo.damage(digest_of(CHUNKS[0]))
        data, _ = make_pack([CHUNKS[0], CHUNKS[1]])
        add_pack(repo.root, data)
        with repo.reading() as repository:
            assert repository.store.read(digest_of(CHUNKS[0])) == CHUNKS[0]

    def test_a_read_succeeds_despite_a_wrong_location_in_the_index(
        self, repo: RepositoryFixture
    ) -> None:
        data, entries = make_pack(CHUNKS)
        wrong = [entry._replace(offset=entry.offset + 1) for entry in entries]
        pack = add_pack(repo.root, data)
        with repo.writing() as repository:
            repository.store.index.rebuild(lambda: [(pack, len(data), wrong)])
        with repo.reading() as repository:
            for chunk in CHUNKS:
                assert repository.store.read(digest_of(chunk)) == chunk

    def test_one_search_of_all_packs_serves_all_lost_blobs(
        self, repo: RepositoryFixture, packs: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with repo.reading() as repository:
            searched: list[PackRef] = []
            store = repository.store

            def read(pack: PackRef, size: int) -> list[PackEntry]:
                searched.append(pack)
                return store.read_directory(pack, size)

            copies = Duplicates(store.index, store.stored_packs, read)
            monkeypatch.setattr(repository.store, "_duplicates", copies)
            for number in range(200):
                with pytest.raises(BlobError, match="missing"):
                    repository.store.read(digest_of(b"%d" % number))
            assert len(searched) == len(set(searched)) == len(packs)

    def test_a_copy_is_found_however_many_other_blobs_are_lost(
        self, repo: RepositoryFixture
    ) -> None:
        lost = [noise(f"lost {number}", 20) for number in range(200)]
        repo.store(*lost, CHUNKS[0])
        for chunk in (*lost, CHUNKS[0]):
            repo.damage(digest_of(chunk))
        data, _ = make_pack([CHUNKS[0]])
        add_pack(repo.root, data)
        with repo.reading() as repository:
            for chunk in lost:
                with pytest.raises(BlobError):
                    repository.store.read(digest_of(chunk))
            assert repository.store.read(digest_of(CHUNKS[0])) == CHUNKS[0]

    def test_a_copy_is_found_in_a_pack_with_a_damaged_directory(
        self, repo: RepositoryFixture
    ) -> None:
        repo.store(CHUNKS[0])
        repo.damage(digest_of(CHUNKS[0]))
        data, _ = make_pack([CHUNKS[0], CHUNKS[1]])
        pack = add_pack(repo.root, data)
        flip(repo.root / pack_name(pack), -1)
        with repo.reading() as repository:
            assert repository.store.read(digest_of(CHUNKS[0])) == CHUNKS[0]


def test_check_clears_the_damage_mark_of_a_blob_that_a_pack_holds_twice(
    repo: RepositoryFixture,
) -> None:
    digest = digest_of(CHUNKS[0])
    data, _ = make_pack([CHUNKS[0], CHUNKS[0]])
    add_pack(repo.root, data)
    with repo.writing() as repository:
        index = repository.store.index
        index.mark_blobs(repository.store.locate(digest).pack, [digest])
        assert index.are_stored([digest]) == [False]
    with open_for_reading(repo.root, may_write_index=True) as repository:
        result = Checker(repository, RecordingMonitor()).check(PackSelection())
        assert result.damaged == {}
        assert {one.what for one in result.damage} <= {"index"}, "its second place is another"
        assert repository.store.index.are_stored([digest]) == [True]
