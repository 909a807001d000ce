"""The scenarios of the race matrix: what a repository holds at the beginning, and which hosts then do what.

A scenario runs one schedule at a time, each from a copy of its beginning. After it, every published snapshot
must be whole, now and after two further prunes. The margin is 0: whatever waits for a margin has waited long
enough at any moment, so every schedule stands for one in which a host sleeps longer than every margin.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from casfs.backup.run import BackupOptions, run_backup
from casfs.digest import SnapshotId
from casfs.errors import CasfsError
from casfs.format.tree import NodeType
from casfs.maintenance.copy import SnapshotCopier
from casfs.maintenance.drafts import ABANDONED_NS
from casfs.maintenance.prune_plan import PruneOptions
from casfs.maintenance.prune_result import NeededBlobsUnknownError
from casfs.maintenance.repair import SnapshotRepairer, repair_index
from casfs.maintenance.rewrite import rewrite_snapshot
from casfs.maintenance.shared_prune import OtherPruneError, SharedPruner
from casfs.monitor import RecordingMonitor
from casfs.patterns import parse_pattern
from casfs.repository.creation import create_repository
from casfs.repository.opening import (
    OpenOptions,
    open_for_maintenance,
    open_for_reading,
    open_for_writing,
)
from casfs.repository.repository import Repository
from casfs.storage.base import Storage
from casfs.storage.locks import LockMode
from casfs.storage.memory import MemoryStorage
from casfs.storage.url import Scheme, StorageAddress
from casfs.trees.file_content import FileContent
from casfs.trees.walk import walk_pages
from tests.support.far_repository import HostPlace
from tests.support.interleaving import (
    Chooser,
    Fault,
    Host,
    HostDied,
    Interleaving,
    by_chance,
    by_list,
    by_turns,
    faults_of,
)
from tests.support.storage_double import Call

OPTIONS = OpenOptions(sync=False)


def place_of(storage: Storage, cache: Path) -> HostPlace:
    return HostPlace(
        StorageAddress(Scheme.S3, "r", bucket="bucket"), storage=storage, cache=cache / "host"
    )


Work = Callable[[Storage, Path], None]


def backup(source: Path, host: str) -> Work:
    def work(storage: Storage, cache: Path) -> None:
        with open_for_writing(place_of(storage, cache), "backup", OPTIONS) as repository:
            _back_up(repository, source, host)

    return work


def _back_up(repository: Repository, source: Path, host: str) -> SnapshotId:
    options = BackupOptions((bytes(source),), host=host, patience_s=0.0)
    snapshot_id = run_backup(repository, options, RecordingMonitor()).snapshot_id
    assert snapshot_id is not None
    return snapshot_id


def prune(times: int = 1, unused_share: float = 0.25) -> Work:
    def work(storage: Storage, cache: Path) -> None:
        for _ in range(times):
            _prune(storage, cache, unused_share)

    return work


def _prune(
    storage: Storage, cache: Path, unused_share: float, abandoned_ns: int = ABANDONED_NS
) -> None:
    with open_for_maintenance(place_of(storage, cache), "prune", OPTIONS) as repository:
        options = PruneOptions(unused_share, margin_s=0)
        SharedPruner(repository, options, RecordingMonitor(), abandoned_ns).prune()


def prune_and_drop_drafts(times: int) -> Work:
    """Return prunes that take the writer of every draft for dead."""

    def work(storage: Storage, cache: Path) -> None:
        for _ in range(times):
            _prune(storage, cache, 0.25, abandoned_ns=0)

    return work


def tag(host: str) -> Work:
    def work(storage: Storage, cache: Path) -> None:
        with open_for_writing(place_of(storage, cache), "tag", OPTIONS) as repository:
            for snapshot_id, snapshot in list(repository.snapshots.iterate()):
                if snapshot.host == host:
                    repository.snapshots.retag(snapshot_id, snapshot, ("tagged",))

    return work


def forget(host: str) -> Work:
    def work(storage: Storage, cache: Path) -> None:
        with open_for_maintenance(
            place_of(storage, cache), "forget", OPTIONS, LockMode.SHARED
        ) as repository:
            for snapshot_id, snapshot in list(repository.snapshots.iterate()):
                if snapshot.host == host:
                    repository.snapshots.delete(snapshot_id)

    return work


def rewrite(host: str, exclude: bytes) -> Work:
    """Leave what a pattern matches out of the snapshots of a host."""

    def work(storage: Storage, cache: Path) -> None:
        with open_for_maintenance(place_of(storage, cache), "rewrite", OPTIONS) as repository:
            for snapshot_id, snapshot in list(repository.snapshots.iterate()):
                if snapshot.host == host:
                    patterns = [parse_pattern(exclude)]
                    rewrite_snapshot(
                        repository, snapshot_id, snapshot, patterns, RecordingMonitor()
                    )

    return work


def copy_from(other: Path) -> Work:
    """Copy the snapshots of a local repository."""

    def work(storage: Storage, cache: Path) -> None:
        with (
            open_for_reading(other) as reading,
            open_for_writing(place_of(storage, cache), "copy", OPTIONS) as writing,
        ):
            copier = SnapshotCopier(reading, writing, RecordingMonitor())
            for snapshot_id, snapshot in list(reading.snapshots.iterate()):
                copier.copy(snapshot_id, snapshot)

    return work


def repair_snapshots(lost: frozenset[SnapshotId]) -> Work:
    """Repair the snapshots, of which only those in `lost` may have lost data."""

    def work(storage: Storage, cache: Path) -> None:
        with open_for_maintenance(
            place_of(storage, cache), "repair snapshots", OPTIONS
        ) as repository:
            result = SnapshotRepairer(repository, RecordingMonitor()).repair()
        found = {one.snapshot_id for one in result.repaired}
        assert found <= lost, "a repair took an intact snapshot for a damaged one"

    return work


def rebuild_index() -> Work:
    def work(storage: Storage, cache: Path) -> None:
        with open_for_maintenance(
            place_of(storage, cache), "repair index", OPTIONS, LockMode.EXCLUSIVE
        ) as repository:
            repair_index(repository, RecordingMonitor())

    return work


class Stage:
    """The beginning of every run of a scenario: a storage, and what the hosts know of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.lost: frozenset[SnapshotId] = frozenset()
        """The snapshots that have lost data before the runs begin."""

        self.storage = MemoryStorage("s3://bucket/r")
        create_repository(place_of(self.storage, folder / "maker"))

    def source(self, name: str, **files: bytes) -> Path:
        """Return a new folder with these files."""
        folder = self.folder / "sources" / name
        folder.mkdir(parents=True)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        return folder

    def act(self, host: str, work: Work) -> None:
        """Let a host do something before the runs begin."""
        work(self.storage, self.folder / "caches" / host)

    @contextmanager
    def run(self) -> Iterator[tuple[MemoryStorage, Path]]:
        """Yield a copy of the storage and a folder with copies of what the hosts know."""
        folder = self.folder / "run"
        storage = MemoryStorage("s3://bucket/r")
        storage._objects = dict(self.storage._objects)
        if (self.folder / "caches").exists():
            shutil.copytree(self.folder / "caches", folder)
        try:
            yield storage, folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def require_whole(
    storage: Storage, cache: Path, lost: frozenset[SnapshotId] = frozenset()
) -> set[SnapshotId]:
    """Read every published snapshot to the last byte, as a host that never saw the repository.

    Return the ids of all snapshots; those in `lost` are not read.
    """
    with open_for_reading(place_of(storage, cache)) as repository:
        ids = set(repository.snapshots.ids())
        for snapshot_id in ids - lost:
            root = repository.snapshots.load(snapshot_id).root
            assert root.tree is not None
            for _, node in walk_pages(
                b"", root.tree, lambda page: repository.trees.children(page.ref)
            ):
                if node.kind == NodeType.FILE:
                    content = FileContent(node, repository.content(node), repository.store.read)
                    assert sum(part.length for part in content.parts()) == node.size
        return ids


