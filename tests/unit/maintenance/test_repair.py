"""Repairing snapshots drops what is lost and nothing else; repairing the index finds what there is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from casfs.digest import Digest, SnapshotId, digest_of
from casfs.format.pack import BLOB_HEADER as RECORD_HEADER
from casfs.format.snapshot import Snapshot, decode_snapshot
from casfs.format.tree import CaptureState, ChangeReason, Node, capture_of, captured_digest
from casfs.maintenance.check import Checker
from casfs.maintenance.findings import Finding
from casfs.maintenance.prune import Pruner
from casfs.maintenance.prune_plan import PruneOptions
from casfs.maintenance.repair import (
    IndexRepair,
    RepairResult,
    SnapshotRepairer,
    SwappedSnapshots,
    repair_index,
)
from casfs.maintenance.scrub import PackSelection
from casfs.monitor import RecordingMonitor, Unit
from casfs.repository.opening import OpenOptions, open_for_maintenance, open_for_reading
from casfs.storage.locks import LockMode
from casfs.store.blob_store import pack_name
from casfs.trees.content import EXTENT, HOLE
from casfs.trees.writer import TreeSplit
from tests.support.builders import RepositoryFixture, entry, reference
from tests.support.far_repository import FarRepository
from tests.support.stores import flip, noise, pack_paths

CHUNKS = [noise(f"chunk {number}", 3000) for number in range(4)]
WHOLE = b"".join(CHUNKS)


def of_chunks(*chunks: bytes) -> Node:
    whole = b"".join(chunks)
    records = b"".join(EXTENT.pack(len(chunk), digest_of(chunk)) for chunk in chunks)
    return entry(b"", size=len(whole), content=records, captured=digest_of(whole))


def repair(repo: RepositoryFixture, **options: bool) -> tuple[RepairResult, dict[bytes, str]]:
    """Repair the snapshots; return the result, and the messages by path."""
    monitor = RecordingMonitor()
    with open_for_maintenance(repo.root, "repair", OpenOptions(sync=False)) as repository:
        result = SnapshotRepairer(repository, monitor, **options).repair(PackSelection())
    return result, {problem.path: problem.message for problem in monitor.problems}


def damage(repo: RepositoryFixture) -> list[Finding]:
    """Return the findings of a check in snapshots and in packs that they need."""
    with repo.reading() as repository:
        found = Checker(repository, RecordingMonitor()).check(PackSelection()).damage
    return [one for one in found if one.snapshot is not None]


def only(repo: RepositoryFixture) -> tuple[SnapshotId, Snapshot]:
    with repo.reading() as repository:
        (found,) = repository.snapshots.iterate()
    return found


def nodes(repo: RepositoryFixture) -> dict[bytes, Node]:
    _, snapshot = only(repo)
    with repo.reading() as repository:
        return dict(repository.trees.walk(snapshot.root))


def test_repair_leaves_intact_snapshots_as_they_are(repo: RepositoryFixture) -> None:
    ids = {repo.publish({b"f": b"1"}, time_ns=time_ns)[0] for time_ns in (1, 2)}
    result, reported = repair(repo)
    assert (result.intact, result.repaired, reported) == (2, [], {})
    with repo.reading() as repository:
        assert set(repository.snapshots.ids()) == ids


def test_repair_keeps_the_intact_parts_of_a_file_and_flags_it(repo: RepositoryFixture) -> None:
    repo.store(*CHUNKS)
    old, _ = repo.publish({b"d": {b"f": of_chunks(*CHUNKS)}, b"other": of_chunks(CHUNKS[0])})
    repo.damage(digest_of(CHUNKS[1]))
    repo.damage(digest_of(CHUNKS[2]))
    result, reported = repair(repo)
    (one,) = result.repaired
    assert (one.snapshot_id, one.holed, one.dropped, one.message) == (old, 1, 0, "")
    assert reported.keys() == {b"d/f"}
    assert "3000-9000 of 12000 are lost" in reported[b"d/f"]
    new, snapshot = only(repo)
    assert (new, snapshot.replaces) == (one.new_id, old)
    assert snapshot.root.tree is not None and snapshot.root.tree.flagged == 1
    found = nodes(repo)
    node = found[b"d/f"]
    left = CHUNKS[0] + bytes(6000) + CHUNKS[3]
    assert (node.size, node.state) == (12000, CaptureState.CHANGED)
    assert captured_digest(node) == digest_of(left)
    capture = capture_of(node)
    assert capture is not None
    assert (capture.reason, capture.observed) == (ChangeReason.DAMAGED, digest_of(WHOLE))
    with repo.reading() as repository:
        extents = list(repository.content(node).extents())
        assert [extent.digest is None for extent in extents] == [False, True, True, False]
    assert found[b"other"].state == CaptureState.STABLE
    assert damage(repo) == []


def test_repair_distinguishes_earlier_losses_from_new_ones(repo: RepositoryFixture) -> None:
    """Holes of the source stay holes and are no loss; a second repair keeps the first's evidence."""
    repo.store(*CHUNKS)
    records = EXTENT.pack(5000, HOLE)
    records += b"".join(EXTENT.pack(3000, digest_of(chunk)) for chunk in CHUNKS)
    whole = bytes(5000) + WHOLE
    sparse = entry(b"", size=17000, content=records, captured=digest_of(whole))
    repo.publish({b"f": sparse})
    repo.damage(digest_of(CHUNKS[0]))
    assert "bytes 5000-8000 of 17000" in repair(repo)[1][b"f"]
    repo.damage(digest_of(CHUNKS[3]))
    assert "bytes 14000-17000 of 17000" in repair(repo)[1][b"f"]
    node = nodes(repo)[b"f"]
    left = bytes(8000) + CHUNKS[1] + CHUNKS[2] + bytes(3000)
    assert captured_digest(node) == digest_of(left)
    assert damage(repo) == []


