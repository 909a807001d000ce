"""The walk: how an entry is captured that changes its kind, and what is reported."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from casfs.backup import final_retry, source_fs, walker
from casfs.backup.capture import Capturer
from casfs.backup.exclude import Exclusions
from casfs.backup.reflink import Freeze
from casfs.backup.run import BackupOptions, BackupResult, run_backup
from casfs.backup.source_fs import Handle, make_node
from casfs.backup.sources import SourceNode
from casfs.errors import NotRegularError
from casfs.format.tree import Node, NodeType
from casfs.monitor import ProblemKind, RecordingMonitor
from casfs.repository.creation import create_repository
from casfs.repository.opening import OpenOptions, open_for_writing
from casfs.repository.repository import Repository


class Backup:
    """One backup of a folder in this process."""

    def __init__(self, repository: Repository, source: Path, **options: Any) -> None:
        monitor = RecordingMonitor()
        options = {"paths": (bytes(source),), **options}
        self.result: BackupResult = run_backup(repository, BackupOptions(**options), monitor)
        self.problems = monitor.problems
        self._repository = repository
        self._source = source

    def node(self, name: str) -> Node | None:
        root = self.result.snapshot.root
        path = os.fsencode(self._source / name).lstrip(b"/")
        return self._repository.trees.resolve(root, path)

    def reported(self) -> list[tuple[ProblemKind, bytes]]:
        return [(problem.kind, problem.path.rpartition(b"/")[2]) for problem in self.problems]


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    create_repository(tmp_path / "repository")
    with open_for_writing(tmp_path / "repository", "test", OpenOptions(sync=False)) as found:
        yield found


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a relative path: of an absolute one, the folders above change while other tests run."""
    monkeypatch.chdir(tmp_path)
    folder = Path("source")
    folder.mkdir()
    for name in ("a", "name", "z"):
        (folder / name).write_bytes(name.encode())
    return folder


Act = Callable[[int], None]


def before_each_capture(monkeypatch: pytest.MonkeyPatch, wanted: bytes, act: Act) -> None:
    """Run an action between the stat of a name and its opening."""
    real = Capturer.capture
    counts = {wanted: 0}

    def capture(self: Capturer, dir_fd: int, name: bytes, **options: Any) -> Node:
        if name == wanted:
            counts[name] += 1
            act(counts[name])
        return real(self, dir_fd, name, **options)

    monkeypatch.setattr(Capturer, "capture", capture)


@pytest.mark.parametrize(
    "kind", [NodeType.FILE, NodeType.DIRECTORY, NodeType.SYMLINK, NodeType.FIFO]
)
@pytest.mark.parametrize("by", ["folder", "name"])
def test_an_entry_replaced_by_another_kind_is_captured_as_what_it_is_now(
    repository: Repository,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: NodeType,
    by: str,
) -> None:
    name = source / "name"

    def replace(count: int) -> None:
        name.unlink()
        match kind:
            case NodeType.FILE:
                name.write_bytes(b"another file")
            case NodeType.DIRECTORY:
                name.mkdir()
                (name / "inside").write_bytes(b"inside")
            case NodeType.SYMLINK:
                name.symlink_to("z")
            case NodeType.FIFO:
                os.mkfifo(name)

    before_each_capture(monkeypatch, b"name", replace)
    backup = Backup(repository, source, paths=(bytes(source if by == "folder" else name),))
    node = backup.node("name")
    assert node is not None and node.kind == kind
    assert backup.reported() == []
    if kind == NodeType.FILE:
        assert node.size == len(b"another file")
    if kind == NodeType.DIRECTORY:
        inside = backup.node("name/inside")
        assert inside is not None and inside.size == 6
    if by == "folder":
        assert backup.node("a") is not None and backup.node("z") is not None


