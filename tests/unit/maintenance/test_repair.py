"""Repairing snapshots drops what is lost and nothing else; repairing the index finds what there is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import zstandard

from casfs.digest import Digest, SnapshotId, digest_of
from casfs.format.pack import BLOB_HEADER as RECORD_HEADER
from casfs.format.snapshot import Snapshot, decode_snapshot
from casfs.format.tree import CaptureState, ChangeReason, Node, capture_of, captured_digest
from casfs.maintenance.check import Checker
from casfs.maintenance.prune import PruneOptions, Pruner
from casfs.maintenance.repair import (
    IndexRepair,
    RepairResult,
    SnapshotRepairer,
    SwappedSnapshots,
    repair_index,
)
from casfs.maintenance.scrub import Finding, PackSelection
from casfs.monitor import RecordingMonitor
from casfs.repository.opening import OpenOptions, open_for_maintenance, open_for_reading
from casfs.storage.locks import LockMode
from casfs.trees import writer
from casfs.trees.content import EXTENT, HOLE
from tests.support.builders import Keeper, entry, reference
from tests.support.stores import flip, noise, pack_paths

CHUNKS = [noise(f"chunk {number}", 3000) for number in range(4)]
WHOLE = b"".join(CHUNKS)


def of_chunks(*chunks: bytes) -> Node:
    whole = b"".join(chunks)
    records = b"".join(EXTENT.pack(len(chunk), digest_of(chunk)) for chunk in chunks)
    return entry(b"", size=len(whole), content=records, captured=digest_of(whole))


def repair(keeper: Keeper, **options: bool) -> tuple[RepairResult, dict[bytes, str]]:
    """Repair the snapshots; return what came of it, and what was told of which path."""
    monitor = RecordingMonitor()
    with open_for_maintenance(keeper.root, "repair", OpenOptions(sync=False)) as repository:
        result = SnapshotRepairer(repository, monitor, **options).repair(PackSelection())
    return result, {problem.path: problem.message for problem in monitor.problems}


def damage(keeper: Keeper) -> list[Finding]:
    """Return what a check finds in snapshots and in packs that they need."""
    with keeper.reading() as repository:
        found = Checker(repository, RecordingMonitor()).check(PackSelection()).damage
    return [one for one in found if one.snapshot is not None]


def only(keeper: Keeper) -> tuple[SnapshotId, Snapshot]:
    with keeper.reading() as repository:
        (found,) = repository.snapshots.iterate()
    return found


def nodes(keeper: Keeper) -> dict[bytes, Node]:
    _, snapshot = only(keeper)
    with keeper.reading() as repository:
        return dict(repository.trees.walk(snapshot.root))


def test_repair_leaves_intact_snapshots_as_they_are(keeper: Keeper) -> None:
    ids = {keeper.publish({b"f": b"1"}, time_ns=time_ns)[0] for time_ns in (1, 2)}
    result, told = repair(keeper)
    assert (result.intact, result.repaired, told) == (2, [], {})
    with keeper.reading() as repository:
        assert set(repository.snapshots.ids()) == ids


def test_repair_keeps_the_intact_parts_of_a_file_and_flags_it(keeper: Keeper) -> None:
    keeper.store(*CHUNKS)
    old, _ = keeper.publish({b"d": {b"f": of_chunks(*CHUNKS)}, b"other": of_chunks(CHUNKS[0])})
    keeper.damage(digest_of(CHUNKS[1]))
    keeper.damage(digest_of(CHUNKS[2]))
    result, told = repair(keeper)
    (one,) = result.repaired
    assert (one.snapshot_id, one.holed, one.dropped, one.message) == (old, 1, 0, "")
    assert told.keys() == {b"d/f"}
    assert "3000-9000 of 12000 are lost" in told[b"d/f"]
    new, snapshot = only(keeper)
    assert (new, snapshot.replaces) == (one.new_id, old)
    assert snapshot.root.tree is not None and snapshot.root.tree.flagged == 1
    found = nodes(keeper)
    node = found[b"d/f"]
    left = CHUNKS[0] + bytes(6000) + CHUNKS[3]
    assert (node.size, node.state) == (12000, CaptureState.CHANGED)
    assert captured_digest(node) == digest_of(left)
    capture = capture_of(node)
    assert capture is not None
    assert (capture.reason, capture.observed) == (ChangeReason.DAMAGED, digest_of(WHOLE))
    with keeper.reading() as repository:
        extents = list(repository.content(node).extents())
        assert [extent.digest is None for extent in extents] == [False, True, True, False]
    assert found[b"other"].state == CaptureState.STABLE
    assert damage(keeper) == []


def test_repair_distinguishes_earlier_losses_from_new_ones(keeper: Keeper) -> None:
    """Holes of the source stay holes and are no loss; a second repair keeps the first's evidence."""
    keeper.store(*CHUNKS)
    records = EXTENT.pack(5000, HOLE)
    records += b"".join(EXTENT.pack(3000, digest_of(chunk)) for chunk in CHUNKS)
    whole = bytes(5000) + WHOLE
    sparse = entry(b"", size=17000, content=records, captured=digest_of(whole))
    keeper.publish({b"f": sparse})
    keeper.damage(digest_of(CHUNKS[0]))
    assert "bytes 5000-8000 of 17000" in repair(keeper)[1][b"f"]
    keeper.damage(digest_of(CHUNKS[3]))
    assert "bytes 14000-17000 of 17000" in repair(keeper)[1][b"f"]
    node = nodes(keeper)[b"f"]
    left = bytes(8000) + CHUNKS[1] + CHUNKS[2] + bytes(3000)
    assert captured_digest(node) == digest_of(left)
    assert damage(keeper) == []


