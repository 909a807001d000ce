"""What every end-to-end test gets: a command with a home of its own, and trees to back up."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import full_tree as everything
from tests.support.cli import Casfs, program


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


@pytest.fixture
def casfs(tmp_path: Path) -> Casfs:
    """The command with a repository that is named and not yet made."""
    home = tmp_path / "home"
    home.mkdir()
    return Casfs(tmp_path / "repository", home)


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
def everything_kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    """The tree that holds everything, backed up once for all tests of this worker."""
    if os.geteuid() != 0:
        pytest.skip("needs root: the tree holds devices, other owners and capabilities")
    folder = tmp_path_factory.mktemp("everything")
    home = folder / "home"
    home.mkdir()
    source = folder / "source"
    left_out = everything.build(source)
    casfs = Casfs(folder / "repository", home).init()
    casfs.backup(source)
    yield Kept(casfs, source, str(source).lstrip("/"), left_out)
    forget(folder)
