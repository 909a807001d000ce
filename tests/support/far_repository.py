"""A repository in a place that several hosts reach over a network, all of them in this process."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from casfs.backup.run import BackupOptions, run_backup
from casfs.crypto.recipients import Recipient
from casfs.digest import SnapshotId
from casfs.format.config import RepositoryConfig
from casfs.format.pack import PackRef
from casfs.format.versions import DEFAULT_FORMAT
from casfs.maintenance.prune_plan import PruneOptions
from casfs.maintenance.prune_result import PruneResult
from casfs.maintenance.shared_prune import SharedPruner, new_pruner
from casfs.monitor import RecordingMonitor
from casfs.repository.creation import create_repository
from casfs.repository.needed_blobs import NeededBlobs
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
from casfs.store.blob_store import pack_name
from casfs.store.pending_removal import packs_pending_removal
from tests.support.storage_double import RecordingStorage

HOUR_NS = 3_600_000_000_000


@dataclass(frozen=True)
class HostPlace(RemotePlace):
    """The repository as one host sees it: with a cache folder of its own."""

    storage: Storage = field(default_factory=MemoryStorage)
    cache: Path = Path()

    def open_storage(self, *arguments: object, **options: object) -> Storage:
        return self.storage

    def index_dir(self, config: RepositoryConfig) -> Path:
        self.cache.mkdir(exist_ok=True, parents=True)
        return self.cache / "index"


class FarRepository:
    """A repository in a place whose clock (`now_ns`) the test moves, and the hosts that use it.

    All hosts share `storage`, which records their calls; `memory` is behind it. Without `is_made` the place
    is empty, for a mirror.
    """

    def __init__(
        self,
        folder: Path,
        recipients: Sequence[Recipient] = (),
        format_: int = DEFAULT_FORMAT,
        is_made: bool = True,
    ) -> None:
        self.folder = folder
        self.now_ns = time.time_ns()
        self.memory = MemoryStorage("s3://bucket/r", self._tick)
        self.storage = RecordingStorage(self.memory)
        if is_made:
            create_repository(self.host("first"), recipients, format_=format_)

    def _tick(self) -> int:
        self.now_ns += 1
        return self.now_ns

    def host(self, name: str) -> HostPlace:
        address = StorageAddress(Scheme.S3, "r", bucket="bucket")
        return HostPlace(address, storage=self.storage, cache=self.folder / name)

    @contextmanager
    def writing(self, host: str = "first", command: str = "backup") -> Iterator[Repository]:
        with open_for_writing(self.host(host), command, OpenOptions(sync=False)) as repository:
            yield repository

    def source(self, name: str, **files: bytes) -> Path:
        """Return the folder of a source, after these files were written there."""
        source = self.folder / "sources" / name
        source.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (source / file).write_bytes(content)
        return source

    def back_up(self, name: str, host: str = "first", **files: bytes) -> SnapshotId:
        """Back up a folder with these files."""
        source = self.source(name, **files)
        with self.writing(host) as repository:
            options = BackupOptions((bytes(source),), host=name, patience_s=0.0)
            found = run_backup(repository, options, RecordingMonitor()).snapshot_id
        assert found is not None
        return found

    def forget(self, snapshot_id: SnapshotId) -> None:
        with self.writing(command="forget") as repository:
            repository.snapshots.delete(snapshot_id)

    @contextmanager
    def pruning(self, host: str = "first", **options: float | bool) -> Iterator[SharedPruner]:
        with open_for_maintenance(self.host(host), "prune", OpenOptions(sync=False)) as repository:
            chosen = PruneOptions(**options)  # type: ignore[arg-type]
            pruner = new_pruner(repository, chosen, RecordingMonitor())
            assert isinstance(pruner, SharedPruner)
            yield pruner

    def prune(self, host: str = "first", **options: float | bool) -> PruneResult:
        with self.pruning(host, **options) as pruner:
            return pruner.prune()

    def remove_packs(
        self, host: str = "pruner", merges: bool = False, keeps: Collection[str] = ()
    ) -> None:
        """Remove all packs as the prune of a host does: from its index, by a delta, then from the storage.

        Those of the names in `keeps` stay. With `merges` it then replaces all deltas by one, which no longer
        names them, and deletes the others.
        """
        with open_for_maintenance(self.host(host), "prune", OpenOptions(sync=False)) as repository:
            index = repository.store.index
            going = {
                record.ordinal: record.pack
                for record in index.packs()
                if pack_name(record.pack) not in keeps
            }
            assert index.remove_packs(going)
            if repository.deltas is not None:
                repository.deltas.publish()
            for pack in going.values():
                self.memory.delete(pack_name(pack))
            if merges:
                assert repository.deltas is not None
                repository.deltas.merge(0)
                repository.deltas.merge(0)

    def packs(self) -> set[str]:
        return {one.name for prefix in ("packs", "meta") for one in self.memory.list(prefix)}

    def names(self, prefix: str) -> list[str]:
        return [one.name for one in self.memory.list(prefix)]

    def pack_refs(self) -> set[PackRef]:
        with open_for_reading(self.host("lister")) as repository:
            return {pack for pack, _ in repository.store.stored_packs()}

    def pack_refs_under_notice(self) -> set[PackRef]:
        return packs_pending_removal(self.memory)

    @staticmethod
    def name_of(pack: PackRef) -> str:
        return pack_name(pack)

    def require_whole(self, *snapshot_ids: SnapshotId) -> None:
        """Read what snapshots need (all if none is named), as a host that never saw the repository."""
        with open_for_reading(self.host(f"reader {self.now_ns}")) as repository:
            read: list[bytes] = []
            needed = NeededBlobs(
                repository, on_blob=lambda digest, _: read.append(repository.store.read(digest))
            )
            for snapshot_id in snapshot_ids or repository.snapshots.ids():
                needed.add(repository.snapshots.load(snapshot_id).root)
            assert read
