"""Directories more than a thousand levels deep exhaust no descriptors, whatever is done with them."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from casfs.format.tree import Node
from casfs.monitor import RecordingMonitor
from casfs.patterns import parse_pattern
from casfs.query.find import Finder, Query
from casfs.restore import open_directories, target_fs
from casfs.restore.open_directories import OpenDirectories
from casfs.restore.restorer import RestoreOptions, Restorer, RestoreResult
from tests.support.builders import MTIME_NS, RepositoryFixture, TreeFixture

LEVELS = 1100


class DeepCase:
    """A snapshot of directories in one another, each with a file before and one after the next directory."""

    def __init__(self, folder: Path) -> None:
        self.repo = RepositoryFixture(folder)
        self.target = folder / "target"
        self.monitor = RecordingMonitor()
        self.deleted: list[bytes] = []

    def publish(self, levels: int, mode: int = 0o755) -> None:
        trees = TreeFixture()
        node: Node | None = None
        for _ in range(levels):
            below = {} if node is None else {b"d": node}
            node = trees.build({b"a": b"1", b"z": b"2"} | below, mode=mode)
        assert node is not None
        self.repo.store(*trees.blobs.values())
        self.repo.publish({b"d": node})

    def restore(self, *include: bytes, **options: Any) -> RestoreResult:
        patterns = tuple(parse_pattern(text) for text in include)
        with self.repo.reading() as repository:
            _, snapshot = repository.snapshots.resolve("latest")
            restorer = Restorer(
                repository,
                RestoreOptions(include=patterns, **options),
                self.monitor,
                on_deleted=self.deleted.append,
            )
            return restorer.restore(b"", snapshot.root, bytes(self.target), False)

    def levels(self) -> Iterator[tuple[list[str], os.stat_result]]:
        """Yield the names in each directory from the top down, and its metadata."""
        fd = os.open(self.target / "d", os.O_RDONLY)
        try:
            while True:
                names = sorted(os.listdir(fd))
                yield names, os.fstat(fd)
                if "d" not in names:
                    return
                below = os.open("d", os.O_RDONLY, dir_fd=fd)
                os.close(fd)
                fd = below
        finally:
            os.close(fd)

    def add_to_deepest(self, name: str) -> None:
        """Create a file in the deepest directory of the target."""
        fd = os.open(self.target / "d", os.O_RDONLY)
        while "d" in os.listdir(fd):
            below = os.open("d", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=fd))
        os.close(fd)


@pytest.fixture
def case(tmp_path: Path) -> Iterator[DeepCase]:
    case = DeepCase(tmp_path)
    yield case
    # What pytest would remove it with recurses.
    subprocess.run(["chmod", "-R", "u+rwx", case.target], check=True)
    subprocess.run(["rm", "-rf", case.target], check=True)


@pytest.fixture
def few_open_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The limit is on the number of a descriptor, and earlier tests may hold some.
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 390, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_restore_of_a_thousand_levels_exhausts_no_descriptors(
    case: DeepCase, few_open_files: None
) -> None:
    case.publish(LEVELS)
    result = case.restore()
    assert case.monitor.problems == []
    assert (result.files, result.directories) == (2 * LEVELS, LEVELS)
    found = list(case.levels())
    assert len(found) == LEVELS
    assert {st.st_mtime_ns for _, st in found} == {MTIME_NS}
    assert {stat.S_IMODE(st.st_mode) for _, st in found} == {0o755}
    assert {tuple(names) for names, _ in found[:-1]} == {("a", "d", "z")}


def test_a_restore_with_delete_of_a_thousand_levels_exhausts_no_descriptors(
    case: DeepCase, few_open_files: None
) -> None:
    case.publish(LEVELS)
    case.restore()
    case.add_to_deepest("more")
    assert case.restore(delete=True, dry_run=True).deleted == 1
    assert case.restore(delete=True).deleted == 1
    assert case.monitor.problems == []
    assert case.deleted == [b"d/" * LEVELS + b"more"] * 2
    *_, (names, _) = case.levels()
    assert names == ["a", "z"]


def test_a_file_a_thousand_levels_deep_is_restored_alone(
    case: DeepCase, few_open_files: None
) -> None:
    case.publish(LEVELS)
    assert case.restore(b"/" + b"d/" * LEVELS + b"z").files == 1
    assert case.monitor.problems == []
    found = [names for names, _ in case.levels()]
    assert found == [["d"]] * (LEVELS - 1) + [["z"]]


def test_find_looks_into_a_thousand_levels(case: DeepCase, few_open_files: None) -> None:
    case.target.mkdir()
    case.publish(LEVELS)
    with case.repo.reading() as repository:
        _, snapshot = repository.snapshots.resolve("latest")
        finder = Finder(repository.trees, Query("z"), case.monitor)
        assert sum(1 for _ in finder.find(snapshot.root)) == LEVELS
    assert case.monitor.problems == []


@pytest.fixture
def few_levels_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_directories, "_OPEN_LEVELS", 2)
    monkeypatch.setattr(open_directories, "_KEPT_LEVELS", 1)


def test_nothing_more_is_restored_in_a_directory_that_was_moved_while_it_was_closed(
    case: DeepCase, few_levels_open: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    case.publish(8)
    real = target_fs.open_subdir

    def move(fd: int, name: bytes) -> int:
        if not (other / "d").exists():
            (case.target / "d" / "d" / "d" / "d" / "d" / "d").rename(other / "d")
        return real(fd, name)

    monkeypatch.setattr(open_directories, "open_subdir", move)
    case.restore()
    assert os.listdir(other) == ["d"]
    lost = [problem.path for problem in case.monitor.problems]
    assert lost and {problem.message for problem in case.monitor.problems} == {
        "it cannot be restored: it was moved while entries below it were restored; restore it again"
    }
    for level, (names, _) in enumerate(case.levels(), 1):
        path = b"/".join([b"d"] * level)
        assert ("z" in names) == (path not in lost)
        assert "a" in names


def test_closed_directories_get_their_modes_back_when_a_restore_is_interrupted(
    case: DeepCase, few_levels_open: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.publish(9, mode=0o555)
    case.restore()
    # Root has every permission, and would leave the modes as they are.
    monkeypatch.setattr(os, "access", lambda *_, **__: False)

    def interrupt(self: OpenDirectories) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(OpenDirectories, "pop", interrupt)
    with pytest.raises(KeyboardInterrupt):
        case.restore()
    assert {stat.S_IMODE(st.st_mode) for _, st in case.levels()} == {0o555}