Cast = Callable[[Stage], dict[str, Work]]
"""Returns the hosts with their work."""


class Scenario:
    """Hosts with their work, and the state in which they begin."""

    def __init__(self, folder: Path, begin: Callable[[Path], Stage], cast: Cast) -> None:
        self.stage = begin(folder)
        self.hosts = cast(self.stage)

    def run(
        self, choose: Chooser, faults: dict[str, tuple[int, Fault]] | None = None
    ) -> Interleaving:
        """Run one schedule; then nothing may be lost, now and after two further prunes."""
        lost = self.stage.lost
        with self.stage.run() as (storage, folder):
            hosts = [self._host(name, folder, (faults or {}).get(name)) for name in self.hosts]
            run = Interleaving(storage, hosts)
            run.run(choose)
            try:
                for host in hosts:
                    if host.error is not None and not self._is_allowed(host, bool(faults)):
                        raise host.error
                published = require_whole(storage, folder / "reader 1", lost)
                # A prune refuses to work beside a snapshot that has lost data.
                if not published & lost:
                    prune(2)(storage, folder / "last")
                    require_whole(storage, folder / "reader 2", lost)
            except BaseException as error:
                made = [f"{hosts[one.chosen].name}" for one in run.choices]
                error.add_note(f"schedule: {[one.chosen for one in run.choices]} {made}")
                error.add_note(f"faults: {faults}")
                raise
        return run

    @cached_property
    def faults(self) -> dict[str, dict[Fault, list[int]]]:
        """The calls of each host, in a run without faults or preemptions, at which each fault can happen."""
        found: dict[str, dict[Fault, list[int]]] = {name: {} for name in self.hosts}
        quiet = self.run(by_list([]))
        for name, number, fault in faults_of({host.name: host.calls for host in quiet.hosts}):
            found[name].setdefault(fault, []).append(number)
        return found

    def calls_of(self, name: str) -> list[Call]:
        """Return the calls of a host that goes on to its end before any other one begins."""
        number = list(self.hosts).index(name)
        return self.run(by_turns([(number, None)])).hosts[number].calls

    def by_chance(self, chance: random.Random) -> tuple[Chooser, dict[str, tuple[int, Fault]]]:
        """Return a schedule, and faults of some hosts, all by chance."""
        faults = {}
        for name, possible in self.faults.items():
            if chance.random() < 0.4:
                fault = chance.choice(sorted(possible))
                faults[name] = chance.choice(possible[fault]), fault
        return by_chance(chance, chance.choice([0.03, 0.1, 0.3, 0.6])), faults

    def _is_allowed(self, host: Host, has_faults: bool) -> bool:
        """Return whether a host may end with its error: it died, or reports that its work is not done."""
        error = host.error
        if isinstance(error, OtherPruneError):
            return True
        if self.stage.lost and isinstance(error, NeededBlobsUnknownError):
            return True
        return has_faults and isinstance(error, HostDied | CasfsError)

    def _host(self, name: str, folder: Path, fault: tuple[int, Fault] | None) -> Host:
        work = self.hosts[name]
        at, kind = fault if fault is not None else (-1, None)
        return Host(name, lambda storage: work(storage, folder / name), kind, at)