def test_repair_drops_a_file_of_which_nothing_is_left(keeper: Keeper) -> None:
    keeper.store(*CHUNKS)
    keeper.publish({b"gone": of_chunks(CHUNKS[0]), b"here": of_chunks(CHUNKS[1])})
    keeper.damage(digest_of(CHUNKS[0]))
    result, told = repair(keeper)
    assert (result.repaired[0].dropped, result.repaired[0].holed) == (1, 0)
    assert told == {b"gone": "the file is dropped: none of its data is left"}
    assert nodes(keeper).keys() == {b"here"}
    assert damage(keeper) == []


def test_repair_empties_a_lost_directory_and_keeps_all_others(keeper: Keeper) -> None:
    plan = {b"a": {b"b": {b"f": b"1", b"g": b"2"}, b"h": b"3"}, b"z": {b"i": b"4"}}
    _, snapshot = keeper.publish(plan)
    with keeper.reading() as repository:
        lost = repository.trees.resolve(snapshot.root, b"a/b")
    assert lost is not None
    keeper.damage(reference(lost))
    result, told = repair(keeper)
    assert result.repaired[0].dropped == 1
    assert told[b"a/b"].startswith("2 entries of this directory are dropped")
    assert nodes(keeper).keys() == {b"a", b"a/b", b"a/h", b"z", b"z/i"}
    assert damage(keeper) == []


