"""Pruning: what goes, what stays, and for whose sake."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from casfs.backup.run import BackupOptions, run_backup
from casfs.digest import Digest, PackId, SnapshotId, digest_of
from casfs.errors import IndexUnusableError, IntegrityError, LockedError, StorageError
from casfs.format.pack import TRAILER
from casfs.index.index import Index
from casfs.index.schema import Location
from casfs.maintenance import prune as prune_module
from casfs.maintenance.check import Checker
from casfs.maintenance.prune import PruneOptions, Pruner, PruneResult, UsedBlobsUnknownError
from casfs.maintenance.scrub import PackSelection
from casfs.monitor import RecordingMonitor
from casfs.repository.opening import OpenOptions, open_for_maintenance, open_for_reading
from casfs.storage.local import LocalStorage
from casfs.store.blob_store import pack_name
from casfs.store.pending_removal import read_notices
from tests.support.builders import Keeper
from tests.support.stores import add_pack, child, flip, hear, make_pack, noise, pack_paths, tell

KIB = 1 << 10


def prune(keeper: Keeper, **options: object) -> PruneResult:
    with open_for_maintenance(keeper.root, "prune", OpenOptions(sync=False)) as repository:
        return Pruner(repository, PruneOptions(**options), RecordingMonitor()).prune()  # type: ignore[arg-type]


def forget(keeper: Keeper, *snapshots: SnapshotId) -> None:
    with keeper.writing() as repository:
        for snapshot_id in snapshots:
            repository.snapshots.delete(snapshot_id)


def contents(keeper: Keeper) -> dict[bytes, bytes]:
    """Return what every file of every snapshot holds, read and verified."""
    with keeper.reading() as repository:
        return {
            b"%d/%s" % (snapshot.time_ns, path): b"".join(
                repository.store.read(extent.digest)
                for extent in repository.content(node).extents()
                if extent.digest is not None
            )
            for _, snapshot in repository.snapshots.iterate()
            for path, node in repository.trees.walk(snapshot.root)
            if node.tree is None
        }


def assert_sound(keeper: Keeper) -> None:
    with keeper.reading() as repository:
        assert Checker(repository, RecordingMonitor()).check(PackSelection()).damage == []


def condemned(keeper: Keeper) -> int:
    """Return how many packs are condemned, in the storage and in the index alike."""
    with keeper.reading() as repository:
        told = read_notices(repository.store.storage).values()
        names = {pack for condemnation in told for pack in condemnation.pack_ids()}
        ordinals = repository.store.index.marked_for_removal()
        assert {repository.store.index.pack_id(ordinal) for ordinal in ordinals} == names
        return len(names)


def publish(keeper: Keeper, time_ns: int, *names: str, size: int = 50 * KIB) -> SnapshotId:
    """Publish a snapshot with one file of noise for each name, in a pack of its own where new."""
    plan = {name.encode(): noise(name, size) for name in names}
    return keeper.publish(plan, time_ns=time_ns)[0]


class TestPruneUnneeded:
    def test_prune_removes_unneeded_packs_and_keeps_the_rest_intact(self, keeper: Keeper) -> None:
        first = publish(keeper, 1, "a")
        publish(keeper, 2, "b")
        forget(keeper, first)
        before = contents(keeper)
        result = prune(keeper)
        assert result.removed_packs == 1
        assert result.freed_bytes > 50 * KIB
        assert (result.snapshots, result.packs, result.waiting_packs) == (1, 2, 0)
        assert contents(keeper) == before
        assert len(pack_paths(keeper.root)) == 1
        assert condemned(keeper) == 0
        assert_sound(keeper)
        with keeper.reading() as repository:
            assert len(repository.store.index.packs()) == 1
            assert repository.store.index.blob_count() == 2

    def test_prune_removes_nothing_where_everything_is_needed(self, keeper: Keeper) -> None:
        publish(keeper, 1, "a")
        packs = pack_paths(keeper.root)
        result = prune(keeper)
        assert (result.removed_packs, result.freed_bytes, result.unneeded_blobs) == (0, 0, 0)
        assert pack_paths(keeper.root) == packs
        assert not list((keeper.root / "condemned").iterdir())

    def test_prune_of_an_empty_repository_does_nothing(self, keeper: Keeper) -> None:
        assert prune(keeper) == PruneResult()

    def test_prune_removes_what_an_interrupted_backup_left(self, keeper: Keeper) -> None:
        publish(keeper, 1, "a")
        keeper.store(noise("nobody's", 50 * KIB))
        assert prune(keeper).removed_packs == 1
        assert_sound(keeper)

    def test_prune_dry_run_reports_the_same_and_changes_nothing(self, keeper: Keeper) -> None:
        first = publish(keeper, 1, "a")
        publish(keeper, 2, "b")
        forget(keeper, first)
        packs = pack_paths(keeper.root)
        told = prune(keeper, dry_run=True)
        assert pack_paths(keeper.root) == packs
        assert condemned(keeper) == 0
        assert told.removed_packs == 1
        assert told.freed_bytes == prune(keeper).freed_bytes


class TestRepack:
    def test_prune_repacks_partly_needed_packs(self, keeper: Keeper) -> None:
        keeper.store(*(noise(name, 50 * KIB) for name in "abcd"))
        publish(keeper, 1, "a")
        before = contents(keeper)
        result = prune(keeper)
        assert result.repacked_packs == 1
        assert result.new_bytes < 60 * KIB
        assert result.freed_bytes > 140 * KIB
        assert contents(keeper) == before
        assert_sound(keeper)
        with keeper.reading() as repository:
            assert repository.store.index.lookup(digest_of(noise("b", 50 * KIB))) is None

    def test_prune_keeps_packs_where_little_would_be_freed(self, keeper: Keeper) -> None:
        keeper.store(*(noise(name, 50 * KIB) for name in "abcd"))
        publish(keeper, 1, "a", "b", "c")
        assert prune(keeper, unused_share=0.3).repacked_packs == 0
        assert prune(keeper, unused_share=0.2).repacked_packs == 1
        assert_sound(keeper)

    def test_prune_joins_many_small_packs(
        self, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(prune_module, "_MANY_SMALL_PACKS", 6)
        for number in range(6):
            publish(keeper, number, str(number), size=KIB)
        before = contents(keeper)
        assert prune(keeper).repacked_packs == 6
        assert contents(keeper) == before
        assert len(pack_paths(keeper.root)) == 1
        assert prune(keeper).repacked_packs == 0

    def test_prune_does_not_repack_packs_full_of_tiny_blobs_repeatedly(
        self, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(prune_module, "_MANY_SMALL_PACKS", 6)
        for number in range(6):
            publish(keeper, number, str(number), size=KIB)
        with keeper.reading() as repository:
            fewest = min(record.blobs for record in repository.store.index.packs())
        monkeypatch.setattr(prune_module, "PACK_BLOBS", 2 * fewest)
        assert prune(keeper).repacked_packs == 0
        monkeypatch.setattr(prune_module, "PACK_BLOBS", 1000)
        assert prune(keeper).repacked_packs == 6

    def test_prune_keeps_the_pack_of_a_damaged_blob(self, keeper: Keeper) -> None:
        keeper.store(*(noise(name, 50 * KIB) for name in "abcd"))
        publish(keeper, 1, "a", "b")
        keeper.damage(digest_of(noise("a", 50 * KIB)))
        prune(keeper, unused_share=0.0)
        assert condemned(keeper) == 0
        with keeper.reading() as repository:
            found = Checker(repository, RecordingMonitor()).check(PackSelection()).damage
            assert [(d.path, d.ranges) for d in found if d.what == "file"] == [
                (b"a", ((0, 50 * KIB),))
            ]
        # What was found is known, and the pack is not touched again.
        assert prune(keeper, unused_share=0.0).repacked_packs == 0

    def test_prune_on_a_full_disk_keeps_everything_and_marks_nothing_for_removal(
        self, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = publish(keeper, 1, "gone")
        keeper.store(*(noise(name, 50 * KIB) for name in "abcd"))
        publish(keeper, 2, "a")
        forget(keeper, first)
        before = contents(keeper)
        with monkeypatch.context() as patch:

            def refuse(*_: object) -> None:
                raise StorageError("create", "pack", OSError(28, "No space left on device"))

            patch.setattr(
                LocalStorage, "open_writer", _only_small(LocalStorage.open_writer, refuse)
            )
            with pytest.raises(StorageError, match="No space left"):
                prune(keeper)
        # What could go without room has gone.
        assert not any(noise("gone", 50 * KIB) in path.read_bytes() for path in _packs(keeper))
        assert condemned(keeper) == 0
        assert contents(keeper) == before
        assert prune(keeper).repacked_packs == 1
        assert_sound(keeper)


def _packs(keeper: Keeper) -> list[Path]:
    return pack_paths(keeper.root)


def _only_small(spool: object, refuse: object) -> object:
    def choose(self: LocalStorage, in_memory: bool) -> object:
        # Packs are the only objects that are not written at once.
        return spool(self, in_memory) if in_memory else refuse()  # type: ignore[operator]

    return choose


class TestPruneRefusal:
    @pytest.mark.parametrize("what", ["snapshot", "tree", "missing chunk"])
    def test_prune_removes_nothing_where_it_does_not_know_what_is_needed(
        self, keeper: Keeper, what: str
    ) -> None:
        first = publish(keeper, 1, "a")
        second, snapshot = keeper.publish({b"f": noise("f", 50 * KIB)}, time_ns=2)
        forget(keeper, first)
        if what == "snapshot":
            flip(keeper.root / "snapshots" / second.hex(), 40)
        elif what == "tree":
            assert snapshot.root.tree is not None
            keeper.damage(Digest(snapshot.root.tree.digest))
        else:
            for path in pack_paths(keeper.root):
                if noise("f", 50 * KIB) in path.read_bytes():
                    path.unlink()
        packs = pack_paths(keeper.root)
        with pytest.raises(UsedBlobsUnknownError, match="nothing was removed") as raised:
            prune(keeper)
        assert raised.value.exit_code == IntegrityError.exit_code == 5
        assert pack_paths(keeper.root) == packs
        assert condemned(keeper) == 0

    def test_two_prunes_do_not_run_at_once(self, keeper: Keeper) -> None:
        with child(HOLDER, keeper.root, "tending") as process:
            assert hear(process) == "open"
            with pytest.raises(LockedError, match="process"):
                prune(keeper)


HOLDER = """
import sys
from pathlib import Path
from casfs.repository.opening import open_for_maintenance, open_for_reading
from casfs.storage.locks import LockMode