def old_data(folder: Path) -> Stage:
    """Return a stage whose data `common` is in a pack that no snapshot needs."""
    stage = Stage(folder)
    stage.act("setup", backup(stage.source("kept", kept=b"kept" * 50), "kept"))
    stage.act("setup", backup(stage.source("old", common=b"common" * 50, old=b"old" * 50), "old"))
    stage.act("setup", forget("old"))
    return stage


def with_notice(folder: Path) -> Stage:
    """Return a stage whose data `common` is in a pack under notice."""
    stage = old_data(folder)
    stage.act("setup", prune())
    assert list(stage.storage.list("condemned"))
    return stage


def stored_twice(folder: Path) -> Stage:
    """Return a stage in which two packs hold the same data, and two hosts rely on one each."""
    stage = Stage(folder)
    first = stage.source("first", common=b"common" * 50, first=b"first" * 50)
    second = stage.source("second", common=b"common" * 50, second=b"second" * 50)
    place = place_of(stage.storage, folder / "caches" / "P")
    other = place_of(stage.storage, folder / "caches" / "Q")
    with (
        open_for_writing(place, "backup", OPTIONS) as one,
        open_for_writing(other, "backup", OPTIONS) as another,
    ):
        _back_up(one, first, "kept")
        _back_up(another, second, "second")
    return stage