def test_repair_drops_a_file_of_which_nothing_is_left(repo: RepositoryFixture) -> None:
    repo.store(*CHUNKS)
    repo.publish({b"gone": of_chunks(CHUNKS[0]), b"here": of_chunks(CHUNKS[1])})
    repo.damage(digest_of(CHUNKS[0]))
    result, reported = repair(repo)
    assert (result.repaired[0].dropped, result.repaired[0].holed) == (1, 0)
    assert reported == {b"gone": "the file is dropped: none of its data is left"}
    assert nodes(repo).keys() == {b"here"}
    assert damage(repo) == []


def test_repair_empties_a_lost_directory_and_keeps_all_others(repo: RepositoryFixture) -> None:
    plan = {b"a": {b"b": {b"f": b"1", b"g": b"2"}, b"h": b"3"}, b"z": {b"i": b"4"}}
    _, snapshot = repo.publish(plan)
    with repo.reading() as repository:
        lost = repository.trees.resolve(snapshot.root, b"a/b")
    assert lost is not None
    repo.damage(reference(lost))
    result, reported = repair(repo)
    assert result.repaired[0].dropped == 1
    assert reported[b"a/b"].startswith("2 entries of this directory are dropped")
    assert nodes(repo).keys() == {b"a", b"a/b", b"a/h", b"z", b"z/i"}
    assert damage(repo) == []


def test_a_lost_piece_of_a_split_directory_costs_only_its_entries(
    repo: RepositoryFixture,
) -> None:
    names = [b"%03d" % number for number in range(40)]
    repo.split = TreeSplit(min_entries=4, max_entries=8)
    _, snapshot = repo.publish({b"big": dict.fromkeys(names, b"")})
    with repo.reading() as repository:
        big = repository.trees.resolve(snapshot.root, b"big")
        assert big is not None and big.tree is not None
        pieces = repository.trees.piece(big.tree)
        part = pieces[1]
        assert isinstance(part, tuple)
        lost = {node.name for leaf in repository.trees.leaves(part[1]) for node in leaf}
        assert 0 < len(lost) < 40
        piece = Digest(part[1].digest)
    repo.damage(piece)
    repair(repo)
    left = {path.rpartition(b"/")[2] for path in nodes(repo) if b"/" in path}
    assert left == set(names) - lost
    assert damage(repo) == []


