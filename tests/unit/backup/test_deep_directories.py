"""Directories thousands of levels deep, which any user can make, exhaust no descriptors."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from casfs.backup import source_fs, walker
from casfs.backup.run import BackupOptions, run_backup
from casfs.backup.source_fs import Handle
from casfs.maintenance.check import Checker
from casfs.monitor import RecordingMonitor
from casfs.restore import removal
from tests.support.builders import RepositoryFixture


def descend(folder: Path, levels: int) -> None:
    """Create directories in one another, each with a file that is walked before it and one after it."""
    folder.mkdir()
    fd = os.open(folder, os.O_RDONLY)
    for _ in range(levels):
        for name in ("a", "z"):
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=fd))
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """A folder to fill, which is removed however deep it is."""
    folder = tmp_path / "deep"
    yield folder
    above = os.open(tmp_path, os.O_RDONLY)
    removal.remove(above, b"deep", os.lstat(folder))
    os.close(above)


@pytest.fixture
def few_open_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(("levels", "problems"), [(1000, 0), (5000, 1)])
@pytest.mark.slow
def test_a_backup_of_directories_thousands_of_levels_deep_exhausts_no_descriptors(
    tmp_path: Path, deep: Path, few_open_files: None, levels: int, problems: int
) -> None:
    descend(deep, levels)
    monitor = RecordingMonitor()
    repo = RepositoryFixture(tmp_path)
    with repo.writing() as repository:
        result = run_backup(repository, BackupOptions(paths=(bytes(deep),)), monitor)
    assert [one.message for one in monitor.problems if "nested more than" not in one.message] == []
    assert len(monitor.problems) == problems
    with repo.reading() as repository:
        check = Checker(repository, RecordingMonitor()).check()
    assert check.damage == []
    if not problems:
        assert result.snapshot.stats.files == check.files == 2 * levels


def test_a_directory_that_is_moved_while_it_is_closed_leads_nowhere_else(
    tmp_path: Path, deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "zz secret").write_bytes(b"of another user")
    descend(deep, 6)
    monkeypatch.setattr(walker, "_OPEN_LEVELS", 2)
    monkeypatch.setattr(walker, "_KEPT_LEVELS", len(deep.parts) + 1)
    real = source_fs.open_directory

    def move(above: Handle, name: bytes, follow: bool = False) -> Handle:
        if name == b".." and not (other / "d").exists():
            (deep / "d" / "d" / "d" / "d" / "d").rename(other / "d")
        return real(above, name, follow)

    monkeypatch.setattr(walker, "open_directory", move)
    monitor = RecordingMonitor()
    repo = RepositoryFixture(tmp_path)
    with repo.writing() as repository:
        result = run_backup(repository, BackupOptions(paths=(bytes(deep),)), monitor)
        names = {}
        for level in range(6):
            path = bytes(deep).lstrip(b"/") + b"/d" * level
            node = repository.trees.resolve(result.snapshot.root, path)
            assert node is not None and node.tree is not None
            names[path] = [one.name for one in repository.trees.nodes(node.tree)]
    moved = {one.path for one in monitor.problems if "was moved" in one.message}
    assert len(moved) in (1, 2, 3)
    assert names == {path: [b"a", b"d"] if path in moved else [b"a", b"d", b"z"] for path in names}
