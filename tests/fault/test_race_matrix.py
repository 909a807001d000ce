"""Writers, prunes and other commands of several hosts at once, stepped through their storage calls.

Nothing that a host can do at any moment, and no request that takes effect late, leaves a published snapshot
without its data. The margin is 0 here: whatever waits for a margin has waited long enough at any moment, so
every schedule stands for one in which a host sleeps longer than every margin and goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from casfs.backup.run import BackupOptions, run_backup
from casfs.digest import SnapshotId
from casfs.errors import CasfsError
from casfs.format.config import RepositoryConfig
from casfs.format.tree import NodeType
from casfs.maintenance.prune_plan import PruneOptions
from casfs.maintenance.shared_prune import OtherPruneError, SharedPruner
from casfs.monitor import RecordingMonitor
from casfs.repository.creation import create_repository
from casfs.repository.opening import (
    OpenOptions,
    open_for_maintenance,
    open_for_reading,
    open_for_writing,
)
from casfs.repository.place import RemotePlace
from casfs.repository.repository import Repository
from casfs.storage.base import Storage
from casfs.storage.memory import MemoryStorage
from casfs.storage.url import Scheme, StorageAddress
from casfs.trees.file_content import FileContent
from casfs.trees.walk import walk_pages
from tests.support.effort import EFFORT, dice
from tests.support.interleaving import (
    Chooser,
    Fault,
    Host,
    HostDied,
    Interleaving,
    by_chance,
    by_list,
    explore,
    faults_of,
)

OPTIONS = OpenOptions(sync=False)


@dataclass(frozen=True)
class HostPlace(RemotePlace):
    """The repository as one host sees it: with a storage and a cache folder of its own."""

    storage: Storage = field(default_factory=MemoryStorage)
    cache: Path = Path()

    def open_storage(self, *arguments: object, **options: object) -> Storage:
        return self.storage

    def index_dir(self, config: RepositoryConfig) -> Path:
        self.cache.mkdir(exist_ok=True, parents=True)
        return self.cache / "index"


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


def _prune(storage: Storage, cache: Path, unused_share: float) -> None:
    with open_for_maintenance(place_of(storage, cache), "prune", OPTIONS) as repository:
        options = PruneOptions(unused_share, margin_s=0)
        SharedPruner(repository, options, RecordingMonitor()).prune()


def tag(host: str) -> Work:
    def work(storage: Storage, cache: Path) -> None:
        with open_for_writing(place_of(storage, cache), "tag", OPTIONS) as repository:
            for snapshot_id, snapshot in list(repository.snapshots.iterate()):
                if snapshot.host == host:
                    repository.snapshots.retag(snapshot_id, snapshot, ("tagged",))

    return work


def forget(host: str) -> Work:
    def work(storage: Storage, cache: Path) -> None:
        with open_for_writing(place_of(storage, cache), "forget", OPTIONS) as repository:
            for snapshot_id, snapshot in list(repository.snapshots.iterate()):
                if snapshot.host == host:
                    repository.snapshots.delete(snapshot_id)

    return work


class Stage:
    """The beginning of every run of a scenario: a storage, and what the hosts know of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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


def require_whole(storage: Storage, cache: Path) -> int:
    """Read every published snapshot to the last byte, as a host that never saw the repository."""
    with open_for_reading(place_of(storage, cache)) as repository:
        ids = repository.snapshots.ids()
        for snapshot_id in ids:
            root = repository.snapshots.load(snapshot_id).root
            assert root.tree is not None
            for _, node in walk_pages(
                b"", root.tree, lambda page: repository.trees.children(page.ref)
            ):
                if node.kind == NodeType.FILE:
                    content = FileContent(node, repository.content(node), repository.store.read)
                    assert sum(part.length for part in content.parts()) == node.size
        return len(ids)


