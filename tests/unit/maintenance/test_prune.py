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
from casfs.digest import Digest, SnapshotId, digest_of
from casfs.errors import IndexUnusableError, IntegrityError, LockedError, StorageError
from casfs.format.pack import TRAILER
from casfs.index.index import Index
from casfs.index.schema import Location
from casfs.maintenance import prune_plan
from casfs.maintenance.check import Checker
from casfs.maintenance.prune import Pruner
from casfs.maintenance.prune_plan import PruneOptions
from casfs.maintenance.prune_result import NeededBlobsUnknownError, PruneResult
from casfs.maintenance.scrub import PackSelection
from casfs.monitor import RecordingMonitor
from casfs.repository.opening import OpenOptions, open_for_maintenance, open_for_reading
from casfs.storage.local import LocalStorage
from casfs.store.blob_store import pack_name
from casfs.store.pending_removal import read_notices
from tests.support.builders import RepositoryFixture
from tests.support.stores import (
    add_pack,
    child,
    flip,
    make_pack,
    noise,
    pack_paths,
    pack_ref,
    read_line,
    write_line,
)

KIB = 1 << 10


def prune(repo: RepositoryFixture, **options: object) -> PruneResult:
    with open_for_maintenance(repo.root, "prune", OpenOptions(sync=False)) as repository:
        chosen = PruneOptions(**options)  # type: ignore[arg-type]
        pruner = Pruner(repository, chosen, RecordingMonitor())
        plan = pruner.plan()
        return pruner.estimate(plan) if chosen.dry_run else pruner.execute(plan)


def forget(repo: RepositoryFixture, *snapshots: SnapshotId) -> None:
    with repo.writing() as repository:
        for snapshot_id in snapshots:
            repository.snapshots.delete(snapshot_id)


def contents(repo: RepositoryFixture) -> dict[bytes, bytes]:
    """Return the content of every file of every snapshot, read and verified."""
    with repo.reading() as repository:
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


def assert_intact(repo: RepositoryFixture) -> None:
    with repo.reading() as repository:
        assert Checker(repository, RecordingMonitor()).check(PackSelection()).damage == []


def pending(repo: RepositoryFixture) -> int:
    """Return how many packs are pending removal, in the storage and in the index alike."""
    with repo.reading() as repository:
        reported = read_notices(repository.store.storage).values()
        names = {pack for condemnation in reported for pack in condemnation.pack_refs()}
        ordinals = repository.store.index.marked_for_removal()
        assert {repository.store.index.pack_ref(ordinal) for ordinal in ordinals} == names
        return len(names)


def publish(repo: RepositoryFixture, time_ns: int, *names: str, size: int = 50 * KIB) -> SnapshotId:
    """Publish a snapshot with one file of noise for each name, in a pack of its own where new."""
    plan = {name.encode(): noise(name, size) for name in names}
    return repo.publish(plan, time_ns=time_ns)[0]


class TestPruneUnneeded:
    def test_prune_removes_unneeded_packs_and_keeps_the_rest_intact(
        self, repo: RepositoryFixture
    ) -> None:
        first = publish(repo, 1, "a")
        publish(repo, 2, "b")
        forget(repo, first)
        before = contents(repo)
        result = prune(repo)
        assert result.removed_packs == 1
        assert result.freed_bytes > 50 * KIB
        assert (result.snapshots, result.packs, result.waiting_packs) == (1, 2, 0)
        assert contents(repo) == before
        assert len(pack_paths(repo.root)) == 1
        assert pending(repo) == 0
        assert_intact(repo)
        with repo.reading() as repository:
            assert len(repository.store.index.packs()) == 1
            assert repository.store.index.blob_count() == 2

    def test_prune_marks_no_more_packs_than_notices_may_name(
        self, repo: RepositoryFixture, caplog: pytest.LogCaptureFixture
    ) -> None:
        gone = [publish(repo, time_ns, f"file {time_ns}") for time_ns in range(1, 6)]
        publish(repo, 9, "kept")
        forget(repo, *gone)
        assert prune(repo, most_marked=2).removed_packs == 2
        assert "3 packs stay until the next prune" in caplog.text
        assert_intact(repo)
        assert prune(repo, most_marked=2).removed_packs == 2
        assert prune(repo).removed_packs == 1

    def test_prune_removes_nothing_where_everything_is_needed(
        self, repo: RepositoryFixture
    ) -> None:
        publish(repo, 1, "a")
        packs = pack_paths(repo.root)
        result = prune(repo)
        assert (result.removed_packs, result.freed_bytes, result.unneeded_blobs) == (0, 0, 0)
        assert pack_paths(repo.root) == packs
        assert not list((repo.root / "condemned").iterdir())

    def test_prune_of_an_empty_repository_does_nothing(self, repo: RepositoryFixture) -> None:
        assert prune(repo) == PruneResult()

    def test_prune_removes_what_an_interrupted_backup_left(self, repo: RepositoryFixture) -> None:
        publish(repo, 1, "a")
        repo.store(noise("nobody's", 50 * KIB))
        assert prune(repo).removed_packs == 1
        assert_intact(repo)

    def test_prune_dry_run_reports_the_same_and_changes_nothing(
        self, repo: RepositoryFixture
    ) -> None:
        first = publish(repo, 1, "a")
        publish(repo, 2, "b")
        forget(repo, first)
        packs = pack_paths(repo.root)
        reported = prune(repo, dry_run=True)
        assert pack_paths(repo.root) == packs
        assert pending(repo) == 0
        assert reported.removed_packs == 1
        assert reported.freed_bytes == prune(repo).freed_bytes