def test_repair_sets_an_unreadable_snapshot_aside(repo: RepositoryFixture) -> None:
    junk, _ = repo.publish({b"f": b"1"}, time_ns=1)
    flip(repo.root / "snapshots" / junk.hex(), 50)
    data = (repo.root / "snapshots" / junk.hex()).read_bytes()
    rootless, snapshot = repo.publish({b"g": b"2"}, time_ns=2)
    repo.damage(reference(snapshot.root))
    kept, _ = repo.publish({b"h": b"3"}, time_ns=3)
    result, _ = repair(repo)
    assert {one.snapshot_id for one in result.repaired if one.new_id is None} == {junk, rootless}
    assert only(repo)[0] == kept
    assert (repo.root / "damaged" / junk.hex()).read_bytes() == data
    assert (repo.root / "damaged" / rootless.hex()).exists()
    assert damage(repo) == []


def _exchange(repo: RepositoryFixture, *snapshots: SnapshotId) -> None:
    """Rotate the files of some snapshots."""
    paths = [repo.root / "snapshots" / one.hex() for one in snapshots]
    data = [path.read_bytes() for path in paths]
    for path, other in zip(paths, [*data[1:], data[0]], strict=True):
        path.write_bytes(other)


class _StoppedError(Exception):
    """A process ends here."""


def _listed(repo: RepositoryFixture) -> set[SnapshotId]:
    with repo.reading() as repository:
        return {found for found, _ in repository.snapshots.iterate()}


def test_repair_gives_swapped_snapshots_their_names_back(repo: RepositoryFixture) -> None:
    ids = [repo.publish({b"f": b"%d" % number}, time_ns=number)[0] for number in range(4)]
    _exchange(repo, *ids[:3])
    assert _listed(repo) == {ids[3]}
    foretold, _ = repair(repo, dry_run=True)
    assert _listed(repo) == {ids[3]}
    result, reported = repair(repo)
    assert foretold == result
    assert (result.returned, result.repaired, result.intact) == (sorted(ids[:3]), [], 4)
    assert reported == {}
    assert _listed(repo) == set(ids)
    assert damage(repo) == []
    assert not list((repo.root / "damaged").iterdir())


def test_repair_does_not_take_a_damaged_snapshot_for_a_swapped_one(repo: RepositoryFixture) -> None:
    """Where it is not compressed, one with a changed letter can be read as well."""
    repo.publish({b"kept": b"1"}, time_ns=1, host="here")
    damaged, _ = repo.publish({b"f": b"2"}, time_ns=2, host="there")
    path = repo.root / "snapshots" / damaged.hex()
    data = path.read_bytes()
    payload = zstandard.ZstdDecompressor().decompress(data[16:]) if data[10] else data[16:]
    changed = data[:10] + b"\0" + data[11:16] + payload.replace(b"there", b"where")
    path.write_bytes(changed)
    with repo.reading() as repository:
        name = SnapshotId(digest_of(changed))
        assert decode_snapshot(name, changed, repository.codec).host == "where"
    result, _ = repair(repo)
    assert result.returned == []
    assert [one.snapshot_id for one in result.repaired] == [damaged]
    assert damaged not in _listed(repo) and len(_listed(repo)) == 1


def test_a_half_undone_swap_of_snapshots_is_undone_by_the_next_repair(
    repo: RepositoryFixture,
) -> None:
    ids = [repo.publish({b"f": b"%d" % number}, time_ns=number)[0] for number in range(3)]
    stop = 0
    while True:
        assert _listed(repo) == set(ids)
        _exchange(repo, *ids)
        steps = iter(range(stop))

        def count(step: str, steps: Iterator[int] = steps) -> None:
            if next(steps, None) is None:
                raise _StoppedError(step)

        try:
            with open_for_maintenance(repo.root, "repair") as repository:
                repository.store.storage._on_step = count  # type: ignore[attr-defined]
                SwappedSnapshots(repository).rename_back()
        except _StoppedError:
            repair(repo)
            stop += 1
        else:
            break
    assert stop > 9
    assert _listed(repo) == set(ids)


def test_repair_dry_run_reports_the_same_and_changes_nothing(repo: RepositoryFixture) -> None:
    repo.store(*CHUNKS)
    old, _ = repo.publish({b"f": of_chunks(*CHUNKS), b"gone": of_chunks(CHUNKS[2])})
    repo.damage(digest_of(CHUNKS[2]))
    before = sorted(path for path in repo.root.rglob("*") if "index" not in path.parts)
    foretold, reported = repair(repo, dry_run=True)
    assert (foretold.repaired[0].new_id, only(repo)[0]) == (None, old)
    after = sorted(path for path in repo.root.rglob("*") if "index" not in path.parts)
    assert after == before
    result, printed = repair(repo)
    assert printed == reported
    assert result.repaired[0].holed == foretold.repaired[0].holed == 1


