"""A repository on a real server behind a proxy that fails, and what must be true of it at any time."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

from casfs.backup.run import BackupOptions, run_backup
from casfs.digest import SnapshotId
from casfs.maintenance.check import Checker
from casfs.maintenance.scrub import PackSelection
from casfs.monitor import RecordingMonitor
from casfs.repository.creation import create_repository
from casfs.repository.opening import open_for_reading, open_for_writing
from casfs.repository.place import RemotePlace
from casfs.restore.restorer import RestoreOptions, Restorer
from casfs.storage.base import StorageOptions
from casfs.storage.url import parse_address
from tests.support.faulty_proxy import FaultyProxy
from tests.support.remote import RemoteCasfs
from tests.support.servers import S3Server
from tests.support.stores import noise

_serials = itertools.count()


@dataclass(slots=True)
class NetworkScene:
    """A repository behind the proxy, a source, and what was published of it: states by snapshot."""

    server: S3Server
    proxy: FaultyProxy
    folder: Path
    url: str
    published: dict[SnapshotId, Path] = field(default_factory=dict)

    @staticmethod
    def create(server: S3Server, proxy: FaultyProxy, folder: Path, url: str) -> NetworkScene:
        """Return a scene with a source and two snapshots of it."""
        scene = NetworkScene(server, proxy, folder, url)
        (scene.source / "folder" / "deeper").mkdir(parents=True)
        for number in range(20):
            (scene.source / "folder" / f"{number}").write_bytes(noise(f"file {number}", 2000))
        (scene.source / "folder" / "deeper" / "large").write_bytes(noise("large", 700_000))
        proxy.begin()
        create_repository(scene.place())
        for _ in range(2):
            scene.change()
            scene.published[scene.back_up()] = scene.source
        return scene

    def place(self, endpoint: str | None = None) -> RemotePlace:
        options = StorageOptions(
            endpoint=endpoint or self.proxy.endpoint,
            region="us-east-1",
            access_key_id=self.server.access_key_id,
            secret_access_key=self.server.secret_access_key,
        )
        return RemotePlace(parse_address(self.url), options)

    @property
    def direct(self) -> RemotePlace:
        """The same place without the proxy."""
        return self.place(self.server.endpoint)

    def host(self, home: Path) -> RemoteCasfs:
        """Return the command of a host, which reaches the server through the proxy."""
        variables = {**self.server.variables(), "AWS_ENDPOINT_URL": self.proxy.endpoint}
        return RemoteCasfs(None, home, self.url, variables)

    @property
    def source(self) -> Path:
        return self.folder / "source"

    def change(self) -> None:
        """Change the source, so that a backup has something to store."""
        number = next(_serials)
        (self.source / "changing").write_bytes(noise(f"{number}", 30_000))
        (self.source / "folder" / f"new {number}").write_bytes(noise(f"new {number}", 1000))

    def back_up(self) -> SnapshotId:
        options = BackupOptions(paths=(bytes(self.source),), host="here")
        with open_for_writing(self.place(), "backup") as repository:
            result = run_backup(repository, options, RecordingMonitor())
        assert result.snapshot_id is not None
        return result.snapshot_id

    def ids(self, place: RemotePlace) -> set[SnapshotId]:
        with open_for_reading(place) as repository:
            return set(repository.snapshots.ids())

    def must_list(self, *maybe: SnapshotId) -> None:
        """Require that what was published is listed, and nothing else but `maybe`."""
        found = self.ids(self.direct)
        assert set(self.published) <= found <= {*self.published, *maybe}

    def must_be_intact(self) -> None:
        """Verify every byte at the server, and restore every snapshot."""
        with open_for_reading(self.direct) as repository:
            result = Checker(repository, RecordingMonitor()).check(PackSelection())
            assert result.damage == []
            for number, snapshot_id in enumerate(sorted(repository.snapshots.ids())):
                root = repository.snapshots.load(snapshot_id).root
                target = self.folder / f"restored {number}"
                restorer = Restorer(repository, RestoreOptions(), RecordingMonitor())
                restored = restorer.restore(b"", root, bytes(target), with_root=False)
                assert (restored.damaged, restored.failed) == (0, 0)