@pytest.mark.parametrize("by", ["folder", "name"])
def test_an_entry_replaced_at_every_look_is_given_up_and_the_others_are_captured(
    repository: Repository, source: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    asked = []

    def never_regular(count: int) -> None:
        asked.append(count)
        raise NotRegularError(b"name")

    before_each_capture(monkeypatch, b"name", never_regular)
    paths = (bytes(source),) if by == "folder" else (bytes(source / "name"), bytes(source / "z"))
    backup = Backup(repository, source, paths=paths)
    assert asked == [1, 2, 3]
    assert backup.reported() == [(ProblemKind.UNREADABLE, b"name")]
    assert backup.result.snapshot.stats.unreadable == 1
    assert backup.node("name") is None
    assert backup.node("z") is not None


def test_a_file_that_vanishes_before_it_is_opened_is_counted_and_reported(
    repository: Repository, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_each_capture(monkeypatch, b"name", lambda _: (source / "name").unlink())
    backup = Backup(repository, source)
    assert backup.reported() == [(ProblemKind.VANISHED, b"name")]
    stats = backup.result.snapshot.stats
    assert (stats.vanished, stats.unreadable, stats.files) == (1, 0, 2)


def test_required_clones_that_fail_leave_files_out_one_by_one(
    repository: Repository, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(dir_fd: int, fd: int) -> int:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("casfs.backup.reflink._clone", refuse)
    (source / "empty").touch()
    backup = Backup(repository, source, freeze=Freeze.REQUIRE)
    assert backup.reported() == [(ProblemKind.UNREADABLE, name) for name in (b"a", b"name", b"z")]
    assert all("cannot be cloned" in problem.message for problem in backup.problems)
    assert backup.result.snapshot.stats.unreadable == 3
    assert backup.node("empty") is not None, "of an empty file nothing is read"


def test_an_unchanged_tree_is_the_same_with_and_without_rereading(
    repository: Repository, source: Path
) -> None:
    while time.time_ns() < (source / "z").stat().st_ctime_ns + 60_000_000:
        time.sleep(0.01)
    first = Backup(repository, source)
    second = Backup(repository, source)
    third = Backup(repository, source, reread=True)
    trees = {backup.result.snapshot.root.tree for backup in (first, second, third)}
    assert len(trees) == 1
    unchanged = [backup.result.snapshot.stats.unchanged for backup in (first, second, third)]
    assert unchanged == [0, 3, 3]
    assert third.result.snapshot.stats.new_blobs == 0


def test_a_marker_that_is_a_directory_is_emptied_where_an_earlier_snapshot_has_its_content(
    repository: Repository, source: Path
) -> None:
    (source / "tree" / ".git" / "objects").mkdir(parents=True)
    (source / "tree" / ".git" / "config").write_bytes(b"config")
    (source / "tree" / "file").write_bytes(b"file")
    whole = Backup(repository, source)
    assert whole.node("tree/.git/config") is not None
    marked = Backup(repository, source, exclusions=Exclusions(if_present=(b".git",)))
    assert marked.problems == []
    node = marked.node("tree/.git")
    assert node is not None and node.tree is not None
    assert node.tree.nodes == 0
    assert marked.node("tree/file") is None
    again = Backup(repository, source)
    assert again.node("tree/.git/config") is not None
    assert again.node("tree/file") is not None


@pytest.mark.parametrize("by", ["folder", "name"])
def test_a_directory_exchanged_before_it_is_opened_has_the_metadata_of_its_entries(
    repository: Repository, source: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    (source / "name").unlink()
    (source / "name").mkdir(mode=0o755)
    private = source.parent / "private"
    private.mkdir(mode=0o700)
    (private / "letter").write_bytes(b"a secret")

    def exchange(dir_fd: Handle, name: bytes, follow: bool = False) -> Handle:
        if os.path.basename(name) == b"name" and private.exists():
            (source / "name").rename(source.parent / "taken")
            private.rename(source / "name")
        return source_fs.open_directory(dir_fd, name, follow)

    monkeypatch.setattr(walker, "open_directory", exchange)
    backup = Backup(
        repository, source, paths=(bytes(source if by == "folder" else source / "name"),)
    )
    node = backup.node("name")
    assert backup.node("name/letter") is not None
    assert node is not None and node.mode == 0o700


def test_a_root_exchanged_before_it_is_opened_has_the_metadata_of_its_entries(
    repository: Repository, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.chmod(0o755)
    private = source.parent / "private"
    private.mkdir(mode=0o700)
    (private / "letter").write_bytes(b"a secret")

    def exchange(dir_fd: Handle, name: bytes, follow: bool = False) -> Handle:
        if private.exists():
            source.rename(source.parent / "taken")
            private.rename(source)
        return source_fs.open_directory(dir_fd, name, follow)

    monkeypatch.setattr(walker, "open_directory", exchange)
    monkeypatch.chdir(source.parent)
    tree = SourceNode(bytes(source), is_source=True)
    monkeypatch.setattr("casfs.backup.run.build_source_tree", lambda *_: tree)
    result = run_backup(
        repository, BackupOptions(paths=(bytes(source),), host="here"), RecordingMonitor()
    )
    assert result.snapshot.root.mode == 0o700


def test_the_final_retry_reads_no_directory_that_only_has_the_same_inode_number(
    tmp_path: Path,
) -> None:
    tmp_path.chmod(0o755)
    st = tmp_path.stat()
    node = make_node(b"d", st, NodeType.DIRECTORY, ())
    fd = final_retry._open_same(source_fs.AT_FDCWD, bytes(tmp_path), node, st.st_dev)
    assert isinstance(fd, int)
    os.close(fd)
    assert final_retry._open_same(source_fs.AT_FDCWD, bytes(tmp_path), node, st.st_dev + 1) is None
    tmp_path.chmod(0o700)
    assert final_retry._open_same(source_fs.AT_FDCWD, bytes(tmp_path), node, st.st_dev) is None
