"""Machines with their own states that share one encrypted repository in a folder."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from casfs.backup.run import BackupOptions, BackupResult, run_backup
from casfs.backup.stability import is_racy
from casfs.cli.app import casfs
from casfs.cli.settings import Settings
from casfs.crypto.recipients import Recipient
from casfs.digest import SnapshotId
from casfs.monitor import RecordingMonitor
from casfs.repository.creation import create_repository
from casfs.repository.opening import OpenOptions, open_for_reading, open_for_writing
from tests.support.encryption import RECIPIENT, SECRET, unlock
from tests.support.waiting import wait_until

OPTIONS = OpenOptions(unlock=unlock, sync=False)
"""How a machine with the identity of `RECIPIENT` opens the repository."""

WRITE_ONLY = OpenOptions(allow_no_identity=True, sync=False)


class Fleet:
    """Machines with an identity of the same repository, each with its own state and cache."""

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        format_: int = 2,
        recipients: Sequence[Recipient] = (RECIPIENT,),
    ) -> None:
        self.folder = folder
        self.root = folder / "repository"
        self.source = folder / "source"
        self.source.mkdir()
        (self.source / "file").write_bytes(b"content")
        (folder / "identity").write_text(SECRET + "\n")
        (folder / "identity").chmod(0o600)
        self._monkeypatch = monkeypatch
        with self.on("admin"):
            create_repository(self.root, recipients, format_=format_)

    @contextmanager
    def on(self, machine: str) -> Iterator[None]:
        """Be a machine."""
        with self._monkeypatch.context() as patch:
            patch.setenv("XDG_STATE_HOME", str(self.folder / machine / "state"))
            patch.setenv("XDG_CACHE_HOME", str(self.folder / machine / "cache"))
            (self.folder / machine).mkdir(mode=0o700, exist_ok=True)
            yield

    def back_up(
        self, machine: str, host: str | None = None, options: OpenOptions = OPTIONS
    ) -> BackupResult:
        """Publish a snapshot of a machine in the name of a host, by default its own."""
        # The next backup trusts no file whose times are those of this moment.
        wait_until(
            lambda: (
                not any(is_racy(path.lstat(), time.time_ns()) for path in self.source.iterdir())
            ),
            "files older than a tick of the clock",
        )
        chosen = BackupOptions(paths=(os.fsencode(self.source),), host=host or machine)
        with self.on(machine), open_for_writing(self.root, "backup", options) as repository:
            return run_backup(repository, chosen, RecordingMonitor())

    def proven(self, machine: str, options: OpenOptions = OPTIONS) -> dict[SnapshotId, bool]:
        """Return what a machine thinks of each snapshot."""
        with self.on(machine), open_for_reading(self.root, options) as repository:
            store = repository.snapshots
            return {one: store.provenance.is_from_trusted_writer(one) for one in store.ids()}

    def run(self, machine: str, *arguments: str, with_identity: bool = True) -> Result:
        """Run a command on a machine."""
        with self.on(machine), self._monkeypatch.context() as patch:
            if with_identity:
                patch.setenv("CASFS_IDENTITY", str(self.folder / "identity"))
            result = CliRunner().invoke(
                casfs,
                [*arguments, "--repo", str(self.root)],
                obj=Settings(),
                standalone_mode=False,
            )
        if result.exception is not None:
            raise result.exception
        return result


def id_of(result: BackupResult) -> SnapshotId:
    """Return the id of the snapshot that a backup published."""
    assert result.snapshot_id is not None
    return result.snapshot_id
