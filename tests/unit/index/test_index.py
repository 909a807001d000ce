"""The index: where blobs are, ordinals that never change their meaning, and a map that grows."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from casfs.digest import Digest, PackId, digest_of
from casfs.errors import IndexUnusableError
from casfs.format.pack import PackEntry, PackRef
from casfs.index import index as index_module
from casfs.index import lmdb_env
from casfs.index.index import Index
from casfs.index.schema import IndexedPack, Location
from tests.support.stores import child, read_line, write_line

SMALL_MAP = 1 << 17


def blob(number: int) -> Digest:
    return digest_of(b"blob %d" % number)


def pack(number: int, *blobs: int) -> IndexedPack:
    """Return a pack that holds the blobs of these numbers."""
    entries = [PackEntry(blob(n), 32 + 16 * i, 10 + n % 7, 20, 1, 0) for i, n in enumerate(blobs)]
    return PackRef(PackId(digest_of(b"pack %d" % number)), False), 1000 + number, entries


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    opened = Index(tmp_path / "index")
    opened.rebuild(tuple)
    yield opened
    opened.close()


def located(index: Index, number: int) -> Location:
    found = index.lookup(blob(number))
    assert found is not None
    return found


class TestIndexedBlobs:
    def test_the_index_finds_blobs_where_their_pack_has_them(self, index: Index) -> None:
        index.add_packs([pack(0, 1, 2), pack(1, 3)])
        place = located(index, 2)
        assert (place.offset, place.stored_bytes, place.plain_bytes) == (48, 12, 20)
        assert (place.kind, place.codec) == (1, 0)
        assert index.pack_ref(place.pack) == pack(0)[0]
        assert index.pack_ref(located(index, 3).pack) == pack(1)[0]
        assert index.lookup(blob(4)) is None
        assert index.blob_count() == 3

    def test_a_blob_in_a_second_pack_keeps_its_first_location(self, index: Index) -> None:
        index.add_packs([pack(0, 1)])
        before = located(index, 1)
        index.add_packs([pack(1, 2, 1)])
        assert located(index, 1) == before
        assert index.blob_count() == 2
        assert [record.blobs for record in index.packs()] == [1, 2]

    def test_the_index_answers_which_blobs_are_stored_in_the_order_of_the_digests(
        self, index: Index, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        index.add_packs([pack(0, *range(0, 50, 2))])
        for at_once in (1000, 7, 1):
            monkeypatch.setattr(index_module, "_ASKED_AT_ONCE", at_once)
            assert index.are_stored(map(blob, range(50))) == [n % 2 == 0 for n in range(50)]
        assert index.are_stored([]) == []

    def test_the_index_accepts_digests_that_it_lists_itself(self, index: Index) -> None:
        index.add_packs([pack(0, *range(100))])
        assert all(index.are_stored(digest for digest, _ in index.blobs(batch=7)))

    def test_the_index_lists_blobs_by_digest_in_batches_of_any_size(self, index: Index) -> None:
        index.add_packs([pack(0, *range(100))])
        expected = sorted(map(blob, range(100)))
        for batch in (1, 33, 50, 100, 1000):
            listed = list(index.blobs(batch))
            assert [digest for digest, _ in listed] == expected
            assert all(index.lookup(digest) == place for digest, place in listed)

    def test_blob_ordinals_have_no_gaps(self, index: Index) -> None:
        index.add_packs([pack(0, 1, 2, 3)])
        index.add_packs([pack(1, 3, 4), pack(2, 1, 5)])
        assert sorted(place.ordinal for _, place in index.blobs()) == list(range(5))


class TestIndexedPacks:
    def test_the_index_lists_packs_as_they_were_added(self, index: Index) -> None:
        index.add_packs([pack(5, 1), pack(3, 2)])
        index.add_packs([pack(4)])
        assert [(r.ordinal, r.pack, r.pack_bytes, r.blobs) for r in index.packs()] == [
            (0, pack(5)[0], 1005, 1),
            (1, pack(3)[0], 1003, 1),
            (2, pack(4)[0], 1004, 0),
        ]

    def test_adding_a_known_pack_changes_nothing(self, index: Index) -> None:
        index.add_packs([pack(0, 1)])
        before = index.packs(), list(index.blobs())
        index.add_packs([pack(0, 1, 2)])
        assert (index.packs(), list(index.blobs())) == before

    def test_the_index_records_when_a_pack_was_verified(self, index: Index) -> None:
        index.add_packs([pack(0, 1), pack(1, 2)])
        index.mark_verified([1, 99], 1_700_000_000)
        assert [record.verified_s for record in index.packs()] == [0, 1_700_000_000]
        assert [record.pack_bytes for record in index.packs()] == [1000, 1001]

    def test_an_unknown_pack_ordinal_is_an_error(self, index: Index) -> None:
        with pytest.raises(IndexUnusableError, match="pack 7"):
            index.pack_ref(7)


class TestIndexRebuild:
    def test_a_rebuild_replaces_all_entries(self, index: Index) -> None:
        index.add_packs([pack(0, 1, 2)])
        index.rebuild(lambda: [pack(1, 2, 3)])
        assert index.are_stored(map(blob, (1, 2, 3))) == [False, True, True]
        assert [record.pack for record in index.packs()] == [pack(1)[0]]

    def test_a_rebuild_gives_no_ordinal_a_second_meaning(self, index: Index) -> None:
        index.add_packs([pack(0, 1, 2)])
        old_packs = {record.ordinal for record in index.packs()}
        old_blobs = {place.ordinal for _, place in index.blobs()}
        index.rebuild(lambda: [pack(0, 1, 2), pack(1, 3)])
        assert old_packs.isdisjoint(record.ordinal for record in index.packs())
        assert old_blobs.isdisjoint(place.ordinal for _, place in index.blobs())
        index.add_packs([pack(2, 4)])
        ordinals = [place.ordinal for _, place in index.blobs()]
        assert len(set(ordinals)) == 4

    def test_a_failed_rebuild_changes_nothing(self, index: Index) -> None:
        index.add_packs([pack(0, 1)])
        before = index.packs(), list(index.blobs()), index.loss_epoch()

        def fail() -> Iterator[IndexedPack]:
            yield pack(1, 2)
            raise ValueError("a disk")

        with pytest.raises(ValueError, match="a disk"):
            index.rebuild(fail)
        assert (index.packs(), list(index.blobs()), index.loss_epoch()) == before

    def test_a_rebuild_makes_a_new_index_current(self, tmp_path: Path) -> None:
        new = Index(tmp_path / "index")
        assert not new.is_current()
        new.rebuild(tuple)
        assert new.is_current()
        new.close()
        again = Index(tmp_path / "index", readonly=True)
        assert again.is_current()
        again.close()


class TestIndexCompleteness:
    def test_a_snapshot_stays_complete_until_something_is_lost(self, index: Index) -> None:
        assert not index.is_complete(b"snapshot")
        index.mark_complete(b"snapshot", index.loss_epoch())
        assert index.is_complete(b"snapshot")
        index.add_packs([pack(0, 1)])
        assert index.is_complete(b"snapshot")
        index.rebuild(tuple)
        assert not index.is_complete(b"snapshot")

    def test_a_snapshot_is_not_marked_complete_after_a_loss_in_between(self, index: Index) -> None:
        losses = index.loss_epoch()
        index.rebuild(tuple)
        assert index.loss_epoch() == losses + 1
        index.mark_complete(b"snapshot", losses)
        assert not index.is_complete(b"snapshot")


class TestIndexOpening:
    def test_opening_for_reading_needs_an_index(self, tmp_path: Path) -> None:
        with pytest.raises(IndexUnusableError, match="does not exist"):
            Index(tmp_path / "index", readonly=True)
        assert not (tmp_path / "index").exists()

    def test_opening_for_reading_refuses_an_index_that_was_never_initialized(
        self, tmp_path: Path
    ) -> None:
        import lmdb

        lmdb.open(str(tmp_path / "index"), max_dbs=1).close()
        with pytest.raises(IndexUnusableError):
            Index(tmp_path / "index", readonly=True)

    @pytest.mark.parametrize("readonly", [False, True])
    def test_opening_refuses_a_file_that_is_no_index(self, tmp_path: Path, readonly: bool) -> None:
        folder = tmp_path / "index"
        folder.mkdir()
        (folder / "data.mdb").write_bytes(b"nothing that LMDB would know" * 1000)
        with pytest.raises(IndexUnusableError, match="repair index"):
            Index(folder, readonly)

    def test_opening_refuses_a_path_that_is_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "index").write_bytes(b"")
        with pytest.raises(IndexUnusableError):
            Index(tmp_path / "index")

    def test_reopening_an_index_finds_everything(self, tmp_path: Path) -> None:
        first = Index(tmp_path / "index")
        first.rebuild(lambda: [pack(0, 1, 2)])
        first.close()
        for readonly in (True, False):
            second = Index(tmp_path / "index", readonly)
            assert second.are_stored(map(blob, (1, 2, 3))) == [True, True, False]
            second.close()

    def test_opening_with_little_address_space_begins_with_a_small_map(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lmdb_env, "_MAP_BYTES", 1 << 62)
        monkeypatch.setattr(lmdb_env, "_SMALL_MAP_BYTES", SMALL_MAP)
        index = Index(tmp_path / "index")
        index.rebuild(lambda: [pack(0, *range(5000))])
        assert index.blob_count() == 5000
        index.close()


def commits_of(index: Index, steps: list[str], added: IndexedPack) -> int:
    del steps[:]
    index.add_packs([added])
    assert index.partial_packs() == []
    return steps.count("commit index")


def test_a_pack_takes_as_few_commits_as_the_pages_that_it_changes_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    index = Index(tmp_path / "index", on_step=steps.append, sync=False)
    index.rebuild(tuple)
    assert commits_of(index, steps, pack(0, *range(8_000))) == 1
    monkeypatch.setattr(index_module, "_CHANGED_AT_ONCE", 40)
    # The index has more than 100 pages, so each of 100 blobs may lie on one of its own.
    assert commits_of(index, steps, pack(1, *range(8_000, 8_100))) == 3
    # The 4,000 blobs change every page once, and need some 140 new ones: 20 of them a commit.
    assert 10 <= commits_of(index, steps, pack(2, *range(10_000, 14_000))) <= 24
    assert index.blob_count() == 12_100
    index.close()


class TestLargePacks:
    """What one transaction adds is bounded, and what is left half in the index costs nothing."""

    @pytest.fixture(autouse=True)
    def _few_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(index_module, "_CHANGED_AT_ONCE", 8)
        monkeypatch.setattr(index_module, "_BLOBS_PER_PAGE", 1)

    def stopped_after(self, path: Path, commits: int, added: IndexedPack) -> None:
        left = iter(range(commits + 1))

        def on_step(step: str) -> None:
            if step == "commit index" and next(left, None) is None:
                raise InterruptedError("killed")

        index = Index(path, on_step=on_step)
        try:
            index.rebuild(tuple)
            index.add_packs([added])
        except InterruptedError:
            pass
        finally:
            index.close()

    def test_a_large_pack_is_whole_after_as_many_commits_as_it_needs(self, tmp_path: Path) -> None:
        steps: list[str] = []
        index = Index(tmp_path / "index", on_step=steps.append)
        index.rebuild(tuple)
        del steps[:]
        index.add_packs([pack(0, *range(100))])
        assert steps.count("commit index") == 13
        assert index.partial_packs() == []
        assert sorted(place.ordinal for _, place in index.blobs()) == list(range(100))
        index.close()

    @pytest.mark.parametrize("commits", range(14))
    def test_a_partly_added_pack_is_completed_and_keeps_its_locations(
        self, tmp_path: Path, commits: int
    ) -> None:
        added = pack(3, *range(100))
        self.stopped_after(tmp_path / "index", commits, added)
        index = Index(tmp_path / "index")
        before = dict(index.blobs())
        assert len(before) == min(100, 8 * commits)
        assert index.partial_packs() == ([added[0].id] if 0 < commits < 13 else [])
        assert all(index.pack_ref(place.pack) == added[0] for place in before.values())
        for partial in index.partial_packs():
            index.finish_partial_pack(partial, added[2])
            assert index.partial_packs() == []
            after = dict(index.blobs())
            assert before.items() <= after.items() and len(after) == 100
            assert sorted(place.ordinal for place in after.values()) == list(range(100))
            assert [record.blobs for record in index.packs()] == [100]
        index.close()

    def test_a_partly_added_pack_is_not_continued_in_a_rebuilt_index(self, tmp_path: Path) -> None:
        added, other = pack(0, *range(100)), pack(1, 200)
        rebuilt = False

        def on_step(step: str) -> None:
            nonlocal rebuilt
            if step == "commit index" and not rebuilt and opened.partial_packs():
                rebuilt = True
                opened.rebuild(lambda: [other, added])

        opened = Index(tmp_path / "index", on_step=on_step)
        opened.rebuild(tuple)
        opened.add_packs([added])
        assert rebuilt and opened.partial_packs() == []
        assert opened.are_stored(map(blob, range(100))) == [True] * 100
        ordinals = {record.pack: record.ordinal for record in opened.packs()}
        assert all(
            place.pack == ordinals[added[0] if digest != blob(200) else other[0]]
            for digest, place in opened.blobs()
        )
        opened.close()

    def test_a_removed_pack_is_no_longer_partial(self, tmp_path: Path) -> None:
        added = pack(3, *range(100))
        self.stopped_after(tmp_path / "index", 4, added)
        index = Index(tmp_path / "index")
        index.remove_packs({0: added[0]})
        assert (index.partial_packs(), index.packs(), index.blob_count()) == ([], [], 0)
        index.close()


WRITER = """
import sys
from pathlib import Path
from casfs.digest import PackId, digest_of
from casfs.index import lmdb_env
from casfs.index.index import Index
from casfs.format.pack import PackEntry, PackRef