def test_a_lost_piece_of_a_split_directory_costs_only_its_entries(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PIECE_MIN_ENTRIES", 4)
    monkeypatch.setattr(writer, "PIECE_MAX_ENTRIES", 8)
    names = [b"%03d" % number for number in range(40)]
    _, snapshot = keeper.publish({b"big": dict.fromkeys(names, b"")})
    with keeper.reading() as repository:
        big = repository.trees.resolve(snapshot.root, b"big")
        assert big is not None and big.tree is not None
        pieces = repository.trees.piece(big.tree)
        part = pieces[1]
        assert isinstance(part, tuple)
        lost = {node.name for leaf in repository.trees.leaves(part[1]) for node in leaf}
        assert 0 < len(lost) < 40
        piece = Digest(part[1].digest)
    keeper.damage(piece)
    repair(keeper)
    left = {path.rpartition(b"/")[2] for path in nodes(keeper) if b"/" in path}
    assert left == set(names) - lost
    assert damage(keeper) == []


def test_repair_sets_an_unreadable_snapshot_aside(keeper: Keeper) -> None:
    junk, _ = keeper.publish({b"f": b"1"}, time_ns=1)
    flip(keeper.root / "snapshots" / junk.hex(), 50)
    data = (keeper.root / "snapshots" / junk.hex()).read_bytes()
    rootless, snapshot = keeper.publish({b"g": b"2"}, time_ns=2)
    keeper.damage(reference(snapshot.root))
    kept, _ = keeper.publish({b"h": b"3"}, time_ns=3)
    result, _ = repair(keeper)
    assert {one.snapshot_id for one in result.repaired if one.new_id is None} == {junk, rootless}
    assert only(keeper)[0] == kept
    assert (keeper.root / "damaged" / junk.hex()).read_bytes() == data
    assert (keeper.root / "damaged" / rootless.hex()).exists()
    assert damage(keeper) == []


def _exchange(keeper: Keeper, *snapshots: SnapshotId) -> None:
    """Have each of some snapshots' files be the one of the next."""
    paths = [keeper.root / "snapshots" / one.hex() for one in snapshots]
    data = [path.read_bytes() for path in paths]
    for path, other in zip(paths, [*data[1:], data[0]], strict=True):
        path.write_bytes(other)


class _StoppedError(Exception):
    """A process ends here."""


def _listed(keeper: Keeper) -> set[SnapshotId]:
    with keeper.reading() as repository:
        return {found for found, _ in repository.snapshots.iterate()}


def test_repair_gives_swapped_snapshots_their_names_back(keeper: Keeper) -> None:
    ids = [keeper.publish({b"f": b"%d" % number}, time_ns=number)[0] for number in range(4)]
    _exchange(keeper, *ids[:3])
    assert _listed(keeper) == {ids[3]}
    foretold, _ = repair(keeper, dry_run=True)
    assert _listed(keeper) == {ids[3]}
    result, told = repair(keeper)
    assert foretold == result
    assert (result.returned, result.repaired, result.intact) == (sorted(ids[:3]), [], 4)
    assert told == {}
    assert _listed(keeper) == set(ids)
    assert damage(keeper) == []
    assert not list((keeper.root / "damaged").iterdir())


def test_repair_does_not_take_a_damaged_snapshot_for_a_swapped_one(keeper: Keeper) -> None:
    """Where it is not compressed, one with a changed letter can be read as well."""
    keeper.publish({b"kept": b"1"}, time_ns=1, host="here")
    damaged, _ = keeper.publish({b"f": b"2"}, time_ns=2, host="there")
    path = keeper.root / "snapshots" / damaged.hex()
    data = path.read_bytes()
    payload = zstandard.ZstdDecompressor().decompress(data[16:]) if data[10] else data[16:]
    changed = data[:10] + b"\0" + data[11:16] + payload.replace(b"there", b"where")
    path.write_bytes(changed)
    with keeper.reading() as repository:
        name = SnapshotId(digest_of(changed))
        assert decode_snapshot(name, changed, repository.codec).host == "where"
    result, _ = repair(keeper)
    assert result.returned == []
    assert [one.snapshot_id for one in result.repaired] == [damaged]
    assert damaged not in _listed(keeper) and len(_listed(keeper)) == 1


def test_a_half_undone_swap_of_snapshots_is_undone_by_the_next_repair(
    keeper: Keeper,
) -> None:
    ids = [keeper.publish({b"f": b"%d" % number}, time_ns=number)[0] for number in range(3)]
    stop = 0
    while True:
        assert _listed(keeper) == set(ids)
        _exchange(keeper, *ids)
        steps = iter(range(stop))

        def count(step: str, steps: Iterator[int] = steps) -> None:
            if next(steps, None) is None:
                raise _StoppedError(step)

        try:
            with open_for_maintenance(keeper.root, "repair") as repository:
                repository.store.storage._on_step = count  # type: ignore[attr-defined]
                SwappedSnapshots(repository).rename_back()
        except _StoppedError:
            repair(keeper)
            stop += 1
        else:
            break
    assert stop > 9
    assert _listed(keeper) == set(ids)


def test_repair_dry_run_reports_the_same_and_changes_nothing(keeper: Keeper) -> None:
    keeper.store(*CHUNKS)
    old, _ = keeper.publish({b"f": of_chunks(*CHUNKS), b"gone": of_chunks(CHUNKS[2])})
    keeper.damage(digest_of(CHUNKS[2]))
    before = sorted(path for path in keeper.root.rglob("*") if "index" not in path.parts)
    foretold, told = repair(keeper, dry_run=True)
    assert (foretold.repaired[0].new_id, only(keeper)[0]) == (None, old)
    after = sorted(path for path in keeper.root.rglob("*") if "index" not in path.parts)
    assert after == before
    result, said = repair(keeper)
    assert said == told
    assert result.repaired[0].holed == foretold.repaired[0].holed == 1


def test_a_repaired_repository_can_be_pruned(keeper: Keeper) -> None:
    keeper.store(*CHUNKS)
    keeper.publish({b"f": of_chunks(*CHUNKS)})
    keeper.damage(digest_of(CHUNKS[0]))
    repair(keeper)
    with open_for_maintenance(keeper.root, "prune", OpenOptions(sync=False)) as repository:
        Pruner(repository, PruneOptions(unused_share=0.0), RecordingMonitor()).prune()
    assert damage(keeper) == []
    with keeper.reading() as repository:
        assert Checker(repository, RecordingMonitor()).check(PackSelection()).damage == []


class TestRepairIndex:
    def rebuilt(self, keeper: Keeper) -> IndexRepair:
        mode = LockMode.EXCLUSIVE
        with open_for_maintenance(
            keeper.root, "repair index", OpenOptions(sync=False), mode=mode
        ) as repository:
            return repair_index(repository)

    def entries(self, keeper: Keeper) -> dict[bytes, tuple[bytes, int, int]]:
        with keeper.reading() as repository:
            index = repository.store.index
            return {
                digest: (index.pack_id(place.pack), place.offset, place.stored_bytes)
                for digest, place in index.blobs()
            }

    @pytest.mark.parametrize("index", ["sound", "deleted", "junk"])
    def test_repair_index_builds_the_index_from_the_packs_alone(
        self, keeper: Keeper, index: str
    ) -> None:
        keeper.store(*CHUNKS)
        keeper.publish({b"f": of_chunks(*CHUNKS)})
        before = self.entries(keeper)
        if index == "deleted":
            shutil.rmtree(keeper.root / "index")
        elif index == "junk":
            (keeper.root / "index" / "data.mdb").write_bytes(noise("junk", 100_000))
        result = self.rebuilt(keeper)
        assert (result.packs, result.blobs) == (2, len(before))
        assert (result.salvaged, result.unreadable) == ([], [])
        assert self.entries(keeper) == before

    def test_repair_index_finds_the_intact_blobs_of_a_pack_with_a_damaged_directory(
        self, keeper: Keeper
    ) -> None:
        keeper.store(*CHUNKS)
        before = self.entries(keeper)
        (path,) = pack_paths(keeper.root)
        flip(path, -100)
        flip(path, before[digest_of(CHUNKS[2])][1] + 5)
        result = self.rebuilt(keeper)
        assert [pack.hex() for pack in result.salvaged] == [path.name]
        del before[digest_of(CHUNKS[2])]
        found = self.entries(keeper)
        assert {digest: found[digest] for digest in before} == before
        with keeper.reading() as repository:
            assert repository.store.read(digest_of(CHUNKS[3])) == CHUNKS[3]

    def test_repair_index_leaves_out_only_a_pack_that_cannot_be_read(
        self, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keeper.store(CHUNKS[0])
        keeper.store(CHUNKS[1])
        bad = pack_paths(keeper.root)[0]
        data = bad.read_bytes()
        bad.unlink()
        bad.mkdir()  # reading it is an error of the system's
        try:
            result = self.rebuilt(keeper)
        finally:
            bad.rmdir()
            bad.write_bytes(data)
        assert result.blobs == 1
        # It is found again by whoever opens the repository next.
        with keeper.reading() as repository:
            assert {repository.store.read(digest_of(chunk)) for chunk in CHUNKS[:2]} == {
                *CHUNKS[:2]
            }

    def test_repair_index_keeps_verification_times_and_damage_marks(self, keeper: Keeper) -> None:
        keeper.store(*CHUNKS)
        keeper.store(noise("other", 100))
        keeper.damage(digest_of(CHUNKS[1]))
        with open_for_reading(keeper.root, may_write_index=True) as repository:
            Checker(repository, RecordingMonitor()).check(PackSelection())
        self.rebuilt(keeper)
        with keeper.reading() as repository:
            index = repository.store.index
            assert index.are_stored([digest_of(chunk) for chunk in CHUNKS]) == [
                True,
                False,
                True,
                True,
            ]
            assert sorted(record.verified_s > 0 for record in index.packs()) == [False, True]


def test_repair_reads_one_file_only_where_something_is_lost(keeper: Keeper) -> None:
    """What is sound is not read again: a repair costs what is lost, and the check before it."""
    keeper.store(*CHUNKS)
    keeper.publish({b"bad": {b"f": of_chunks(CHUNKS[0])}, b"good": {b"g": of_chunks(CHUNKS[1])}})
    keeper.damage(digest_of(CHUNKS[0]))
    with open_for_reading(keeper.root, may_write_index=True) as repository:
        Checker(repository, RecordingMonitor()).check(PackSelection())
    with open_for_maintenance(keeper.root, "repair", OpenOptions(sync=False)) as repository:
        SnapshotRepairer(repository, RecordingMonitor()).repair()
        counts = repository.store.coverage
        sound = repository.store.locate(digest_of(CHUNKS[1]))
        assert sound.ordinal not in counts._blobs


def test_a_rebuilt_index_keeps_what_it_knew_and_is_correct(
    keeper: Keeper,
) -> None:
    """With the directory damaged, and a record too, only the index knows where its blob is."""
    chunks = [noise(f"chunk {number}", 3000) for number in range(3)]
    keeper.store(*chunks)
    (path,) = pack_paths(keeper.root)
    with keeper.reading() as repository:
        places = [repository.store.locate(digest_of(chunk)) for chunk in chunks]
    flip(path, -1)
    flip(path, places[0].offset - RECORD_HEADER.size)
    flip(path, places[1].offset - RECORD_HEADER.size)
    flip(path, places[1].offset + 100)
    with keeper.writing() as repository:
        repository.store.rebuild()
        assert repository.store.read(digest_of(chunks[0])) == chunks[0]
        assert repository.store.read(digest_of(chunks[2])) == chunks[2]
        assert repository.store.index.are_stored([digest_of(chunk) for chunk in chunks]) == [
            *(True, False, True),
        ]
