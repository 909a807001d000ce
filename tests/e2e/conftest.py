"""What every end-to-end test gets: a command with a home of its own, and trees to back up.

The tests of `ELSEWHERE` run with the repository in object storage and over SSH, too: those of `CORE` always,
the others where CASFS_EFFORT asks for more. A test that looks into the folder of its repository has the
marker `local_repository`.
"""

from __future__ import annotations

import itertools
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import full_tree as everything
from tests.support.cli import Casfs, program
from tests.support.effort import EFFORT
from tests.support.remote import on_s3, over_ssh
from tests.support.servers import S3Server, SshServer


@dataclass(frozen=True, slots=True)
class Kept:
    """A source tree, and the repository that holds its one snapshot.

    `inside` is where the source lies below the root of the snapshot. Tests that share it must
    change neither the tree nor the repository.
    """

    casfs: Casfs
    source: Path
    inside: str
    left_out: dict[str, str]

    def below(self, folder: Path) -> Path:
        return folder / self.inside


def forget(folder: Path) -> None:
    """Remove a tree at once, in which directories may be unreadable even for its owner."""
    for where, directories, _ in os.walk(folder):
        for name in directories:
            path = os.path.join(where, name)
            if not stat.S_ISLNK(os.lstat(path).st_mode):
                os.chmod(path, 0o700)
    shutil.rmtree(folder)


@pytest.fixture(scope="session", autouse=True)
def installed_command() -> None:
    """Say plainly, once, that the command itself is missing."""
    done = subprocess.run([*program(), "version"], capture_output=True, check=False)
    assert done.returncode == 0, f"{program()} does not run: {done.stderr.decode()}"


LOCAL, S3, SFTP = "local", "s3", "sftp"

ELSEWHERE = frozenset(
    {
        "test_capture_changing",
        "test_capture_details",
        "test_capture_reread",
        "test_fidelity",
        "test_hostile_names",
        "test_incremental",
        "test_mount",
        "test_mount_live",
        "test_query_commands",
        "test_restore",
        "test_restore_safety",
        "test_stdin_from_command",
        "test_streams",
    }
)
"""The modules whose tests hold wherever the repository is."""

CORE = frozenset({"test_fidelity", "test_incremental", "test_mount"})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "place" not in metafunc.fixturenames:
        return
    module = metafunc.module.__name__.rpartition(".")[2]
    is_wanted = module in CORE or (module in ELSEWHERE and EFFORT > 1)
    if is_wanted and not any(metafunc.definition.iter_markers("local_repository")):
        slow = [pytest.param(place, marks=pytest.mark.slow) for place in (S3, SFTP)]
        metafunc.parametrize("place", [LOCAL, *slow], indirect=True, scope="session")


@pytest.fixture(scope="session")
def place(request: pytest.FixtureRequest) -> str:
    """Where the repository is: LOCAL, S3 or SFTP."""
    return str(getattr(request, "param", LOCAL))


_serials = itertools.count()

MakeCasfs = Callable[[Path, Path], Casfs]


@pytest.fixture(scope="session")
def make_casfs(request: pytest.FixtureRequest, place: str) -> MakeCasfs:
    """Return a function that returns the command of a home, with a repository that is not yet made.

    A local repository is in a folder; one over SSH, too.
    """
    if place == S3:
        s3: S3Server = request.getfixturevalue("s3_server")
        return lambda folder, home: on_s3(s3, "casfs", f"e2e-{next(_serials)}", home)
    if place == SFTP:
        ssh: SshServer = request.getfixturevalue("ssh_server")
        return lambda folder, home: over_ssh(ssh, folder / "far", home)
    return lambda folder, home: Casfs(folder / "repository", home)


@pytest.fixture
def casfs(tmp_path: Path, make_casfs: MakeCasfs) -> Casfs:
    """The command with a repository that is named and not yet made."""
    home = tmp_path / "home"
    home.mkdir()
    return make_casfs(tmp_path, home)


@pytest.fixture
def repository(casfs: Casfs) -> Casfs:
    """The command with an empty repository."""
    return casfs.init()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small everyday tree."""
    root = tmp_path / "source"
    (root / "documents" / "letters").mkdir(parents=True)
    (root / "pictures").mkdir()
    (root / "readme.txt").write_bytes(b"read me\n")
    (root / "documents" / "report.txt").write_bytes(b"a report\n" * 1000)
    (root / "documents" / "letters" / "to-anna.txt").write_bytes(b"Dear Anna\n")
    (root / "pictures" / "photo.raw").write_bytes(bytes(range(256)) * 4096)
    (root / "link").symlink_to("documents/report.txt")
    return root


@pytest.fixture
def superuser() -> None:
    """For tests that make devices, mounts or files of other users."""
    if os.geteuid() != 0:
        pytest.skip("needs root: it makes devices, mounts or files of other users")


@pytest.fixture(scope="session")
def everything_kept(
    tmp_path_factory: pytest.TempPathFactory, make_casfs: MakeCasfs
) -> Iterator[Kept]:
    """The tree that holds everything, backed up once for all tests of this worker."""
    if os.geteuid() != 0:
        pytest.skip("needs root: the tree holds devices, other owners and capabilities")
    folder = tmp_path_factory.mktemp("everything")
    home = folder / "home"
    home.mkdir()
    source = folder / "source"
    left_out = everything.build(source)
    casfs = make_casfs(folder, home).init()
    casfs.backup(source)
    yield Kept(casfs, source, str(source).lstrip("/"), left_out)
    forget(folder)
