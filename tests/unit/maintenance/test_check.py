"""Check: whatever is wrong is found and named, by pack and blob and by the files that lose by it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from casfs.digest import Digest, SnapshotId, digest_of
from casfs.errors import StorageError
from casfs.format.codec import BlobKind
from casfs.format.pack import PackEntry
from casfs.format.tree import (
    Capture,
    CaptureState,
    ChangeReason,
    Node,
    NodeExtra,
    NodeType,
    TreeRef,
    replace,
)
from casfs.index.schema import IndexedPack
from casfs.maintenance import pack_verification
from casfs.maintenance.check import Checker, CheckResult
from casfs.maintenance.findings import Finding
from casfs.maintenance.repair import SnapshotRepairer
from casfs.maintenance.scrub import PackSelection
from casfs.monitor import RecordingMonitor
from casfs.repository.opening import open_for_maintenance
from casfs.repository.repository import Repository
from casfs.storage.local import LocalStorage
from casfs.store.blob_store import BlobStore
from casfs.trees import walk
from casfs.trees.content import EXTENT, HOLE, ContentWriter
from tests.support.builders import (
    Plan,
    RepositoryFixture,
    TreeFixture,
    entry,
    file,
    flagged,
    reference,
)
from tests.support.stores import add_pack, flip, make_pack, noise, pack_paths

CHUNKS = [noise(f"chunk {number}", 3000) for number in range(4)]


@pytest.fixture
def repo(tmp_path: Path) -> RepositoryFixture:
    return RepositoryFixture(tmp_path)


def of_chunks(*chunks: bytes, size: int | None = None, **fields: Any) -> Node:
    """Return the node of a file that consists of several chunks."""
    whole = b"".join(chunks)
    records = b"".join(EXTENT.pack(len(chunk), digest_of(chunk)) for chunk in chunks)
    size = len(whole) if size is None else size
    return entry(b"", size=size, content=records, captured=digest_of(whole), **fields)


def store(repo: RepositoryFixture, chunks: Iterable[bytes], kind: BlobKind = BlobKind.DATA) -> None:
    """Store chunks in a pack of their own."""
    with repo.writing() as repository:
        writer = repository.writer()
        for chunk in chunks:
            writer.put(kind, digest_of(chunk), chunk)
        writer.finish()


def check(repo: RepositoryFixture, read_data: bool = False, share: float = 1.0) -> CheckResult:
    with repo.reading() as repository:
        choice = PackSelection(share) if read_data else None
        return Checker(repository, RecordingMonitor()).check(choice)


def damage(repo: RepositoryFixture, what: str, read_data: bool = False) -> list[Finding]:
    """Return the damage of one kind that a check finds."""
    return [found for found in check(repo, read_data).damage if found.what == what]


def pack_with(repo: RepositoryFixture, data: bytes) -> Path:
    (path,) = [path for path in pack_paths(repo.root) if data in path.read_bytes()]
    return path


class TestIntactRepository:
    def test_check_counts_what_an_intact_repository_holds(self, repo: RepositoryFixture) -> None:
        store(repo, CHUNKS)
        repo.publish({b"a": of_chunks(*CHUNKS[:2]), b"d": {b"f": b"1"}, b"l": flagged(file(b""))})
        repo.publish({b"b": of_chunks(*CHUNKS), b"d": {b"f": b"1"}})
        structure, whole = check(repo), check(repo, read_data=True)
        for result in (structure, whole):
            assert result.damage == []
            assert (result.snapshots, result.trees, result.flagged) == (2, 3, 1)
            # The directory that both share is walked once.
            assert result.files == 4
            assert result.packs == 3
        assert (structure.packs_read, structure.read_bytes, structure.blobs_read) == (0, 0, 0)
        assert whole.packs_read == 3
        assert whole.read_bytes == sum(path.stat().st_size for path in pack_paths(repo.root))
        assert whole.blobs_read == 4 + 3 + 1

    def test_check_finds_no_damage_in_an_empty_repository(self, repo: RepositoryFixture) -> None:
        assert check(repo, read_data=True) == CheckResult()
        repo.publish({})
        assert check(repo, read_data=True).damage == []

    def test_check_accepts_holes_and_all_kinds_of_entries(self, repo: RepositoryFixture) -> None:
        store(repo, CHUNKS[:1])
        records = EXTENT.pack(1 << 40, HOLE) + EXTENT.pack(3000, digest_of(CHUNKS[0]))
        whole = b"\x01" * 32
        sparse = entry(b"", size=(1 << 40) + 3000, content=records, captured=whole)
        repo.publish({b"s": sparse, b"l": entry(b"", NodeType.SYMLINK, content=b"x")})
        assert check(repo, read_data=True).damage == []


class TestDamagedBlob:
    def test_check_finds_a_damaged_blob_by_reading_and_names_its_pack(
        self, repo: RepositoryFixture
    ) -> None:
        store(repo, CHUNKS)
        repo.publish({b"f": b"1"})
        repo.damage(digest_of(CHUNKS[2]))
        pack = pack_with(repo, CHUNKS[0]).name
        assert check(repo).damage == []
        (blob,) = damage(repo, "blob", read_data=True)
        assert blob.blob == digest_of(CHUNKS[2])
        assert blob.pack is not None and blob.pack.hex() == pack
        assert "digest" in blob.message
        (whole,) = damage(repo, "pack", read_data=True)
        assert whole.pack == blob.pack

    def test_check_names_every_file_and_range_of_a_damaged_blob_in_every_snapshot(
        self, repo: RepositoryFixture
    ) -> None:
        store(repo, CHUNKS)
        bad, intact = of_chunks(*CHUNKS), of_chunks(*CHUNKS[:2])
        ids = {
            repo.publish({b"d": {b"bad": bad, b"sound": intact}}, time_ns=1)[0],
            repo.publish({b"d": {b"bad": bad, b"sound": intact}, b"x": b""}, time_ns=2)[0],
            repo.publish({b"other": of_chunks(*CHUNKS[2:], CHUNKS[2])}, time_ns=3)[0],
        }
        repo.damage(digest_of(CHUNKS[2]))
        found = damage(repo, "file", read_data=True)
        assert {file.snapshot for file in found} == ids
        assert sorted((file.path, file.ranges) for file in found) == [
            (b"d/bad", ((6000, 9000),)),
            (b"d/bad", ((6000, 9000),)),
            (b"other", ((0, 3000), (6000, 9000))),
        ]
        assert all(file.blob == digest_of(CHUNKS[2]) for file in found)
        assert "6000-9000 of 12000" in found[0].message

    def test_a_damaged_tree_names_its_directory_and_affects_no_other(
        self, repo: RepositoryFixture
    ) -> None:
        plan: Plan = {b"a": {b"b": {b"f": b""}}, b"z": {b"f": of_chunks(CHUNKS[0])}}
        _, snapshot = repo.publish(plan)
        with repo.reading() as repository:
            node = repository.trees.resolve(snapshot.root, b"a/b")
            assert node is not None
        repo.damage(reference(node))
        found = damage(repo, "tree", read_data=True)
        assert [tree.path for tree in found] == [b"a/b"]
        assert found[0].blob == reference(node)
        assert found[0].pack is not None
        assert [lost.path for lost in damage(repo, "file", read_data=True)] == [b"z/f"]
        # A tree is read even without reading data, and a blob of it is verified wherever it is.
        assert [tree.path for tree in damage(repo, "tree")] == [b"a/b"]

    def test_check_finds_a_missing_blob_without_reading(self, repo: RepositoryFixture) -> None:
        store(repo, CHUNKS[:1])
        snapshot_id, _ = repo.publish({b"f": of_chunks(*CHUNKS[:3])})
        (lost,) = damage(repo, "file")
        assert (lost.snapshot, lost.path) == (snapshot_id, b"f")
        assert lost.ranges == ((3000, 6000), (6000, 9000))

    def test_a_damaged_blob_affects_no_file_where_the_index_names_another_copy(
        self, repo: RepositoryFixture
    ) -> None:
        store(repo, CHUNKS)
        second = add_pack(repo.root, make_pack(reversed(CHUNKS))[0])
        repo.publish({b"f": of_chunks(*CHUNKS)})
        path = next(p for p in pack_paths(repo.root) if p.name == second.id.hex())
        flip(path, path.read_bytes().index(CHUNKS[1]))
        found = check(repo, read_data=True).damage
        assert {d.what for d in found} == {"blob", "pack"}
        assert {d.pack for d in found} == {second.id}

    @pytest.mark.parametrize("window", [64, 1000, 1 << 23])
    def test_check_finds_a_damaged_blob_wherever_its_pack_is_read_in_windows(
        self, repo: RepositoryFixture, window: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pack_verification, "_WINDOW_BYTES", window)
        chunks = [noise(f"{size}", size) for size in (0, 1, 100, 5000, 64, 20_000)]
        store(repo, chunks)
        assert check(repo, read_data=True).damage == []
        for chunk in chunks[1:]:
            repo.damage(digest_of(chunk))
            assert [found.blob for found in damage(repo, "blob", True)] == [digest_of(chunk)]
            repo.damage(digest_of(chunk))
        assert check(repo, read_data=True).damage == []

    @pytest.mark.parametrize("place", [9, 12, 16 + 6, -20, -70])
    def test_check_finds_a_flipped_bit_outside_all_blobs_by_the_name_of_the_pack(
        self, repo: RepositoryFixture, place: int
    ) -> None:
        store(repo, CHUNKS)
        (path,) = pack_paths(repo.root)
        flip(path, place)
        found = check(repo, read_data=True).damage
        assert found
        assert {d.what for d in found} == {"pack"}
        assert {d.pack.hex() for d in found if d.pack is not None} == {path.name}


class TestDamagedPack:
    def test_a_lost_pack_names_every_file_without_reading_data(
        self, repo: RepositoryFixture
    ) -> None:
        store(repo, CHUNKS[:2])
        store(repo, CHUNKS[2:])
        repo.publish({b"both": of_chunks(*CHUNKS), b"sound": of_chunks(*CHUNKS[2:])})
        path = pack_with(repo, CHUNKS[0])
        path.unlink()
        (pack,) = damage(repo, "pack")
        assert pack.pack is not None and pack.pack.hex() == path.name
        assert "missing" in pack.message
        (lost,) = damage(repo, "file")
        assert (lost.path, lost.ranges) == (b"both", ((0, 3000), (3000, 6000)))

    def test_a_cut_pack_names_the_ranges_behind_the_cut(self, repo: RepositoryFixture) -> None:
        store(repo, CHUNKS)
        repo.publish({b"f": of_chunks(*CHUNKS)})
        path = pack_with(repo, CHUNKS[0])
        os.truncate(path, path.read_bytes().index(CHUNKS[2]) + 100)
        (lost,) = damage(repo, "file")
        assert lost.ranges == ((6000, 9000), (9000, 12000))
        assert any("were stored" in pack.message for pack in damage(repo, "pack"))

    def test_a_lost_pack_with_trees_names_the_directories(self, repo: RepositoryFixture) -> None:
        snapshot_id, _ = repo.publish({b"d": {}})
        pack_paths(repo.root)[0].unlink()
        (tree,) = damage(repo, "tree")
        assert (tree.snapshot, tree.path) == (snapshot_id, b"")

    def test_a_pack_with_a_damaged_directory_affects_no_file(self, repo: RepositoryFixture) -> None:
        store(repo, CHUNKS)
        repo.publish({b"f": of_chunks(*CHUNKS)})
        flip(pack_with(repo, CHUNKS[0]), -1)
        assert {found.what for found in check(repo, read_data=True).damage} == {"pack"}

    def test_a_file_that_is_no_pack_is_named(self, repo: RepositoryFixture) -> None:
        repo.publish({b"f": b"1"})
        pack = add_pack(repo.root, noise("junk", 500))
        assert {found.pack for found in check(repo).damage} == {pack.id}


def fail_reads_of(monkeypatch: pytest.MonkeyPatch, pack: Path, code: int) -> None:
    read = LocalStorage.read

    def fail(self: LocalStorage, name: str, offset: int = 0, size: int | None = None) -> bytes:
        if name.endswith(pack.name):
            raise StorageError("read", name, OSError(code, os.strerror(code)))
        return read(self, name, offset, size)

    monkeypatch.setattr(LocalStorage, "read", fail)


@pytest.mark.parametrize("read_data", [False, True])
@pytest.mark.parametrize(
    "code", [errno.EACCES, errno.EPERM, errno.EIO], ids=["eacces", "eperm", "eio"]
)
class TestPackThatCannotBeRead:
    """A disk that fails is damage; a pack that this user has no permission to read is none."""

    def test_check_names_every_file_with_data_in_it_in_every_snapshot(
        self, repo: RepositoryFixture, monkeypatch: pytest.MonkeyPatch, code: int, read_data: bool
    ) -> None:
        store(repo, CHUNKS[:1])
        store(repo, CHUNKS[1:2])
        both, other = of_chunks(*CHUNKS[:2]), of_chunks(CHUNKS[0])
        plan = {b"d": {b"both": both, b"one": of_chunks(CHUNKS[1]), b"other": other}}
        ids = [repo.publish(plan, host=host)[0] for host in ("here", "there")]
        pack = pack_with(repo, CHUNKS[1])
        fail_reads_of(monkeypatch, pack, code)
        result = check(repo, read_data)
        found, none = result.unreadable, result.damage
        if code == errno.EIO:
            found, none = none, found
        assert none == []
        assert {one.pack for one in found if one.what == "pack"} == {bytes.fromhex(pack.name)}
        files = {(one.snapshot, one.path): one.ranges for one in found if one.what == "file"}
        ranges = {b"d/both": ((3000, 6000),), b"d/one": ((0, 3000),)}
        assert files == {(name, path): ranges[path] for name in ids for path in ranges}

    def test_check_names_the_directory_in_every_snapshot_and_a_repair_of_another_loss_keeps_it(
        self, repo: RepositoryFixture, monkeypatch: pytest.MonkeyPatch, code: int, read_data: bool
    ) -> None:
        store(repo, CHUNKS[:1])
        trees = TreeFixture()
        tree = trees.build({b"f": b""})
        assert tree.tree is not None
        digest = Digest(tree.tree.digest)
        store(repo, [trees.blobs[digest]], BlobKind.TREE)
        (pack,) = set(pack_paths(repo.root)) - {pack_with(repo, CHUNKS[0])}
        lost = of_chunks(CHUNKS[3])
        first, _ = repo.publish({b"d": {b"f": b""}, b"lost": lost, b"kept": of_chunks(CHUNKS[0])})
        second, _ = repo.publish({b"above": {b"d": {b"f": b""}}})
        third, _ = repo.publish({b"above": {b"d": {b"f": b""}}})
        with monkeypatch.context() as patch:
            fail_reads_of(patch, pack, code)
            result = check(repo, read_data)
            is_damage = code == errno.EIO
            found = result.damage if is_damage else result.unreadable
            assert {(one.snapshot, one.path) for one in found if one.what == "tree"} == {
                (first, b"d"),
                (second, b"above/d"),
                (third, b"above/d"),
            }
            assert bool(result.unreadable) != is_damage
            assert {one.path for one in result.damage if one.what == "file"} == {b"lost"}
            if is_damage:
                return
            with open_for_maintenance(repo.root, "repair snapshots") as repository:
                monitor = RecordingMonitor()
                repaired = SnapshotRepairer(repository, monitor).repair(
                    PackSelection() if read_data else None
                )
            assert [one.snapshot_id for one in repaired.repaired] == [first]
            assert [problem.path for problem in monitor.problems] == [b"lost"]
        assert check(repo, read_data=True).damage == []


class TestWrongIndex:
    def rebuilt(
        self, repo: RepositoryFixture, change: Any, needed: Sequence[bytes] = CHUNKS
    ) -> list[Finding]:
        """Check with an index in which one entry of the only pack is something else."""
        store(repo, CHUNKS)
        with repo.writing() as repository:
            ((pack, size),) = repository.store.stored_packs()
            entries = repository.store.read_directory(pack, size)
            packs: list[IndexedPack] = [(pack, size, change(entries))]
            repository.store.index.rebuild(lambda: packs)
        repo.publish({b"f": of_chunks(*needed)})
        return check(repo).damage

    @pytest.mark.parametrize(
        "fields", [{"offset": 999}, {"stored_bytes": 999}, {"plain_bytes": 999}]
    )
    def test_check_finds_an_index_entry_with_a_wrong_location(
        self, repo: RepositoryFixture, fields: dict[str, int]
    ) -> None:
        def change(entries: list[PackEntry]) -> list[PackEntry]:
            return [entries[0]._replace(**fields), *entries[1:]]  # type: ignore[arg-type]

        found = [d for d in self.rebuilt(repo, change) if d.what == "index"]
        assert [d.blob for d in found] == [digest_of(CHUNKS[0])]
        assert "its location of the blob differs" in found[0].message

    def test_check_finds_a_needed_blob_that_the_index_does_not_have(
        self, repo: RepositoryFixture
    ) -> None:
        found = self.rebuilt(repo, lambda entries: entries[1:])
        # Nothing is lost: who reads the file looks into the packs themselves.
        assert [(d.what, d.blob) for d in found] == [("index", digest_of(CHUNKS[0]))]

    def test_check_ignores_an_unneeded_blob_that_the_index_does_not_have(
        self, repo: RepositoryFixture
    ) -> None:
        """That is left where two backups have stored a blob, and one of the packs was removed since."""
        assert self.rebuilt(repo, lambda entries: entries[1:], needed=CHUNKS[1:]) == []

    def test_check_finds_an_index_entry_that_no_pack_holds(self, repo: RepositoryFixture) -> None:
        phantom = PackEntry(digest_of(b"phantom"), 500, 5, 5, 1, 0)
        (found,) = self.rebuilt(repo, lambda entries: [*entries, phantom])
        assert found.what == "index"
        assert "no pack holds" in found.message


class TestDamagedSnapshot:
    def test_check_names_a_damaged_snapshot_and_checks_the_others(
        self, repo: RepositoryFixture
    ) -> None:
        first, _ = repo.publish({b"f": b"1"}, time_ns=1)
        repo.publish({b"g": of_chunks(CHUNKS[0])}, time_ns=2)
        flip(repo.root / "snapshots" / first.hex(), -1)
        found = check(repo).damage
        assert {d.what for d in found} == {"snapshot", "file"}
        assert [d.snapshot for d in found if d.what == "snapshot"] == [first]


class TestContradictions:
    """Data that verify, but contradict each other: no casfs has written them."""

    def lying(self, repo: RepositoryFixture, node: Node) -> Finding:
        store(repo, CHUNKS)
        snapshot_id, _ = repo.publish({b"lie": node, b"truth": of_chunks(*CHUNKS)})
        (found,) = check(repo, read_data=True).damage
        assert (found.what, found.snapshot, found.path) == ("file", snapshot_id, b"lie")
        return found

    @pytest.mark.parametrize("size", [0, 11_999, 12_001])
    def test_check_finds_a_wrong_file_size(self, repo: RepositoryFixture, size: int) -> None:
        found = self.lying(repo, of_chunks(*CHUNKS, size=size))
        assert f"12000 bytes, captured were {size}" in found.message

    def test_check_finds_a_wrong_chunk_length(self, repo: RepositoryFixture) -> None:
        records = EXTENT.pack(2999, digest_of(CHUNKS[0]))
        found = self.lying(repo, entry(b"", size=2999, content=records))
        assert "chunk length mismatch" in found.message

    def test_check_finds_a_flagged_file_without_evidence(self, repo: RepositoryFixture) -> None:
        found = self.lying(repo, replace(file(b"", CHUNKS[0]), state=CaptureState.CHANGED))
        assert "capture record is missing" in found.message

    def test_check_finds_a_stable_file_that_two_reads_saw_differently(
        self, repo: RepositoryFixture
    ) -> None:
        extra = NodeExtra(capture=Capture(ChangeReason.NONE, 2, digest_of(b"something else")))
        found = self.lying(repo, replace(file(b"", CHUNKS[0]), extra=extra))
        assert "two reads saw different data" in found.message

    @pytest.mark.parametrize(
        "change", [{"nodes": 9}, {"total_bytes": 5}, {"flagged": 1}, {"nodes": 0, "flagged": 0}]
    )
    def test_check_finds_a_wrong_summary_of_a_directory(
        self, repo: RepositoryFixture, change: dict[str, int]
    ) -> None:
        with repo.writing() as repository:
            writer = repository.writer()
            leaf = b"\x92\x00\x91" + _encoded(file(b"f"))
            writer.put(BlobKind.TREE, digest_of(leaf), leaf)
            writer.finish()
        ref = replace(TreeRef(digest_of(leaf), 1, 0, 0), **change)
        repo.publish({b"lie": entry(b"", NodeType.DIRECTORY, tree=ref)})
        (found,) = check(repo).damage
        assert (found.what, found.path) == ("tree", b"lie")
        assert "summary" in found.message

    def test_check_finds_a_blob_of_another_kind(self, repo: RepositoryFixture) -> None:
        store(repo, CHUNKS)
        ref = TreeRef(digest_of(CHUNKS[0]), 1, 0, 0)
        repo.publish({b"lie": entry(b"", NodeType.DIRECTORY, tree=ref)})
        (found,) = check(repo).damage
        assert (found.what, found.path) == ("tree", b"lie")

    def test_check_stops_at_the_depth_bound(
        self, repo: RepositoryFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(walk, "MAX_DEPTH", 20)
        plan: Plan = {b"f": b""}
        for _ in range(30):
            plan = {b"d": plan}
        repo.publish(plan)
        (found,) = check(repo).damage
        assert found.what == "tree"
        assert "more than 20 levels deep" in found.message
        assert found.path is not None and found.path.count(b"/") == 19


def _encoded(node: Node) -> bytes:
    from casfs.format.tree import encode_node

    return encode_node(node)


class TestLongContentList:
    def publish_long(self, repo: RepositoryFixture) -> tuple[SnapshotId, Node]:
        """Publish a file of 1,000 chunks in lists of about 300."""
        with repo.writing() as repository:
            writer = repository.writer()
            content = ContentWriter(writer.put, digest_of)
            chunks = [b"chunk %d" % number for number in range(1000)]
            for chunk in chunks:
                writer.put(BlobKind.DATA, digest_of(chunk), chunk)
                content.add(len(chunk), digest_of(chunk))
            records, levels = content.finish()
            writer.finish()
        assert levels == 1
        whole = b"".join(chunks)
        node = entry(
            b"", size=len(whole), content=records, levels=levels, captured=digest_of(whole)
        )
        return repo.publish({b"long": node})[0], node

    def test_check_reads_long_content_lists(self, repo: RepositoryFixture) -> None:
        self.publish_long(repo)
        assert check(repo, read_data=True).damage == []

    def test_a_content_list_that_lost_a_piece_names_its_range(
        self, repo: RepositoryFixture
    ) -> None:
        snapshot_id, node = self.publish_long(repo)
        length, digest = EXTENT.unpack_from(node.content)
        repo.damage(Digest(digest))
        (lost,) = damage(repo, "file", read_data=True)
        assert (lost.snapshot, lost.path) == (snapshot_id, b"long")
        assert lost.ranges == ((0, length),)


class TestReadShare:
    def test_a_share_reads_the_same_packs_every_time_and_grows_to_all(
        self, repo: RepositoryFixture
    ) -> None:
        for number in range(12):
            store(repo, [noise(f"pack {number}", 200)])
        read = [check(repo, True, share).packs_read for share in (0.0, 0.3, 0.6, 1.0)]
        assert read == sorted(read)
        assert (read[0], read[-1]) == (0, 12)
        assert 0 < read[1] < 12
        assert check(repo, True, 0.3).packs_read == read[1]

    def test_a_share_finds_damage_once_it_includes_the_damaged_pack(
        self, repo: RepositoryFixture
    ) -> None:
        store(repo, CHUNKS)
        repo.damage(digest_of(CHUNKS[0]))
        assert check(repo, True, 0.0).damage == []
        assert check(repo, True, 1.0).damage != []


class TestConcurrentBackup:
    """What is stored while a check runs is no damage."""

    def meanwhile(
        self, repo: RepositoryFixture, monkeypatch: pytest.MonkeyPatch, indexed: bool
    ) -> None:
        names = BlobStore.stored_packs
        data, entries = make_pack([b"stored meanwhile"])

        def stored_packs(store: BlobStore) -> Any:
            monkeypatch.setattr(BlobStore, "stored_packs", names)
            pack = add_pack(repo.root, data)
            if indexed:
                store.index.add_packs([(pack, len(data), entries)])
            return names(store)

        with repo.writing() as repository:
            monkeypatch.setattr(BlobStore, "stored_packs", stored_packs)
            self.result = self.checked(repository)

    def checked(self, repository: Repository) -> CheckResult:
        return Checker(repository, RecordingMonitor()).check(PackSelection())

    @pytest.mark.parametrize("indexed", [True, False])
    def test_check_finds_no_damage_in_a_pack_that_a_backup_adds_meanwhile(
        self, repo: RepositoryFixture, monkeypatch: pytest.MonkeyPatch, indexed: bool
    ) -> None:
        repo.publish({b"f": b"1"})
        self.meanwhile(repo, monkeypatch, indexed)
        assert self.result.damage == []
        assert self.result.packs_read == 2