mode = LockMode(sys.argv[2])
root = Path(sys.argv[1])
if mode == LockMode.READER:
    repository = open_for_reading(root, reader="mount")
else:
    repository = open_for_maintenance(root, "test", mode=mode)
with repository:
    print("open", flush=True)
    for line in sys.stdin:
        data = repository.store.read(bytes.fromhex(line.strip()))
        print(len(data), flush=True)
"""


class TestConcurrentPrune:
    @contextmanager
    def held(self, keeper: Keeper, mode: str) -> Iterator[object]:
        with child(HOLDER, keeper.root, mode) as process:
            assert hear(process) == "open"
            yield process

    @pytest.mark.parametrize("mode", ["shared", "reader"])
    def test_prune_keeps_what_running_processes_may_rely_on_until_they_end(
        self, keeper: Keeper, mode: str
    ) -> None:
        first = publish(keeper, 1, "a")
        publish(keeper, 2, "b")
        with self.held(keeper, mode) as process:
            forget(keeper, first)
            for _ in range(2):
                result = prune(keeper)
                assert (result.removed_packs, result.waiting_packs) == (0, 1)
                assert len(result.waited_for) == 1
                assert condemned(keeper) == 1
            tell(process, digest_of(noise("a", 50 * KIB)).hex())  # type: ignore[arg-type]
            assert hear(process) == str(50 * KIB)  # type: ignore[arg-type]
        assert prune(keeper).removed_packs == 1
        assert condemned(keeper) == 0
        assert_sound(keeper)

    def test_prune_waits_for_readers_no_longer_than_the_margin(self, keeper: Keeper) -> None:
        first = publish(keeper, 1, "a")
        publish(keeper, 2, "b")
        with self.held(keeper, "reader"):
            forget(keeper, first)
            assert prune(keeper, margin_s=3600).waiting_packs == 1
            assert prune(keeper, margin_s=0).removed_packs == 1

    def test_prune_does_not_wait_for_processes_that_came_later(self, keeper: Keeper) -> None:
        first = publish(keeper, 1, "a")
        publish(keeper, 2, "b")
        with self.held(keeper, "shared"):
            forget(keeper, first)
            assert prune(keeper).waiting_packs == 1
        with self.held(keeper, "shared"), self.held(keeper, "reader"):
            assert prune(keeper).removed_packs == 1

    def test_prune_keeps_a_blob_that_a_running_backup_found_stored(
        self, keeper: Keeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A backup finds a chunk stored, then that is condemned, then the snapshot is published."""
        first = publish(keeper, 1, "a")
        publish(keeper, 2, "b")
        source = tmp_path / "source"
        source.mkdir()
        (source / "again").write_bytes(noise("a", 50 * KIB))
        with child(BACKUP, keeper.root, source) as process:
            assert hear(process) == "stored"
            forget(keeper, first)
            # The one that it found, and the one that it has written itself, which is not condemned.
            assert prune(keeper).waiting_packs == 2
            assert condemned(keeper) == 1
            tell(process)
            assert hear(process) == "published"
            process.wait()
        result = prune(keeper, unused_share=1.0)
        assert (result.removed_packs, result.waiting_packs) == (0, 0)
        assert condemned(keeper) == 0
        assert noise("a", 50 * KIB) in contents(keeper).values()
        assert_sound(keeper)

    def test_a_backup_that_begins_after_a_prune_stores_a_pending_blob_again(
        self, keeper: Keeper, tmp_path: Path
    ) -> None:
        source = tmp_path / "source"
        (source / "folder").mkdir(parents=True)
        (source / "folder" / "file").write_bytes(noise("a", 50 * KIB))
        (source / "folder" / "old").write_bytes(b"unchanged")
        # Old enough that both backups store the very same bytes.
        await_age(source / "folder" / "file")
        first, snapshot = keeper.back_up(source)
        publish(keeper, 2, "b")
        with self.held(keeper, "shared"):
            forget(keeper, first)
            assert prune(keeper).waiting_packs == 1
        # The forgotten one comes back as the parent, as if its forgetting had not been seen.
        with keeper.writing() as repository:
            assert repository.snapshots.publish(snapshot) == first
            assert repository.store.index.marked_for_removal()
            options = BackupOptions((bytes(source),), host="here", parent=first.hex())
            result = run_backup(repository, options, RecordingMonitor())
            assert result.snapshot.stats.new_blobs > 2
            repository.snapshots.delete(first)
        assert prune(keeper).removed_packs == 1
        assert noise("a", 50 * KIB) in contents(keeper).values()
        assert_sound(keeper)

    def test_a_new_pack_with_the_blobs_of_a_pending_pack_has_another_name(
        self, keeper: Keeper
    ) -> None:
        first = publish(keeper, 1, "a")
        publish(keeper, 2, "b")
        before = packs(keeper)
        with self.held(keeper, "shared"):
            forget(keeper, first)
            assert prune(keeper).waiting_packs == 1
            assert publish(keeper, 1, "a") == first
        (new,) = packs(keeper) - before
        (old,) = [name for name in before if blobs_of(keeper, name) == blobs_of(keeper, new)]
        assert prune(keeper).removed_packs == 1
        assert old not in packs(keeper) and new in packs(keeper)
        assert noise("a", 50 * KIB) in contents(keeper).values()
        assert_sound(keeper)