@dataclass
class Scenario:
    """Hosts with their work, and the state in which they begin."""

    stage: Stage
    hosts: dict[str, Work]

    def run(
        self, choose: Chooser, faults: dict[str, tuple[int, Fault]] | None = None
    ) -> Interleaving:
        """Run one schedule; then nothing may be lost, now and after two further prunes."""
        with self.stage.run() as (storage, folder):
            hosts = [self._host(name, folder, (faults or {}).get(name)) for name in self.hosts]
            run = Interleaving(storage, hosts)
            run.run(choose)
            try:
                for host in hosts:
                    if host.error is not None and not _is_allowed(host.error, bool(faults)):
                        raise host.error
                require_whole(storage, folder / "reader 1")
                prune(2)(storage, folder / "last")
                require_whole(storage, folder / "reader 2")
            except BaseException as error:
                made = [f"{hosts[one.chosen].name}" for one in run.choices]
                error.add_note(f"schedule: {[one.chosen for one in run.choices]} {made}")
                error.add_note(f"faults: {faults}")
                raise
        return run

    def _host(self, name: str, folder: Path, fault: tuple[int, Fault] | None) -> Host:
        work = self.hosts[name]
        at, kind = fault if fault is not None else (-1, None)
        return Host(name, lambda storage: work(storage, folder / name), kind, at)


def _is_allowed(error: BaseException, has_faults: bool) -> bool:
    """Return whether a host may end with this error: it is dead, or says that it did not do its work."""
    return isinstance(error, OtherPruneError) or (
        has_faults and isinstance(error, HostDied | CasfsError)
    )


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


def _sources(stage: Stage) -> tuple[Path, Path]:
    """Return two sources that share data with each other and with what is stored."""
    return (
        stage.source("a", common=b"common" * 50, a=b"a" * 50),
        stage.source("b", common=b"common" * 50, b=b"b" * 50),
    )


@pytest.fixture(params=sorted(BEGINNINGS))
def stage(request: pytest.FixtureRequest, tmp_path: Path, own_home: Path) -> Stage:
    return BEGINNINGS[request.param](tmp_path)


CAST = [two_writers_and_two_prunes, a_tag_a_forget_and_a_prune, prunes_that_repack]

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.timeout(300 * EFFORT),
]


@pytest.mark.parametrize("cast", CAST)
def test_no_interleaving_loses_data_of_a_published_snapshot(
    stage: Stage, cast: Callable[[Stage], dict[str, Work]]
) -> None:
    """All schedules with one preemption in a long run, 8 of them in a short one."""
    scenario = Scenario(stage, cast(stage))
    limit = 8 if EFFORT == 1 else None
    explore(lambda choose: scenario.run(choose).choices, 1, limit, dice())


@pytest.mark.parametrize("cast", CAST)
def test_no_fault_at_any_call_loses_data_of_a_published_snapshot(
    stage: Stage, cast: Callable[[Stage], dict[str, Work]]
) -> None:
    """Every fault at every call of every host in a long run, 8 in a short one; the others go on by chance."""
    scenario, chance = Scenario(stage, cast(stage)), dice()
    quiet = scenario.run(by_list([]))
    cases = list(faults_of({host.name: host.calls for host in quiet.hosts}))
    if EFFORT == 1:
        cases = chance.sample(cases, 8)
    for name, number, fault in cases:
        scenario.run(by_chance(chance, 0.2), {name: (number, fault)})


@pytest.mark.parametrize("cast", CAST)
def test_no_faults_at_random_lose_data_of_a_published_snapshot(
    stage: Stage, cast: Callable[[Stage], dict[str, Work]]
) -> None:
    scenario, chance = Scenario(stage, cast(stage)), dice()
    for _ in range(8 * EFFORT):
        faults = {
            name: (chance.randrange(40), chance.choice(list(Fault)))
            for name in scenario.hosts
            if chance.random() < 0.4
        }
        scenario.run(by_chance(chance, chance.choice([0.03, 0.1, 0.3, 0.6])), faults)
