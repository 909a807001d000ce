"""What the tests of failures share: the scripted source, repositories in this process and at a server."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from casfs.backup import capture
from casfs.format.versions import DEFAULT_FORMAT
from tests.support.capturing import BackupFixture, open_backup_fixture
from tests.support.faulty_proxy import FaultyProxy, faulty_proxy
from tests.support.network_scene import NetworkScene
from tests.support.process_runner import Scene, Stage, make_scene
from tests.support.scripted_source import ScriptedSource, scripted_source
from tests.support.servers import S3Server


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedSource]:
    """The mounted file system of this worker; the tests that use it are marked `fuse`."""
    with scripted_source(tmp_path_factory.mktemp("scripted") / "mnt") as source:
        yield source


@pytest.fixture
def backups(tmp_path: Path) -> Iterator[BackupFixture]:
    """A repository, in memory where there is room for that: nothing here is about what syncs do."""
    memory = Path("/dev/shm")
    parent = memory if os.access(memory, os.W_OK) else tmp_path
    with (
        TemporaryDirectory(dir=parent) as folder,
        open_backup_fixture(Path(folder) / "repository") as found,
    ):
        yield found


@pytest.fixture
def encrypted_backups(own_home: Path) -> Iterator[BackupFixture]:
    """The same, encrypted."""
    with (
        TemporaryDirectory(dir=own_home) as folder,
        open_backup_fixture(Path(folder) / "repository", encrypted=True) as found,
    ):
        yield found


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Further attempts follow at once: what changes a file does not depend on time."""
    monkeypatch.setattr(capture, "FIRST_PAUSE_S", 0.0)


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    """The process of this worker in which verbs are done that may be killed."""
    with Stage() as found:
        yield found


@pytest.fixture
def scene(stage: Stage, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """A repository in memory where there is room for that: a killed process needs no syncs.

    A parameter of the fixture is its format.
    """
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield make_scene(stage, Path(folder), getattr(request, "param", DEFAULT_FORMAT))


_serials = itertools.count()


@pytest.fixture(scope="module")
def s3_proxy(s3_server: S3Server) -> Iterator[FaultyProxy]:
    """A proxy before SeaweedFS, of one module."""
    with faulty_proxy(s3_server.endpoint) as running:
        yield running


@pytest.fixture
def network(
    s3_server: S3Server, s3_proxy: FaultyProxy, tmp_path: Path, own_home: Path
) -> NetworkScene:
    """A repository in SeaweedFS with two snapshots, which is reached through the proxy."""
    return NetworkScene.create(s3_server, s3_proxy, tmp_path, f"s3://casfs/faults-{next(_serials)}")