def packs(keeper: Keeper) -> set[str]:
    return {path.name for path in (keeper.root / "packs").rglob("*") if path.is_file()}


def blobs_of(keeper: Keeper, pack: str) -> bytes:
    """Return all of a pack but its trailer."""
    return (keeper.root / "packs" / pack[:2] / pack).read_bytes()[: -TRAILER.size]


def await_age(path: Path) -> None:
    """Wait until a file is too old for a change of it to be missed."""
    while time.time_ns() - path.stat().st_ctime_ns < 3_000_000_000:
        time.sleep(0.05)


BACKUP = """
import sys
from pathlib import Path
from casfs.backup.run import BackupOptions, run_backup
from casfs.monitor import RecordingMonitor
from casfs.repository.opening import OpenOptions, open_for_writing
from casfs.repository.snapshots import SnapshotStore

publish = SnapshotStore.publish

def wait_first(*arguments):
    print("stored", flush=True)
    sys.stdin.readline()
    return publish(*arguments)

SnapshotStore.publish = wait_first
with open_for_writing(Path(sys.argv[1]), "backup", OpenOptions(sync=False)) as repository:
    run_backup(repository, BackupOptions((sys.argv[2].encode(),)), RecordingMonitor())
print("published", flush=True)
"""


class TestPruneInterruption:
    class Crash(BaseException):
        """What stops a process at once."""

    def test_a_prune_interrupted_at_any_step_is_finished_by_the_next_prune(
        self, keeper: Keeper, tmp_path: Path
    ) -> None:
        first = publish(keeper, 1, "a")
        keeper.store(*(noise(name, 50 * KIB) for name in "cdef"))
        publish(keeper, 2, "c", "b")
        forget(keeper, first)
        before = contents(keeper)
        saved = tmp_path / "saved"
        shutil.copytree(keeper.root, saved)
        steps: list[str] = []
        self.prune(keeper, steps.append)
        end = sorted(path.name for path in pack_paths(keeper.root))
        assert {step.partition(" ")[2] for step in steps} == {"packs", "condemned", "index"}
        for stop in range(len(steps)):
            shutil.rmtree(keeper.root)
            shutil.copytree(saved, keeper.root)
            left = iter(range(stop))

            def on_step(step: str, left: Iterator[int] = left) -> None:
                if next(left, None) is None:
                    raise self.Crash

            with pytest.raises(self.Crash):
                self.prune(keeper, on_step)
            assert contents(keeper) == before, steps[stop]
            assert_sound(keeper)
            prune(keeper)
            assert contents(keeper) == before
            assert condemned(keeper) == 0
            assert_sound(keeper)
            packs = pack_paths(keeper.root)
            assert len(packs) == len(end), steps[stop]
            assert sum(path.stat().st_size for path in packs) < 120 * KIB

    def prune(self, keeper: Keeper, on_step: Callable[[str], None]) -> None:
        with open_for_maintenance(
            keeper.root, "prune", OpenOptions(sync=False, on_step=on_step)
        ) as repository:
            Pruner(repository, PruneOptions(), RecordingMonitor()).prune()

    def test_a_removal_notice_without_its_writers_gets_them_from_the_next_prune(
        self, keeper: Keeper
    ) -> None:
        first = publish(keeper, 1, "a")
        publish(keeper, 2, "b")
        forget(keeper, first)
        published = 0

        def on_step(step: str) -> None:
            nonlocal published
            published += step == "done condemned"
            if published and step == "commit index":
                raise self.Crash

        with pytest.raises(self.Crash):
            self.prune(keeper, on_step)
        with keeper.reading() as repository:
            (told,) = read_notices(repository.store.storage).values()
            assert told.writers is None
            assert abs(told.time_s - time.time()) < 3600
        with child(HOLDER, keeper.root, "shared") as process:
            assert hear(process) == "open"
            assert prune(keeper).waiting_packs == 1
        assert prune(keeper).removed_packs == 1

    @pytest.mark.parametrize("data", [b"", b"{}", b"junk", b'{"time_s":1,"packs":["zz"]}'])
    def test_a_damaged_removal_notice_is_ignored_and_does_no_harm(
        self, keeper: Keeper, data: bytes
    ) -> None:
        first = publish(keeper, 1, "a")
        publish(keeper, 2, "b")
        with child(HOLDER, keeper.root, "shared") as process:
            assert hear(process) == "open"
            forget(keeper, first)
            prune(keeper)
        (path,) = (keeper.root / "condemned").iterdir()
        path.write_bytes(data)
        assert prune(keeper).removed_packs == 1
        assert_sound(keeper)


