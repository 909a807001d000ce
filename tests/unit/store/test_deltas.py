"""Index deltas between hosts: what one stores another finds, and whatever is lost of them costs only time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from casfs.digest import PackId, digest_of
from casfs.errors import BlobError, KeyMissingError
from casfs.format.delta import Delta, DeltaBuilder, DeltaPack
from casfs.format.key_derivation import SessionId, WriteSession
from casfs.format.pack import PackEntry, PackRef
from casfs.index import index as index_module
from casfs.index.index import Index
from casfs.storage.base import Storage
from casfs.storage.local import LocalStorage
from casfs.storage.memory import MemoryStorage
from casfs.store import delta_sync
from casfs.store.blob_store import pack_name
from tests.support.encryption import SESSION, OneSession
from tests.support.hosts import MAINTENANCE, READER, WRITER, Host, OpenHost, Place, locations
from tests.support.storage_double import Call, RecordingStorage, Script
from tests.support.stores import child, noise


@pytest.fixture
def place() -> Place:
    return Place()


def blobs(label: str, count: int = 3) -> list[bytes]:
    return [noise(f"{label}{n}", 300 + n) for n in range(count)]


def many_packs(label: str, packs: int) -> list[list[bytes]]:
    return [blobs(f"{label}{number} ") for number in range(packs)]


def put_packs(host: OpenHost, label: str, packs: int) -> None:
    for plains in many_packs(label, packs):
        host.put(plains)


class TestTwoHosts:
    def test_a_host_finds_by_one_delta_what_another_stored(
        self, place: Place, tmp_path: Path
    ) -> None:
        one = Host(place, tmp_path / "one")
        with one.open() as host:
            host.put(blobs("a"))
            assert len(host.publish()) == 1
            expected = locations(host.index)
        recording = RecordingStorage(place.storage)
        two = Host(place, tmp_path / "two", storage=recording)
        with two.open(READER) as host:
            assert locations(host.index) == expected
            assert [call.method for call in recording.calls] == ["list", "list entry", "read"]
            assert host.read(blobs("a")[1]) == blobs("a")[1]

    def test_an_unchanged_repository_is_opened_by_one_listing(
        self, place: Place, tmp_path: Path
    ) -> None:
        Host(place, tmp_path / "one").back_up(blobs("a"))
        recording = RecordingStorage(place.storage)
        with Host(place, tmp_path / "one", storage=recording).open(READER):
            assert (recording.calls[0].method, recording.calls[0].name) == ("list", "deltas")
            assert {call.method for call in recording.calls[1:]} <= {"list entry"}

    def test_a_writer_looks_at_each_new_pack_once_and_then_stores_nothing_twice(
        self, place: Place, tmp_path: Path
    ) -> None:
        Host(place, tmp_path / "one").back_up(blobs("a"))
        recording = RecordingStorage(place.storage)
        two = Host(place, tmp_path / "two", storage=recording)
        for expected in (1, 0):
            recording.calls.clear()
            with two.open() as host:
                looks = [call for call in recording.calls if call.method == "size"]
                assert len(looks) == expected
                assert host.put(blobs("a")) == 0
                assert host.publish() == []

    def test_a_reader_does_not_count_a_pack_as_stored_that_it_has_not_seen(
        self, place: Place, tmp_path: Path
    ) -> None:
        Host(place, tmp_path / "one").back_up(blobs("a"))
        two = Host(place, tmp_path / "two")
        with two.open(READER) as host:
            assert not host.has(blobs("a")[0])
            assert host.read(blobs("a")[0]) == blobs("a")[0]
        with two.open() as host:
            assert host.has(blobs("a")[0])

    def test_a_removal_reaches_a_host_that_knew_the_pack(
        self, place: Place, tmp_path: Path
    ) -> None:
        one, two = (Host(place, tmp_path / name) for name in ("one", "two"))
        with one.open() as host:
            host.put(blobs("a"))
            host.put(blobs("b"))
            host.publish()
        with two.open() as host:
            assert host.has(blobs("a")[0])
            before = host.packs()
        with one.open() as host:
            (pack,) = {locations(host.index)[host.store.codec.digest(blobs("a")[0])][0]}
            host.remove([pack])
        with two.open() as host:
            assert host.packs() == before - {pack}
            assert not host.has(blobs("a")[0]) and host.has(blobs("b")[0])

    def test_a_copy_in_another_pack_stays_found_when_its_twin_is_removed(
        self, place: Place, tmp_path: Path
    ) -> None:
        one, two = (Host(place, tmp_path / name) for name in ("one", "two"))
        with one.open() as first, two.open() as second:
            first.put([*blobs("same"), noise("one", 99)])
            second.put([*blobs("same"), noise("two", 99)])
            first.publish()
            second.publish()
        for host_ in (one, two):
            with host_.open() as host:
                assert len(host.packs()) == 2
        with one.open() as host:
            going = locations(host.index)[host.store.codec.digest(noise("one", 99))][0]
            host.remove([going])
            assert all(host.has(plain) for plain in blobs("same"))
        with two.open() as host:
            assert all(host.has(plain) and host.read(plain) for plain in blobs("same"))
            assert going not in host.packs()

    def test_two_processes_of_a_host_apply_the_same_deltas_at_once(
        self, place: Place, tmp_path: Path
    ) -> None:
        one = Host(place, tmp_path / "one")
        for label in "abcd":
            one.back_up(*many_packs(label, 5))
        with one.open(READER) as host:
            expected = locations(host.index)
        export(place.storage, tmp_path / "repository")
        with ThreadPoolExecutor(3) as pool:
            processes = [
                pool.submit(run_host, tmp_path / "repository", tmp_path / "two") for _ in range(3)
            ]
            assert [process.result() for process in processes] == ["20 packs\n"] * 3
        with Host(place, tmp_path / "two").open(READER) as host:
            assert locations(host.index) == expected
            assert host.index.partial_packs() == []


def export(storage: Storage, root: Path) -> None:
    """Copy the objects of a storage into a folder."""
    copy = LocalStorage(root, sync=False)
    for prefix in ("packs", "deltas"):
        for item in storage.list(prefix):
            (root / item.name).parent.mkdir(parents=True, exist_ok=True)
            copy.write(item.name, storage.read(item.name))
    copy.close()


_HOST = """
import sys
from pathlib import Path
from casfs.storage.local import LocalStorage
from tests.support.hosts import READER, Host, Place
place = Place(LocalStorage(Path(sys.argv[1])))
with Host(place, Path(sys.argv[2])).open(READER) as host:
    print(len(host.packs()), "packs")
