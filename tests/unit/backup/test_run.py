"""What a backup decides before it reads and after it has read its sources."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from pathlib import Path

import pytest

from casfs.backup.owner_names import MAX_OWNER_NAMES_BYTES
from casfs.backup.run import BackupOptions, run_backup
from casfs.errors import UsageError
from casfs.format.snapshot import encode_snapshot
from casfs.monitor import RecordingMonitor
from casfs.repository.creation import create_repository
from casfs.repository.opening import OpenOptions, open_for_writing
from casfs.repository.repository import Repository


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    create_repository(tmp_path / "repository")
    with open_for_writing(tmp_path / "repository", "test", OpenOptions(sync=False)) as found:
        yield found


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it makes files of many users")
def test_names_of_owners_never_make_a_snapshot_too_large(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name_bytes, owners = 4096, 600
    assert name_bytes * owners > MAX_OWNER_NAMES_BYTES
    real = pwd.getpwuid(0)
    monkeypatch.setattr(
        pwd, "getpwuid", lambda uid: pwd.struct_passwd(("n" * name_bytes, *real[1:]))
    )
    source = tmp_path / "source"
    source.mkdir()
    for uid in range(1000, 1000 + owners):
        (source / str(uid)).touch()
        os.chown(source / str(uid), uid, 0)
    options = BackupOptions(paths=(bytes(source),))
    snapshot = run_backup(repository, options, RecordingMonitor()).snapshot
    assert 500 < len(snapshot.users) < owners
    _, data = encode_snapshot(snapshot, repository.codec)
    assert data


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"host": "h\udcff"}, "not UTF-8"),
        ({"tags": ("\udcff",)}, "not UTF-8"),
        ({"paths": tuple(b"x" * 250 + b"%d" % number for number in range(60_000))}, "fewer paths"),
    ],
    ids=["host", "tag", "paths"],
)
@pytest.mark.slow
def test_a_snapshot_that_could_not_be_published_is_refused_before_anything_is_read(
    repository: Repository,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, str | tuple[str | bytes, ...]],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(os.urandom(3000))
    before = sorted((tmp_path / "repository").rglob("*"))
    known = {"paths": (b"file",)} | fields
    known["paths"] = (b"file", *known["paths"])
    with pytest.raises(UsageError, match=reason):
        run_backup(repository, BackupOptions(**known), RecordingMonitor())  # type: ignore[arg-type]
    assert sorted((tmp_path / "repository").rglob("*")) == before