def test_a_repaired_repository_can_be_pruned(repo: RepositoryFixture) -> None:
    repo.store(*CHUNKS)
    repo.publish({b"f": of_chunks(*CHUNKS)})
    repo.damage(digest_of(CHUNKS[0]))
    repair(repo)
    with open_for_maintenance(repo.root, "prune", OpenOptions(sync=False)) as repository:
        Pruner(repository, PruneOptions(unused_share=0.0), RecordingMonitor()).prune()
    assert damage(repo) == []
    with repo.reading() as repository:
        assert Checker(repository, RecordingMonitor()).check(PackSelection()).damage == []


class TestRepairIndex:
    monitor = RecordingMonitor()

    def rebuilt(self, repo: RepositoryFixture) -> IndexRepair:
        self.monitor = RecordingMonitor()
        mode = LockMode.EXCLUSIVE
        with open_for_maintenance(
            repo.root, "repair index", OpenOptions(sync=False), mode=mode
        ) as repository:
            return repair_index(repository, self.monitor)

    def test_the_progress_counts_the_packs_of_how_many(self, repo: RepositoryFixture) -> None:
        for chunk in CHUNKS:
            repo.store(chunk)
        packs = self.rebuilt(repo).packs
        progress = self.monitor.progress
        assert packs == len(CHUNKS)
        assert (progress.stage, progress.unit) == ("reading packs", Unit.PACKS)
        assert (progress.items, progress.total_items) == (packs, packs)

    def entries(self, repo: RepositoryFixture) -> dict[bytes, tuple[bytes, int, int]]:
        with repo.reading() as repository:
            index = repository.store.index
            return {
                digest: (index.pack_ref(place.pack).id, place.offset, place.stored_bytes)
                for digest, place in index.blobs()
            }

    @pytest.mark.parametrize("index", ["sound", "deleted", "junk"])
    def test_repair_index_builds_the_index_from_the_packs_alone(
        self, repo: RepositoryFixture, index: str
    ) -> None:
        repo.store(*CHUNKS)
        repo.publish({b"f": of_chunks(*CHUNKS)})
        before = self.entries(repo)
        if index == "deleted":
            shutil.rmtree(repo.root / "index")
        elif index == "junk":
            (repo.root / "index" / "data.mdb").write_bytes(noise("junk", 100_000))
        result = self.rebuilt(repo)
        assert (result.packs, result.blobs) == (2, len(before))
        assert (result.salvaged, result.unreadable) == ([], [])
        assert self.entries(repo) == before

    def test_repair_index_finds_the_intact_blobs_of_a_pack_with_a_damaged_directory(
        self, repo: RepositoryFixture
    ) -> None:
        repo.store(*CHUNKS)
        before = self.entries(repo)
        (path,) = pack_paths(repo.root)
        flip(path, -100)
        flip(path, before[digest_of(CHUNKS[2])][1] + 5)
        result = self.rebuilt(repo)
        assert [pack.hex() for pack in result.salvaged] == [path.name]
        del before[digest_of(CHUNKS[2])]
        found = self.entries(repo)
        assert {digest: found[digest] for digest in before} == before
        with repo.reading() as repository:
            assert repository.store.read(digest_of(CHUNKS[3])) == CHUNKS[3]

    def test_repair_index_leaves_out_only_a_pack_that_cannot_be_read(
        self, repo: RepositoryFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        repo.store(CHUNKS[0])
        repo.store(CHUNKS[1])
        bad = pack_paths(repo.root)[0]
        data = bad.read_bytes()
        bad.unlink()
        bad.mkdir()  # reading it is an error of the system's
        try:
            result = self.rebuilt(repo)
        finally:
            bad.rmdir()
            bad.write_bytes(data)
        assert result.blobs == 1
        # The next process that opens the repository finds it again.
        with repo.reading() as repository:
            assert {repository.store.read(digest_of(chunk)) for chunk in CHUNKS[:2]} == {
                *CHUNKS[:2]
            }

    def test_repair_index_keeps_verification_times_and_damage_marks(
        self, repo: RepositoryFixture
    ) -> None:
        repo.store(*CHUNKS)
        repo.store(noise("other", 100))
        repo.damage(digest_of(CHUNKS[1]))
        with open_for_reading(repo.root, may_write_index=True) as repository:
            Checker(repository, RecordingMonitor()).check(PackSelection())
        self.rebuilt(repo)
        with repo.reading() as repository:
            index = repository.store.index
            assert index.are_stored([digest_of(chunk) for chunk in CHUNKS]) == [
                True,
                False,
                True,
                True,
            ]
            assert sorted(record.verified_s > 0 for record in index.packs()) == [False, True]


def test_repair_reads_one_file_only_where_something_is_lost(repo: RepositoryFixture) -> None:
    """Intact data is not read again: a repair reads what is lost, and the check before it."""
    repo.store(*CHUNKS)
    repo.publish({b"bad": {b"f": of_chunks(CHUNKS[0])}, b"good": {b"g": of_chunks(CHUNKS[1])}})
    repo.damage(digest_of(CHUNKS[0]))
    with open_for_reading(repo.root, may_write_index=True) as repository:
        Checker(repository, RecordingMonitor()).check(PackSelection())
    with open_for_maintenance(repo.root, "repair", OpenOptions(sync=False)) as repository:
        SnapshotRepairer(repository, RecordingMonitor()).repair()
        counts = repository.store.verified
        intact = repository.store.locate(digest_of(CHUNKS[1]))
        assert intact.ordinal not in counts._blobs


def test_a_rebuilt_index_keeps_what_it_knew_and_is_correct(
    repo: RepositoryFixture,
) -> None:
    """With the directory damaged, and a record too, only the index knows where its blob is."""
    chunks = [noise(f"chunk {number}", 3000) for number in range(3)]
    repo.store(*chunks)
    (path,) = pack_paths(repo.root)
    with repo.reading() as repository:
        places = [repository.store.locate(digest_of(chunk)) for chunk in chunks]
    flip(path, -1)
    flip(path, places[0].offset - RECORD_HEADER.size)
    flip(path, places[1].offset - RECORD_HEADER.size)
    flip(path, places[1].offset + 100)
    with repo.writing() as repository:
        repository.store.rebuild()
        assert repository.store.read(digest_of(chunks[0])) == chunks[0]
        assert repository.store.read(digest_of(chunks[2])) == chunks[2]
        assert repository.store.index.are_stored([digest_of(chunk) for chunk in chunks]) == [
            *(True, False, True),
        ]


class TestOtherHosts:
    """Repair beside hosts that publish snapshots over a network."""

    def test_a_snapshot_that_another_host_publishes_meanwhile_is_not_taken_for_damaged(
        self, tmp_path: Path, own_home: Path
    ) -> None:
        far = FarRepository(tmp_path)
        first = far.back_up("first", a=noise("a", 50_000))
        with open_for_maintenance(
            far.host("repairer"), "repair snapshots", OpenOptions(sync=False)
        ) as repository:
            other = far.back_up("other", host="other", b=noise("b", 50_000))
            result = SnapshotRepairer(repository, RecordingMonitor()).repair()
        assert result.repaired == []
        with far.writing() as repository:
            assert set(repository.snapshots.ids()) == {first, other}
        far.require_whole()

    def test_a_snapshot_that_lost_data_is_replaced(self, tmp_path: Path, own_home: Path) -> None:
        far = FarRepository(tmp_path)
        lost = far.back_up("lost", a=noise("a", 50_000), b=noise("b", 50_000))
        kept = far.back_up("kept", host="other", c=noise("c", 50_000))
        with far.writing() as repository:
            at = repository.store.locate(digest_of(noise("a", 50_000)))
            name = pack_name(repository.store.index.pack_ref(at.pack))
        far.memory.delete(name)
        with open_for_maintenance(
            far.host("repairer"), "repair snapshots", OpenOptions(sync=False)
        ) as repository:
            (repaired,) = SnapshotRepairer(repository, RecordingMonitor()).repair().repaired
        assert repaired.snapshot_id == lost
        with far.writing() as repository:
            assert kept in repository.snapshots.ids()
            assert lost not in repository.snapshots.ids()
        far.require_whole()