"""


def run_host(repository: Path, index: Path) -> str:
    with child(_HOST, repository, index) as process:
        return process.communicate()[0]


class TestLostAndForgedDeltas:
    def test_a_lost_index_is_rebuilt_from_deltas_without_a_look_at_the_packs(
        self, place: Place, tmp_path: Path
    ) -> None:
        one = Host(place, tmp_path / "one")
        for label in "abc":
            one.back_up(blobs(label))
        with one.open() as host:
            expected = locations(host.index)
        one.lose_index()
        recording = RecordingStorage(place.storage)
        with Host(place, tmp_path / "one", storage=recording).open(READER) as host:
            assert locations(host.index) == expected
        assert not any(call.name.startswith(("packs", "meta")) for call in recording.calls)

    def test_without_deltas_the_directories_of_the_packs_are_read(
        self, place: Place, tmp_path: Path
    ) -> None:
        with Host(place, tmp_path / "one").open() as host:
            host.put(blobs("a"))
            expected = locations(host.index)
        with Host(place, tmp_path / "two").open(READER) as host:
            assert locations(host.index) == expected

    def test_a_damaged_delta_costs_a_listing_once(self, place: Place, tmp_path: Path) -> None:
        with Host(place, tmp_path / "one").open() as host:
            host.put(blobs("a"))
            host.publish()
            host.put(blobs("b"))
            (name,) = host.publish()
            expected = locations(host.index)
        data = place.storage.read(str(name))
        place.storage.write(str(name), data[:-1] + bytes([data[-1] ^ 1]))
        recording = RecordingStorage(place.storage)
        two = Host(place, tmp_path / "two", storage=recording)
        with two.open() as host:
            assert locations(host.index) == expected
            assert all(host.has(plain) for plain in blobs("a") + blobs("b"))
        assert ("list", "packs") in [(call.method, call.name) for call in recording.calls]
        recording.calls.clear()
        with two.open(READER):
            assert ("list", "packs") not in [(call.method, call.name) for call in recording.calls]

    def test_a_deleted_delta_costs_only_time(self, place: Place, tmp_path: Path) -> None:
        with Host(place, tmp_path / "one").open() as host:
            host.put(blobs("a"))
            host.publish()
            host.put(blobs("b"))
            (name,) = host.publish()
        place.storage.delete(str(name))
        with Host(place, tmp_path / "two").open() as host:
            assert host.put(blobs("b")) == 3
            assert host.read(blobs("b")[0]) == blobs("b")[0]
        with Host(place, tmp_path / "three").open(MAINTENANCE) as host:
            host.merge()
        with Host(place, tmp_path / "four").open() as host:
            assert host.has(blobs("b")[0])

    def test_a_reader_finds_packs_of_a_deleted_delta_by_one_listing(
        self, place: Place, tmp_path: Path
    ) -> None:
        with Host(place, tmp_path / "one").open() as host:
            host.put(blobs("a"))
            host.publish()
            put_packs(host, "b", 3)
            (name,) = host.publish()
        place.storage.delete(str(name))
        recording = RecordingStorage(place.storage)
        with Host(place, tmp_path / "two", storage=recording).open(READER) as host:
            recording.calls.clear()
            for number in range(3):
                for plain in blobs(f"b{number} "):
                    assert host.read(plain) == plain
            assert [call.name for call in recording.calls].count("packs") == 1
            assert len(host.packs()) == 4

    def test_a_reader_follows_blobs_that_a_prune_moved_while_it_is_open(
        self, place: Place, tmp_path: Path
    ) -> None:
        one = Host(place, tmp_path / "one")
        one.back_up(blobs("a"))
        with Host(place, tmp_path / "two").open(READER) as reader:
            with one.open(MAINTENANCE) as host:
                old = host.packs()
                host.index.mark_for_removal([record.ordinal for record in host.index.packs()])
                host.put(blobs("a"))
                host.remove(old)
            assert all(reader.read(plain) == plain for plain in blobs("a"))

    def test_a_forged_delta_lets_no_blob_count_as_stored_whose_pack_does_not_exist(
        self, place: Place, tmp_path: Path
    ) -> None:
        one = Host(place, tmp_path / "one")
        with one.open() as host:
            host.put(blobs("a"))
            host.publish()
            digest = host.store.codec.digest(noise("victim", 500))
        builder = DeltaBuilder()
        entry = PackEntry(digest, 32, 400, 500, 1, 0)
        builder.add(DeltaPack(PackRef(PackId(bytes(32)), False), 1000, [entry]))
        builder.is_complete = True
        name, data = builder.encode(place.now_ms())
        place.storage.create(str(name), data)
        for folder in ("one", "two"):
            with Host(place, tmp_path / folder).open() as host:
                assert host.put([noise("victim", 500)]) == (folder == "one")
                assert host.read(noise("victim", 500)) == noise("victim", 500)
                host.publish()

    def test_a_forged_size_of_a_pack_is_corrected_from_its_directory(
        self, place: Place, tmp_path: Path
    ) -> None:
        with Host(place, tmp_path / "one").open() as host:
            host.put(blobs("a"))
            host.publish()
            (record,) = host.index.packs()
        builder = DeltaBuilder()
        builder.add(DeltaPack(record.pack, record.pack_bytes + 1, []))
        name, data = builder.encode(place.now_ms())
        place.storage.create(str(name), data)
        with Host(place, tmp_path / "two").open() as host:
            assert all(host.has(plain) for plain in blobs("a"))

    def test_a_forged_removal_is_repaired_by_maintenance(
        self, place: Place, tmp_path: Path
    ) -> None:
        one, two = (Host(place, tmp_path / name) for name in ("one", "two"))
        with one.open() as host:
            host.put(blobs("a"))
            host.publish()
            (pack,) = host.packs()
        builder = DeltaBuilder()
        builder.removed.append(pack.id)
        builder.replaced += place.deltas()
        name, data = builder.encode(place.now_ms())
        place.storage.create(str(name), data)
        with two.open() as host:
            assert host.read(blobs("a")[0]) == blobs("a")[0]
        with two.open(MAINTENANCE) as host:
            assert host.packs() == {pack}
            host.merge(margin_ms=0)
        with Host(place, tmp_path / "three").open() as host:
            assert host.has(blobs("a")[0])

    def test_a_stale_delta_of_a_pack_that_was_removed_is_noticed_by_a_writer(
        self, place: Place, tmp_path: Path
    ) -> None:
        one = Host(place, tmp_path / "one")
        with one.open() as host:
            host.put(blobs("a"))
            host.publish()
            (pack,) = host.packs()
        place.storage.delete(pack_name(pack))
        with Host(place, tmp_path / "two").open() as host:
            assert not host.has(blobs("a")[0])
            assert host.put(blobs("a")) == 3

    def test_many_packs_that_one_listing_lacks_count_as_missing_only_after_another(
        self, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(delta_sync, "_MOST_LOOKS", 3)
        with Host(place, tmp_path / "one").open() as host:
            put_packs(host, "a", 8)
            host.publish()
            gone = sorted(host.packs())[0]
        late: list[tuple[str, bytes]] = []
        for name in [item.name for item in place.storage.list("packs")]:
            late.append((name, place.storage.read(name)))
            place.storage.delete(name)

        def store(call: Call) -> None:
            # What a first listing has passed already is there for the next one.
            if call == Call("list", "packs"):
                looks.append(call)
                if len(looks) == 2:
                    for name, data in late:
                        if name != pack_name(gone):
                            place.storage.create(name, data)

        looks: list[Call] = []
        recording = RecordingStorage(place.storage, Script(before=store))
        with Host(place, tmp_path / "two", storage=recording).open() as host:
            assert len(looks) == 2
            assert len(host.packs()) == 7 and gone not in host.packs()
            assert [call.method for call in recording.calls].count("size") == 1

    def test_a_forged_delta_of_many_packs_costs_listings_and_no_request_for_each(
        self, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(delta_sync, "_MOST_LOOKS", 3)
        with Host(place, tmp_path / "one").open() as host:
            host.put(blobs("a"))
            host.publish()
            builder = DeltaBuilder()
            for number in range(10):
                entry = PackEntry(digest_of(b"blob %d" % number), 32, 10, 10, 1, 0)
                invented = PackRef(PackId(digest_of(b"pack %d" % number)), is_meta=False)
                builder.add(DeltaPack(invented, 1000, [entry]))
            host.publisher.write(builder)
        recording = RecordingStorage(place.storage)
        with Host(place, tmp_path / "two", storage=recording).open() as host:
            assert len(host.packs()) == 1
            assert [call.method for call in recording.calls].count("size") <= 1

    def test_a_removal_that_a_merge_hides_is_noticed_by_a_writer(
        self, place: Place, tmp_path: Path
    ) -> None:
        one, two = (Host(place, tmp_path / name) for name in ("one", "two"))
        one.back_up(blobs("a"))
        with two.open() as host:
            assert host.has(blobs("a")[0])
            (pack,) = host.packs()
        with one.open(MAINTENANCE) as host:
            host.put(blobs("b"))
            host.remove([pack])
            host.merge(margin_ms=0)
            assert len(place.deltas()) == 1
        with two.open() as host:
            assert not host.has(blobs("a")[0]) and host.has(blobs("b")[0])

    def test_objects_with_foreign_names_are_ignored(self, place: Place, tmp_path: Path) -> None:
        for name in ("deltas/x", "deltas/0-1", f"deltas/{'0' * 12}-{'A' * 64}"):
            place.storage.create(name, b"?")
        with Host(place, tmp_path / "one").open() as host:
            host.put(blobs("a"))
            assert len(host.publish()) == 1


class TestMerge:
    def test_small_deltas_become_one_and_the_replaced_go_after_the_margin(
        self, place: Place, tmp_path: Path
    ) -> None:
        one = Host(place, tmp_path / "one")
        for label in "abcde":
            one.back_up(blobs(label))
        with one.open(MAINTENANCE) as host:
            result = host.merge(margin_ms=10_000_000)
            assert (result.written, result.replaced, result.deleted) == (1, 5, 0)
            assert len(place.deltas()) == 6
            assert host.merge(margin_ms=10_000_000).written == 0
            result = host.merge(margin_ms=0)
            assert (result.written, result.deleted) == (0, 5)
            expected = locations(host.index)
        assert len(place.deltas()) == 1
        with Host(place, tmp_path / "two").open() as host:
            assert locations(host.index) == expected

    def test_a_new_host_reads_no_delta_that_a_merge_replaced(
        self, place: Place, tmp_path: Path
    ) -> None:
        one = Host(place, tmp_path / "one")
        for label in "abcde":
            one.back_up(blobs(label))
        with one.open(MAINTENANCE) as host:
            host.merge(margin_ms=10_000_000)
        recording = RecordingStorage(place.storage)
        with Host(place, tmp_path / "two", storage=recording).open(READER) as host:
            assert len(host.packs()) == 5
        assert recording.methods().count("read") == 1

    def test_merged_deltas_are_bounded_and_drop_removed_packs(
        self, place: Place, tmp_path: Path
    ) -> None:
        one = Host(place, tmp_path / "one")
        for label in "abcdefgh":
            one.back_up(*many_packs(label, 6))
        with one.open(MAINTENANCE) as host:
            host.remove(sorted(host.packs())[::2])
            result = host.merge(margin_ms=0, most_bytes=4000)
            assert result.written > 1
            expected = locations(host.index)
        sizes = [place.storage.size(str(name)) for name in place.deltas()]
        assert max(sizes) <= 4000
        with Host(place, tmp_path / "two").open() as host:
            assert locations(host.index) == expected

    def test_a_removal_is_kept_while_an_older_delta_names_the_pack(
        self, place: Place, tmp_path: Path
    ) -> None:
        one = Host(place, tmp_path / "one")
        one.back_up(*many_packs("a", 14))
        one.back_up(blobs("b"))
        with one.open(MAINTENANCE) as host:
            host.remove(sorted(host.packs())[:1])
            # The large one stays, the two small ones are merged.
            result = host.merge(margin_ms=0, small_bytes=1500)
            assert (result.written, result.replaced) == (1, 2)
            expected = host.packs()
        with Host(place, tmp_path / "two").open(READER) as host:
            assert host.packs() == expected

    def test_a_pack_in_no_delta_is_published_by_a_merge(self, place: Place, tmp_path: Path) -> None:
        Host(place, tmp_path / "one").back_up(blobs("a"))
        with Host(place, tmp_path / "dead").open() as host:
            host.put(blobs("b"))  # its process dies here
        with Host(place, tmp_path / "two").open() as host:
            assert not host.has(blobs("b")[0])
        with Host(place, tmp_path / "two").open(MAINTENANCE) as host:
            assert host.merge().written == 1
        with Host(place, tmp_path / "three").open() as host:
            assert host.has(blobs("b")[0])

    def test_deltas_are_rebuilt_from_the_packs(self, place: Place, tmp_path: Path) -> None:
        one = Host(place, tmp_path / "one")
        for label in "abc":
            one.back_up(blobs(label))
        with one.open() as host:
            expected = locations(host.index)
        builder = DeltaBuilder()
        builder.add(DeltaPack(next(iter({entry[0] for entry in expected.values()})), 5000, []))
        name, data = builder.encode(1)
        place.storage.create(str(name), data)
        with one.open(MAINTENANCE) as host:
            host.store.rebuild()
            host.store.reconcile()
            host.merge(margin_ms=0, from_packs=True)
            assert len(place.deltas()) == 1
        with Host(place, tmp_path / "two").open(READER) as host:
            assert locations(host.index) == expected


class TestSessions:
    def test_the_packs_of_an_interrupted_session_are_in_the_next_delta_of_its_host(
        self, place: Place, tmp_path: Path
    ) -> None:
        one = Host(place, tmp_path / "one")
        one.back_up(blobs("a"))
        with one.open() as host:
            host.put(blobs("b"))  # its process dies here
        with one.open() as host:
            assert host.put(blobs("b")) == 0
            host.publish()
        with Host(place, tmp_path / "two").open() as host:
            assert host.has(blobs("b")[0])

    def test_a_long_session_publishes_several_deltas(self, place: Place, tmp_path: Path) -> None:
        with Host(place, tmp_path / "one").open() as host:
            host.publisher._session_bytes = 2000
            put_packs(host, "a", 30)
            early = len(place.deltas())
            assert early > 2
            host.publish()
            expected = locations(host.index)
        with Host(place, tmp_path / "two").open() as host:
            assert locations(host.index) == expected

    def test_a_session_that_stored_nothing_publishes_nothing(
        self, place: Place, tmp_path: Path
    ) -> None:
        one = Host(place, tmp_path / "one")
        one.back_up(blobs("a"))
        with one.open() as host:
            assert host.publish() == []


def test_a_blob_that_no_pack_holds_is_missing(tmp_path: Path) -> None:
    with Host(Place(MemoryStorage()), tmp_path / "one").open(WRITER) as host:
        host.publish()
        with pytest.raises(BlobError, match="missing"):
            host.read(b"nothing")


class NoKeys:
    """Sessions of a write-only host, which cannot open what it stored itself."""

    def session(self, session_id: SessionId) -> WriteSession:
        raise KeyMissingError("no identity is given")


class TestWriteOnlyHost:
    """A host that can read no directory publishes from its index what a process that died stored."""

    @staticmethod
    def host(place: Place, folder: Path) -> Host:
        return Host(place, folder, sessions=NoKeys(), session=SESSION, can_read=False)

    @staticmethod
    def require_deltas_as_directories(place: Place, folder: Path) -> dict[PackRef, int]:
        """Require that the deltas say of each pack what its directory says; return the packs' blobs."""
        named = {}
        with Host(place, folder, sessions=OneSession(), session=SESSION).open(READER) as host:
            for name in place.deltas():
                delta = host.sync.reader.read(name, place.storage.size(str(name)))
                assert isinstance(delta, Delta)
                for pack in delta.packs():
                    directory = host.store.read_directory(pack.pack, pack.pack_bytes)
                    assert pack.entries == sorted(directory, key=PackEntry.place)
                    named[pack.pack] = len(pack.entries)
        return named

    def test_a_pack_that_was_indexed_in_part_is_stored_again_and_no_delta_names_a_part_of_it(
        self, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(index_module, "_CHANGED_AT_ONCE", 4)
        monkeypatch.setattr(index_module, "_BLOBS_PER_PAGE", 1)
        writer = self.host(place, tmp_path / "writer")

        def killed(*_: object) -> None:
            raise InterruptedError("killed")

        with writer.open() as host, monkeypatch.context() as patch:
            patch.setattr(Index, "_continue_pack", killed)
            with pytest.raises(InterruptedError):
                host.put(blobs("a", 5))
            (partial,) = host.packs()
            assert host.index.blob_count() == 4
        with writer.open(MAINTENANCE) as host:
            assert not host.packs() and not host.index.has_all_packs
            assert host.put(blobs("a", 5)) == 5
            host.publish()
            (whole,) = host.packs()
            assert host.index.partial_packs() == [] and not host.notes.removed()
        assert self.require_deltas_as_directories(place, tmp_path / "reader") == {whole: 5}
        assert place.storage.size(pack_name(partial)) > 0

    def test_a_pack_that_shares_blobs_with_another_is_published_whole(
        self, place: Place, tmp_path: Path
    ) -> None:
        writer = self.host(place, tmp_path / "writer")
        with writer.open() as host:
            host.put(blobs("a", 3))
            (first,) = host.packs()
            host.index.distrust({record.ordinal for record in host.index.packs()})
            host.put(blobs("a", 5))
            (second,) = host.packs() - {first}
        with writer.open() as host:
            host.publish()
        found = self.require_deltas_as_directories(place, tmp_path / "reader")
        assert found == {first: 3, second: 5}

    def test_a_pack_with_a_damaged_blob_is_left_out_and_the_delta_is_not_complete(
        self, place: Place, tmp_path: Path
    ) -> None:
        writer = self.host(place, tmp_path / "writer")
        with writer.open() as host:
            host.put(blobs("a", 3))
            (record,) = host.index.packs()
            digest, _ = next(host.index.blobs())
        with writer.open() as host:
            host.index.mark_blobs(record.ordinal, [digest])
            host.publisher.publish(everything=True)
            (note,) = host.notes.all().values()
            assert (note.packs, note.is_complete) == (0, False)
            assert [one.pack for one in host.notes.unpublished()] == [record.pack]
        with Host(place, tmp_path / "reader", sessions=OneSession(), session=SESSION).open(
            MAINTENANCE
        ) as host:
            host.publish()
        found = self.require_deltas_as_directories(place, tmp_path / "other")
        assert found == {record.pack: 3}