lmdb_env._MAP_BYTES = int(sys.argv[2])
first, packs = int(sys.argv[3]), int(sys.argv[4])
index = Index(Path(sys.argv[1]))
print("open", flush=True)
sys.stdin.readline()
for number in range(first, first + packs):
    blobs = range(number * 100, number * 100 + 100)
    entries = [PackEntry(digest_of(b"blob %d" % n), 32, 10, 20, 1, 0) for n in blobs]
    index.add_packs([(PackRef(PackId(digest_of(b"pack %d" % number)), False), 1000, entries)])
print("done", flush=True)
"""


class TestIndexMapGrowth:
    """The map grows when it is full, for every process that has the index open."""

    @pytest.fixture
    def small(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
        monkeypatch.setattr(lmdb_env, "_MAP_BYTES", SMALL_MAP)
        opened = Index(tmp_path / "index")
        opened.rebuild(tuple)
        yield opened
        opened.close()

    def test_the_map_grows_for_as_many_packs_as_come(
        self, small: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO):
            for number in range(20):
                small.add_packs([pack(number, *range(number * 200, number * 200 + 200))])
        assert small.are_stored(map(blob, range(4000))) == [True] * 4000
        assert len(small.packs()) == 20
        assert sorted(place.ordinal for _, place in small.blobs()) == list(range(4000))
        assert "grows" in caplog.text
        assert (tmp_path / "index/data.mdb").stat().st_size > SMALL_MAP

    def test_the_map_grows_in_the_middle_of_a_rebuild(self, small: Index) -> None:
        packs = [pack(number, *range(number * 200, number * 200 + 200)) for number in range(20)]
        small.rebuild(lambda: iter(packs))
        assert small.blob_count() == 4000
        assert [record.pack for record in small.packs()] == [found[0] for found in packs]

    def test_the_map_grows_while_other_threads_read(self, small: Index) -> None:
        small.add_packs([pack(0, *range(100))])
        stop = threading.Event()
        wrong: list[object] = []

        def read() -> None:
            try:
                while not stop.is_set():
                    if small.are_stored(map(blob, range(100))) != [True] * 100:
                        wrong.append("a blob was not known")
                    stop.wait(0.0005)
            except IndexUnusableError as error:
                wrong.append(error)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for number in range(1, 40):
            small.add_packs([pack(number, *range(number * 100, number * 100 + 100))])
        stop.set()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert small.blob_count() == 4000

    def test_a_map_that_another_process_grew_is_followed(
        self, small: Index, tmp_path: Path
    ) -> None:
        small.add_packs([pack(0, *range(100))])
        with child(WRITER, tmp_path / "index", SMALL_MAP, 1, 39) as process:
            assert read_line(process) == "open"
            write_line(process)
            assert read_line(process) == "done"
        assert small.are_stored(map(blob, range(4000))) == [True] * 4000
        small.add_packs([pack(40, *range(4000, 4100))])
        assert small.blob_count() == 4100


def test_two_processes_add_packs_at_the_same_time(tmp_path: Path) -> None:
    index = Index(tmp_path / "index")
    index.rebuild(tuple)
    index.close()
    map_bytes = 1 << 30
    with (
        child(WRITER, tmp_path / "index", map_bytes, 0, 15) as first,
        child(WRITER, tmp_path / "index", map_bytes, 10, 15) as second,
    ):
        assert (read_line(first), read_line(second)) == ("open", "open")
        write_line(first)
        write_line(second)
        assert (read_line(first), read_line(second)) == ("done", "done")
    index = Index(tmp_path / "index")
    assert index.blob_count() == 2500
    assert sorted(place.ordinal for _, place in index.blobs()) == list(range(2500))
    assert sorted(record.ordinal for record in index.packs()) == list(range(25))
    assert len({record.pack for record in index.packs()}) == 25
    index.close()