class TestRepack:
    def test_prune_repacks_partly_needed_packs(self, repo: RepositoryFixture) -> None:
        repo.store(*(noise(name, 50 * KIB) for name in "abcd"))
        publish(repo, 1, "a")
        before = contents(repo)
        result = prune(repo)
        assert result.repacked_packs == 1
        assert result.new_bytes < 60 * KIB
        assert result.freed_bytes > 140 * KIB
        assert contents(repo) == before
        assert_intact(repo)
        with repo.reading() as repository:
            assert repository.store.index.lookup(digest_of(noise("b", 50 * KIB))) is None

    def test_prune_keeps_packs_where_little_would_be_freed(self, repo: RepositoryFixture) -> None:
        repo.store(*(noise(name, 50 * KIB) for name in "abcd"))
        publish(repo, 1, "a", "b", "c")
        assert prune(repo, unused_share=0.3).repacked_packs == 0
        assert prune(repo, unused_share=0.2).repacked_packs == 1
        assert_intact(repo)

    def test_prune_joins_many_small_packs(
        self, repo: RepositoryFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(prune_plan, "_MANY_SMALL_PACKS", 6)
        for number in range(6):
            publish(repo, number, str(number), size=KIB)
        before = contents(repo)
        assert prune(repo).repacked_packs == 6
        assert contents(repo) == before
        assert len(pack_paths(repo.root)) == 1
        assert prune(repo).repacked_packs == 0

    def test_prune_does_not_repack_packs_full_of_tiny_blobs_repeatedly(
        self, repo: RepositoryFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(prune_plan, "_MANY_SMALL_PACKS", 6)
        for number in range(6):
            publish(repo, number, str(number), size=KIB)
        with repo.reading() as repository:
            fewest = min(record.blobs for record in repository.store.index.packs())
        monkeypatch.setattr(prune_plan, "PACK_BLOBS", 2 * fewest)
        assert prune(repo).repacked_packs == 0
        monkeypatch.setattr(prune_plan, "PACK_BLOBS", 1000)
        assert prune(repo).repacked_packs == 6

    def test_prune_keeps_the_pack_of_a_damaged_blob(self, repo: RepositoryFixture) -> None:
        repo.store(*(noise(name, 50 * KIB) for name in "abcd"))
        publish(repo, 1, "a", "b")
        repo.damage(digest_of(noise("a", 50 * KIB)))
        prune(repo, unused_share=0.0)
        assert pending(repo) == 0
        with repo.reading() as repository:
            found = Checker(repository, RecordingMonitor()).check(PackSelection()).damage
            assert [(d.path, d.ranges) for d in found if d.what == "file"] == [
                (b"a", ((0, 50 * KIB),))
            ]
        # What was found is known, and the pack is not touched again.
        assert prune(repo, unused_share=0.0).repacked_packs == 0

    def test_prune_on_a_full_disk_keeps_everything_and_marks_nothing_for_removal(
        self, repo: RepositoryFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = publish(repo, 1, "gone")
        repo.store(*(noise(name, 50 * KIB) for name in "abcd"))
        publish(repo, 2, "a")
        forget(repo, first)
        before = contents(repo)
        with monkeypatch.context() as patch:

            def refuse(*_: object) -> None:
                raise StorageError("create", "pack", OSError(28, "No space left on device"))

            patch.setattr(
                LocalStorage, "open_writer", _only_small(LocalStorage.open_writer, refuse)
            )
            with pytest.raises(StorageError, match="No space left"):
                prune(repo)
        # What could go without room has gone.
        assert not any(noise("gone", 50 * KIB) in path.read_bytes() for path in _packs(repo))
        assert pending(repo) == 0
        assert contents(repo) == before
        assert prune(repo).repacked_packs == 1
        assert_intact(repo)


def _packs(repo: RepositoryFixture) -> list[Path]:
    return pack_paths(repo.root)


def _only_small(spool: object, refuse: object) -> object:
    def choose(self: LocalStorage, in_memory: bool) -> object:
        # Packs are the only objects that are not written at once.
        return spool(self, in_memory) if in_memory else refuse()  # type: ignore[operator]

    return choose


class TestPruneRefusal:
    @pytest.mark.parametrize("what", ["snapshot", "tree", "missing chunk"])
    def test_prune_removes_nothing_where_it_does_not_know_what_is_needed(
        self, repo: RepositoryFixture, what: str
    ) -> None:
        first = publish(repo, 1, "a")
        second, snapshot = repo.publish({b"f": noise("f", 50 * KIB)}, time_ns=2)
        forget(repo, first)
        if what == "snapshot":
            flip(repo.root / "snapshots" / second.hex(), 40)
        elif what == "tree":
            assert snapshot.root.tree is not None
            repo.damage(Digest(snapshot.root.tree.digest))
        else:
            for path in pack_paths(repo.root):
                if noise("f", 50 * KIB) in path.read_bytes():
                    path.unlink()
        packs = pack_paths(repo.root)
        with pytest.raises(NeededBlobsUnknownError, match="nothing was removed") as raised:
            prune(repo)
        assert raised.value.exit_code == IntegrityError.exit_code == 5
        assert pack_paths(repo.root) == packs
        assert pending(repo) == 0

    def test_two_prunes_do_not_run_at_once(self, repo: RepositoryFixture) -> None:
        with child(HOLDER, repo.root, "tending") as process:
            assert read_line(process) == "open"
            with pytest.raises(LockedError, match="process"):
                prune(repo)


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
    def held(self, repo: RepositoryFixture, mode: str) -> Iterator[object]:
        with child(HOLDER, repo.root, mode) as process:
            assert read_line(process) == "open"
            yield process

    @pytest.mark.parametrize("mode", ["shared", "reader"])
    def test_prune_keeps_what_running_processes_may_rely_on_until_they_end(
        self, repo: RepositoryFixture, mode: str
    ) -> None:
        first = publish(repo, 1, "a")
        publish(repo, 2, "b")
        with self.held(repo, mode) as process:
            forget(repo, first)
            for _ in range(2):
                result = prune(repo)
                assert (result.removed_packs, result.waiting_packs) == (0, 1)
                assert len(result.waited_for) == 1
                assert pending(repo) == 1
            write_line(process, digest_of(noise("a", 50 * KIB)).hex())  # type: ignore[arg-type]
            assert read_line(process) == str(50 * KIB)  # type: ignore[arg-type]
        assert prune(repo).removed_packs == 1
        assert pending(repo) == 0
        assert_intact(repo)

    def test_prune_waits_for_readers_no_longer_than_the_margin(
        self, repo: RepositoryFixture
    ) -> None:
        first = publish(repo, 1, "a")
        publish(repo, 2, "b")
        with self.held(repo, "reader"):
            forget(repo, first)
            assert prune(repo, margin_s=3600).waiting_packs == 1
            assert prune(repo, margin_s=0).removed_packs == 1

    def test_prune_does_not_wait_for_processes_that_came_later(
        self, repo: RepositoryFixture
    ) -> None:
        first = publish(repo, 1, "a")
        publish(repo, 2, "b")
        with self.held(repo, "shared"):
            forget(repo, first)
            assert prune(repo).waiting_packs == 1
        with self.held(repo, "shared"), self.held(repo, "reader"):
            assert prune(repo).removed_packs == 1

    def test_prune_keeps_a_blob_that_a_running_backup_found_stored(
        self, repo: RepositoryFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A backup finds a chunk stored, a prune marks its pack, then the snapshot is published."""
        first = publish(repo, 1, "a")
        publish(repo, 2, "b")
        source = tmp_path / "source"
        source.mkdir()
        (source / "again").write_bytes(noise("a", 50 * KIB))
        with child(BACKUP, repo.root, source) as process:
            assert read_line(process) == "stored"
            forget(repo, first)
            # The pack that it found, and the pack that it has written itself, which is not marked.
            assert prune(repo).waiting_packs == 2
            assert pending(repo) == 1
            write_line(process)
            assert read_line(process) == "published"
            process.wait()
        result = prune(repo, unused_share=1.0)
        assert (result.removed_packs, result.waiting_packs) == (0, 0)
        assert pending(repo) == 0
        assert noise("a", 50 * KIB) in contents(repo).values()
        assert_intact(repo)

    def test_a_backup_that_begins_after_a_prune_stores_a_pending_blob_again(
        self, repo: RepositoryFixture, tmp_path: Path
    ) -> None:
        source = tmp_path / "source"
        (source / "folder").mkdir(parents=True)
        (source / "folder" / "file").write_bytes(noise("a", 50 * KIB))
        (source / "folder" / "old").write_bytes(b"unchanged")
        # Old enough that both backups store the very same bytes.
        await_age(source / "folder" / "file")
        first, snapshot = repo.back_up(source)
        publish(repo, 2, "b")
        with self.held(repo, "shared"):
            forget(repo, first)
            assert prune(repo).waiting_packs == 2
        # The forgotten one comes back as the parent, as if its forgetting had not been seen.
        with repo.writing() as repository:
            assert repository.snapshots.publish(snapshot) == first
            assert repository.store.index.marked_for_removal()
            options = BackupOptions((bytes(source),), host="here", parent=first.hex())
            result = run_backup(repository, options, RecordingMonitor())
            assert result.snapshot.stats.new_blobs > 2
            repository.snapshots.delete(first)
        assert prune(repo).removed_packs == 2
        assert noise("a", 50 * KIB) in contents(repo).values()
        assert_intact(repo)

    def test_a_new_pack_with_the_blobs_of_a_pending_pack_has_another_name(
        self, repo: RepositoryFixture
    ) -> None:
        first = publish(repo, 1, "a")
        publish(repo, 2, "b")
        before = packs(repo)
        with self.held(repo, "shared"):
            forget(repo, first)
            assert prune(repo).waiting_packs == 1
            assert publish(repo, 1, "a") == first
        (new,) = packs(repo) - before
        (old,) = [name for name in before if blobs_of(repo, name) == blobs_of(repo, new)]
        assert prune(repo).removed_packs == 1
        assert old not in packs(repo) and new in packs(repo)
        assert noise("a", 50 * KIB) in contents(repo).values()
        assert_intact(repo)


def packs(repo: RepositoryFixture) -> set[str]:
    return {path.name for path in pack_paths(repo.root)}


def blobs_of(repo: RepositoryFixture, pack: str) -> bytes:
    """Return all of a pack but its trailer."""
    (path,) = [path for path in pack_paths(repo.root) if path.name == pack]
    return path.read_bytes()[: -TRAILER.size]


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

def wait_first(*arguments, **options):
    print("stored", flush=True)
    sys.stdin.readline()
    return publish(*arguments, **options)

SnapshotStore.publish = wait_first
with open_for_writing(Path(sys.argv[1]), "backup", OpenOptions(sync=False)) as repository:
    run_backup(repository, BackupOptions((sys.argv[2].encode(),)), RecordingMonitor())
print("published", flush=True)
"""


class TestPruneInterruption:
    class Crash(BaseException):
        """What stops a process at once."""

    @pytest.mark.slow
    def test_a_prune_interrupted_at_any_step_is_finished_by_the_next_prune(
        self, repo: RepositoryFixture, tmp_path: Path
    ) -> None:
        first = publish(repo, 1, "a")
        repo.store(*(noise(name, 50 * KIB) for name in "cdef"))
        publish(repo, 2, "c", "b")
        forget(repo, first)
        before = contents(repo)
        saved = tmp_path / "saved"
        shutil.copytree(repo.root, saved)
        steps: list[str] = []
        self.prune(repo, steps.append)
        end = sorted(path.name for path in pack_paths(repo.root))
        assert {step.partition(" ")[2] for step in steps} == {
            "packs",
            "meta",
            "condemned",
            "deltas",
            "index",
        }
        for stop in range(len(steps)):
            shutil.rmtree(repo.root)
            shutil.copytree(saved, repo.root)
            left = iter(range(stop))

            def on_step(step: str, left: Iterator[int] = left) -> None:
                if next(left, None) is None:
                    raise self.Crash

            with pytest.raises(self.Crash):
                self.prune(repo, on_step)
            assert contents(repo) == before, steps[stop]
            assert_intact(repo)
            prune(repo)
            assert contents(repo) == before
            assert pending(repo) == 0
            assert_intact(repo)
            packs = pack_paths(repo.root)
            assert len(packs) == len(end), steps[stop]
            assert sum(path.stat().st_size for path in packs) < 120 * KIB

    def prune(self, repo: RepositoryFixture, on_step: Callable[[str], None]) -> None:
        with open_for_maintenance(
            repo.root, "prune", OpenOptions(sync=False, on_step=on_step)
        ) as repository:
            Pruner(repository, PruneOptions(), RecordingMonitor()).prune()

    def test_a_removal_notice_without_its_writers_gets_them_from_the_next_prune(
        self, repo: RepositoryFixture
    ) -> None:
        first = publish(repo, 1, "a")
        publish(repo, 2, "b")
        forget(repo, first)
        published = 0

        def on_step(step: str) -> None:
            nonlocal published
            published += step == "done condemned"
            if published and step == "commit index":
                raise self.Crash

        with pytest.raises(self.Crash):
            self.prune(repo, on_step)
        with repo.reading() as repository:
            (reported,) = read_notices(repository.store.storage).values()
            assert reported.writers is None
            assert abs(reported.time_s - time.time()) < 3600
        with child(HOLDER, repo.root, "shared") as process:
            assert read_line(process) == "open"
            assert prune(repo).waiting_packs == 1
        assert prune(repo).removed_packs == 1

    @pytest.mark.parametrize("data", [b"", b"{}", b"junk", b'{"time_s":1,"packs":["zz"]}'])
    def test_a_damaged_removal_notice_is_ignored_and_does_no_harm(
        self, repo: RepositoryFixture, data: bytes
    ) -> None:
        first = publish(repo, 1, "a")
        publish(repo, 2, "b")
        with child(HOLDER, repo.root, "shared") as process:
            assert read_line(process) == "open"
            forget(repo, first)
            prune(repo)
        (path,) = (repo.root / "condemned").iterdir()
        path.write_bytes(data)
        assert prune(repo).removed_packs == 1
        assert_intact(repo)


def test_prune_drops_completeness_marks_of_removed_snapshots(repo: RepositoryFixture) -> None:
    first, second = publish(repo, 1, "a"), publish(repo, 2, "b")
    forget(repo, first)
    prune(repo)
    with repo.reading() as repository:
        index = repository.store.index
        assert [index.is_complete(snapshot) for snapshot in (first, second)] == [False, True]


@pytest.mark.parametrize("moment", ["rename packs", "done packs", "done condemned", "done index"])
def test_prune_loses_nothing_needed_where_another_process_rebuilds_the_index(
    repo: RepositoryFixture, tmp_path: Path, moment: str
) -> None:
    """All ordinals change then, and what the prune knows by ordinal is known of nothing any more."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(8):
        (source / f"{number}").write_bytes(noise(f"{number}", 40 * KIB))
    first, _ = repo.back_up(source)
    for number in range(0, 8, 2):
        (source / f"{number}").unlink()
    repo.back_up(source)
    forget(repo, first)
    # An unneeded pack, to be removed by hand.
    repo.store(noise("unneeded", 5000))
    before = contents(repo)
    with repo.reading() as repository:
        wanted = [p for p in pack_paths(repo.root) if p.stat().st_size < 10_000]
        victim = next(
            path
            for path in wanted
            if any(
                digest_of(noise("unneeded", 5000)) == entry.digest
                for entry in repository.store.read_directory(pack_ref(path), path.stat().st_size)
            )
        )
    done: list[str] = []

    def meddle(step: str) -> None:
        if step == moment and not done:
            done.append(step)
            victim.unlink(missing_ok=True)
            with child(REBUILD, repo.root) as other:
                assert read_line(other) == "rebuilt"

    opened = open_for_maintenance(repo.root, "prune", OpenOptions(sync=False, on_step=meddle))
    with opened as repository:
        try:
            Pruner(repository, PruneOptions(unused_share=0.0), RecordingMonitor()).prune()
        except (IndexUnusableError, StorageError):
            pass
    assert done
    assert contents(repo) == before
    prune(repo, unused_share=0.0)
    assert contents(repo) == before
    assert_intact(repo)


def one_of_two_forgotten(repo: RepositoryFixture) -> tuple[dict[bytes, bytes], list[Path]]:
    """Leave one snapshot of two, whose content has the noise "b", and return its content and all packs."""
    first = publish(repo, 1, "a")
    publish(repo, 2, "b")
    forget(repo, first)
    return contents(repo), pack_paths(repo.root)


REBUILD = """
import sys
from pathlib import Path
from casfs.repository.opening import OpenOptions, open_for_writing

with open_for_writing(Path(sys.argv[1]), "backup", OpenOptions(sync=False)) as repository:
    repository.store.rebuild()
print("rebuilt", flush=True)
"""


def test_prune_loses_nothing_needed_where_the_index_is_rebuilt_during_marking(
    repo: RepositoryFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, packs = one_of_two_forgotten(repo)
    uses = Pruner._pack_usage

    def rebuild_first(self: Pruner) -> object:
        monkeypatch.setattr(Pruner, "_pack_usage", uses)
        with child(REBUILD, repo.root) as other:
            assert read_line(other) == "rebuilt"
        return uses(self)

    monkeypatch.setattr(Pruner, "_pack_usage", rebuild_first)
    with pytest.raises(IndexUnusableError, match="rebuilt while this prune ran"):
        prune(repo)
    assert pack_paths(repo.root) == packs
    assert contents(repo) == before
    assert prune(repo).removed_packs == 1
    assert contents(repo) == before
    assert_intact(repo)


@pytest.mark.parametrize("is_lost", [True, False], ids=["lost-elsewhere", "not-lost"])
def test_prune_keeps_an_unreadable_pack_only_while_it_may_hold_a_needed_blob(
    repo: RepositoryFixture, monkeypatch: pytest.MonkeyPatch, is_lost: bool
) -> None:
    """As where two packs have changed places and the disk has an error in the one that seems unneeded."""
    repo.store(noise("b", 50 * KIB))
    (needed,) = pack_paths(repo.root)
    publish(repo, 2, "b")
    repo.store(noise("nobody's", 50 * KIB))
    before = contents(repo)
    with repo.reading() as repository:
        place = repository.store.locate(digest_of(noise("nobody's", 50 * KIB)))
        name = pack_name(repository.store.index.pack_ref(place.pack))
    unneeded = repo.root / name
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
        assert prune(repo, unused_share=0.0).removed_packs == (0 if is_lost else 1)
    assert unneeded.exists() == is_lost
    assert contents(repo) == before
    # When the disk has recovered it is found there.
    prune(repo)
    assert contents(repo) == before


def test_prune_loses_nothing_where_the_index_lists_less_than_it_knew(
    repo: RepositoryFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where LMDB was given a damaged list of free pages and wrote over some that were in use."""
    before, packs = one_of_two_forgotten(repo)
    needed = digest_of(noise("b", 50 * KIB))
    blobs = Index.blobs

    def forgetful(self: Index, batch: int = 10_000) -> Iterator[tuple[Digest, Location]]:
        return (item for item in blobs(self, batch) if item[0] != needed)

    with monkeypatch.context() as patch:
        patch.setattr(Index, "blobs", forgetful)
        with pytest.raises(IndexUnusableError, match=r"lists only \d+ of the \d+ needed blobs"):
            prune(repo, unused_share=0.0)
    assert pack_paths(repo.root) == packs
    assert contents(repo) == before
    assert prune(repo).removed_packs == 1


@pytest.mark.parametrize("checked", [True, False], ids=["marked", "not known"])
def test_prune_copies_the_only_intact_copy_of_a_needed_blob_before_its_pack_goes(
    repo: RepositoryFixture, tmp_path: Path, checked: bool
) -> None:
    """Two backups may have stored the same; the index names one of the packs, and that one rots."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(noise("needed", 40 * KIB))
    _, snapshot = repo.back_up(source)
    assert snapshot.root.tree is not None
    tree = Digest(snapshot.root.tree.digest)
    with repo.reading() as repository:
        copies = [noise("needed", 40 * KIB), repository.store.read(tree)]
    data, _ = make_pack(copies)
    add_pack(repo.root, data)
    before = contents(repo)
    repo.damage(tree)
    repo.damage(digest_of(copies[0]))
    if checked:
        with open_for_reading(repo.root, reader="check", may_write_index=True) as repository:
            Checker(repository, RecordingMonitor()).check(PackSelection())
    assert contents(repo) == before
    prune(repo, unused_share=0.0)
    assert contents(repo) == before
    prune(repo, unused_share=0.0)
    assert contents(repo) == before
    assert_intact(repo)