def test_prune_drops_completeness_marks_of_removed_snapshots(keeper: Keeper) -> None:
    first, second = publish(keeper, 1, "a"), publish(keeper, 2, "b")
    forget(keeper, first)
    prune(keeper)
    with keeper.reading() as repository:
        index = repository.store.index
        assert [index.is_complete(snapshot) for snapshot in (first, second)] == [False, True]


@pytest.mark.parametrize("moment", ["rename packs", "done packs", "done condemned", "done index"])
def test_prune_loses_nothing_needed_where_another_process_rebuilds_the_index(
    keeper: Keeper, tmp_path: Path, moment: str
) -> None:
    """All ordinals change then, and what the prune knows by ordinal is known of nothing any more."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(8):
        (source / f"{number}").write_bytes(noise(f"{number}", 40 * KIB))
    first, _ = keeper.back_up(source)
    for number in range(0, 8, 2):
        (source / f"{number}").unlink()
    keeper.back_up(source)
    forget(keeper, first)
    # A pack that nobody needs, for somebody to remove by hand.
    keeper.store(noise("unneeded", 5000))
    before = contents(keeper)
    with keeper.reading() as repository:
        wanted = [p for p in pack_paths(keeper.root) if p.stat().st_size < 10_000]
        victim = next(
            path
            for path in wanted
            if any(
                digest_of(noise("unneeded", 5000)) == entry.digest
                for entry in repository.store.read_directory(
                    PackId(bytes.fromhex(path.name)), path.stat().st_size
                )
            )
        )
    done: list[str] = []

    def meddle(step: str) -> None:
        if step == moment and not done:
            done.append(step)
            victim.unlink(missing_ok=True)
            with child(REBUILD, keeper.root) as other:
                assert hear(other) == "rebuilt"

    opened = open_for_maintenance(keeper.root, "prune", OpenOptions(sync=False, on_step=meddle))
    with opened as repository:
        try:
            Pruner(repository, PruneOptions(unused_share=0.0), RecordingMonitor()).prune()
        except (IndexUnusableError, StorageError):
            pass
    assert done
    assert contents(keeper) == before
    prune(keeper, unused_share=0.0)
    assert contents(keeper) == before
    assert_sound(keeper)


def one_of_two_forgotten(keeper: Keeper) -> tuple[dict[bytes, bytes], list[Path]]:
    """Leave one snapshot of two, whose content has the noise "b", and return its content and all packs."""
    first = publish(keeper, 1, "a")
    publish(keeper, 2, "b")
    forget(keeper, first)
    return contents(keeper), pack_paths(keeper.root)


REBUILD = """
import sys
from pathlib import Path
from casfs.repository.opening import OpenOptions, open_for_writing