def with_losses(folder: Path) -> Stage:
    """Return a stage with data that no snapshot needs, and a snapshot that has lost one of its two files."""
    stage = old_data(folder)
    before = set(stage.storage.list("packs"))
    known = set(stage.storage.list("snapshots"))
    files = {"common": b"common" * 50, "lost": b"lost" * 50}
    stage.act("setup", backup(stage.source("damaged", **files), "damaged"))
    (new,) = set(stage.storage.list("packs")) - before
    stage.storage.delete(new.name)
    (snapshot,) = set(stage.storage.list("snapshots")) - known
    stage.lost = frozenset([SnapshotId(bytes.fromhex(snapshot.name.rpartition("/")[2]))])
    return stage


BEGINNINGS = {
    "data that no snapshot needs": old_data,
    "data under notice": with_notice,
    "data that is stored twice": stored_twice,
}


def two_writers_and_two_prunes(stage: Stage) -> dict[str, Work]:
    a, b = _sources(stage)
    return {"A": backup(a, "A"), "B": backup(b, "B"), "P": prune(2), "Q": prune(2)}


def a_tag_a_forget_and_a_prune(stage: Stage) -> dict[str, Work]:
    a, _ = _sources(stage)
    return {"A": backup(a, "A"), "T": tag("kept"), "F": forget("kept"), "P": prune(2)}


def prunes_that_repack(stage: Stage) -> dict[str, Work]:
    a, _ = _sources(stage)
    return {"A": backup(a, "A"), "P": prune(2, 0.0), "Q": prune(2, 0.0)}


def a_copy_and_two_prunes(stage: Stage) -> dict[str, Work]:
    other = stage.folder / "other"
    create_repository(other)
    with open_for_writing(other, "backup", OPTIONS) as repository:
        for source, host in zip(_sources(stage), "AB", strict=True):
            _back_up(repository, source, host)
    return {"C": copy_from(other), "P": prune(2), "Q": prune(2)}


def a_backup_of_what_was_forgotten_and_two_prunes(stage: Stage) -> dict[str, Work]:
    """The new pack may have the bytes of the pack that a prune removes."""
    _, b = _sources(stage)
    return {"B": backup(b, "B"), "P": prune(2), "Q": prune(2)}


def a_rewrite_a_backup_and_a_prune(stage: Stage) -> dict[str, Work]:
    """A snapshot loses a file, and another host backs up the same file again."""
    a, _ = _sources(stage)
    stage.act("setup", backup(stage.source("c", common=b"common" * 50, c=b"c" * 50), "C"))
    return {"R": rewrite("C", b"common"), "A": backup(a, "A"), "P": prune(2, 0.0)}


def a_repair_a_backup_and_a_prune(stage: Stage) -> dict[str, Work]:
    a, _ = _sources(stage)
    return {"S": repair_snapshots(stage.lost), "A": backup(a, "A"), "P": prune(2)}


def a_new_index_a_backup_and_a_prune(stage: Stage) -> dict[str, Work]:
    a, _ = _sources(stage)
    return {"I": rebuild_index(), "A": backup(a, "A"), "P": prune(2)}


def writers_and_prunes_that_drop_drafts(stage: Stage) -> dict[str, Work]:
    a, _ = _sources(stage)
    return {
        "A": backup(a, "A"),
        "T": tag("kept"),
        "P": prune_and_drop_drafts(3),
        "Q": prune_and_drop_drafts(2),
    }


def a_sleeper_and_prunes_that_drop_drafts(stage: Stage) -> dict[str, Work]:
    a, _ = _sources(stage)
    return {"A": backup(a, "A"), "P": prune_and_drop_drafts(3)}


CASTS: list[Cast] = [
    two_writers_and_two_prunes,
    a_tag_a_forget_and_a_prune,
    prunes_that_repack,
    a_copy_and_two_prunes,
    a_backup_of_what_was_forgotten_and_two_prunes,
    a_rewrite_a_backup_and_a_prune,
    a_repair_a_backup_and_a_prune,
    a_new_index_a_backup_and_a_prune,
]

SCENARIOS = [
    *((beginning, cast) for beginning in BEGINNINGS.values() for cast in CASTS),
    (with_losses, a_repair_a_backup_and_a_prune),
]
"""Every beginning with every cast, each as two functions."""


def _sources(stage: Stage) -> tuple[Path, Path]:
    """Return two sources that share data; the second has the same files as the forgotten snapshot `old`."""
    return (
        stage.source("a", common=b"common" * 50, a=b"a" * 50),
        stage.source("b", common=b"common" * 50, old=b"old" * 50),
    )