with open_for_writing(Path(sys.argv[1]), "backup", OpenOptions(sync=False)) as repository:
    repository.store.rebuild()
print("rebuilt", flush=True)
"""


def test_prune_loses_nothing_needed_where_the_index_is_rebuilt_during_marking(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, packs = one_of_two_forgotten(keeper)
    uses = Pruner._pack_usage

    def rebuild_first(self: Pruner) -> object:
        monkeypatch.setattr(Pruner, "_pack_usage", uses)
        with child(REBUILD, keeper.root) as other:
            assert hear(other) == "rebuilt"
        return uses(self)

    monkeypatch.setattr(Pruner, "_pack_usage", rebuild_first)
    with pytest.raises(IndexUnusableError, match="rebuilt while this prune ran"):
        prune(keeper)
    assert pack_paths(keeper.root) == packs
    assert contents(keeper) == before
    assert prune(keeper).removed_packs == 1
    assert contents(keeper) == before
    assert_sound(keeper)


@pytest.mark.parametrize("is_lost", [True, False], ids=["lost-elsewhere", "not-lost"])
def test_prune_keeps_an_unreadable_pack_only_while_it_may_hold_a_needed_blob(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, is_lost: bool
) -> None:
    """As where two packs have changed places and the disk has an error in the one that seems unneeded."""
    keeper.store(noise("b", 50 * KIB))
    (needed,) = pack_paths(keeper.root)
    publish(keeper, 2, "b")
    keeper.store(noise("nobody's", 50 * KIB))
    before = contents(keeper)
    with keeper.reading() as repository:
        place = repository.store.locate(digest_of(noise("nobody's", 50 * KIB)))
        name = pack_name(repository.store.index.pack_id(place.pack))
    unneeded = keeper.root / name
    if is_lost:
        data = needed.read_bytes()
        needed.write_bytes(unneeded.read_bytes())
        unneeded.write_bytes(data)
    read = LocalStorage.read

    def fail(self: LocalStorage, wanted: str, offset: int, size: int) -> bytes:
        if wanted == name:
            raise StorageError("read", wanted, OSError(errno.EIO, "Input/output error"))
        return read(self, wanted, offset, size)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "read", fail)
        assert prune(keeper, unused_share=0.0).removed_packs == (0 if is_lost else 1)
    assert unneeded.exists() == is_lost
    assert contents(keeper) == before
    # When the disk has recovered it is found there.
    prune(keeper)
    assert contents(keeper) == before


def test_prune_loses_nothing_where_the_index_lists_less_than_it_knew(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where LMDB was given a damaged list of free pages and wrote over some that were in use."""
    before, packs = one_of_two_forgotten(keeper)
    needed = digest_of(noise("b", 50 * KIB))
    blobs = Index.blobs

    def forgetful(self: Index, batch: int = 10_000) -> Iterator[tuple[Digest, Location]]:
        return (item for item in blobs(self, batch) if item[0] != needed)

    with monkeypatch.context() as patch:
        patch.setattr(Index, "blobs", forgetful)
        with pytest.raises(IndexUnusableError, match=r"lists only \d+ of the \d+ needed blobs"):
            prune(keeper, unused_share=0.0)
    assert pack_paths(keeper.root) == packs
    assert contents(keeper) == before
    assert prune(keeper).removed_packs == 1


@pytest.mark.parametrize("checked", [True, False], ids=["marked", "not known"])
def test_prune_copies_the_only_intact_copy_of_a_needed_blob_before_its_pack_goes(
    keeper: Keeper, tmp_path: Path, checked: bool
) -> None:
    """Two backups may have stored the same; the index names one of the packs, and that one rots."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(noise("needed", 40 * KIB))
    _, snapshot = keeper.back_up(source)
    assert snapshot.root.tree is not None
    tree = Digest(snapshot.root.tree.digest)
    with keeper.reading() as repository:
        copies = [noise("needed", 40 * KIB), repository.store.read(tree)]
    data, _ = make_pack(copies)
    add_pack(keeper.root, data)
    before = contents(keeper)
    keeper.damage(tree)
    keeper.damage(digest_of(copies[0]))
    if checked:
        with open_for_reading(keeper.root, reader="check", may_write_index=True) as repository:
            Checker(repository, RecordingMonitor()).check(PackSelection())
    assert contents(keeper) == before
    prune(keeper, unused_share=0.0)
    assert contents(keeper) == before
    prune(keeper, unused_share=0.0)
    assert contents(keeper) == before
    assert_sound(keeper)
