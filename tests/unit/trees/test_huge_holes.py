"""A hole of exabytes costs its writer nothing; it costs no reader time without end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from casfs.backup.source_reader import SourceReader
from casfs.digest import digest_of
from casfs.errors import IntegrityError
from casfs.format.chunker import Chunker
from casfs.format.config import new_config
from casfs.format.tree import MAX_FILE_BYTES, Node
from casfs.maintenance.check import Checker
from casfs.monitor import ProblemKind, RecordingMonitor
from casfs.restore.restorer import RestoreOptions, Restorer
from casfs.restore.tar import file_bytes
from casfs.trees import content, file_content
from casfs.trees.content import EXTENT, HOLE, MAX_HOLE_BYTES, ContentReader
from casfs.trees.file_content import FileContent
from tests.support.builders import RepositoryFixture, entry


def hollow(*holes: int) -> Node:
    records = b"".join(EXTENT.pack(length, HOLE) for length in holes)
    return entry(b"", size=sum(holes), content=records, captured=digest_of(b"cannot be known"))


HUGE = [hollow(MAX_FILE_BYTES), hollow(*[MAX_FILE_BYTES // 32] * 32)]


@pytest.fixture(autouse=True)
def no_time_for_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail at once where a reader digests more zeros than it may."""
    digested = 0

    def count(_: object, length: int) -> None:
        nonlocal digested
        digested += length
        assert digested <= MAX_HOLE_BYTES

    monkeypatch.setattr(file_content, "update_zeros", count)


@pytest.fixture
def repo(tmp_path: Path) -> RepositoryFixture:
    repo = RepositoryFixture(tmp_path)
    repo.publish({b"before": b"1", b"hollow": HUGE[0], b"split": HUGE[1], b"zzz": b"2"})
    return repo


@pytest.mark.parametrize("options", [{}, {"salvage": True}, {"verify": True}])
def test_a_restore_reports_a_file_with_a_huge_hole_and_restores_the_rest(
    repo: RepositoryFixture, tmp_path: Path, options: dict[str, Any]
) -> None:
    monitor = RecordingMonitor()
    with repo.reading() as repository:
        _, _, path, node = repository.snapshots.resolve_path("latest")
        restorer = Restorer(repository, RestoreOptions(**options), monitor)
        result = restorer.restore(path, node, bytes(tmp_path / "target"), False)
    assert sorted(os.listdir(tmp_path / "target")) == ["before", "zzz"]
    assert result.damaged == 2
    reported = {problem.path: problem for problem in monitor.problems}
    assert reported.keys() == {b"hollow", b"split"}
    assert all("holes of more than 64 TiB" in problem.message for problem in monitor.problems)
    assert {problem.kind for problem in monitor.problems} == {ProblemKind.DAMAGED}


@pytest.mark.parametrize("node", HUGE)
def test_a_dump_of_a_huge_hole_ends_with_an_error(node: Node) -> None:
    def read(_: bytes) -> bytes:
        raise AssertionError("the file has no chunk")

    parts = FileContent(node, ContentReader(node.content, node.levels, read), read).parts()
    with pytest.raises(IntegrityError, match="holes of more than 64 TiB"):
        sum(part.length for part in parts)
    if node is HUGE[0]:
        with pytest.raises(IntegrityError, match="holes of more than 64 TiB"):
            next(file_bytes(node, b"hollow", read))


def test_a_check_of_huge_holes_ends(repo: RepositoryFixture) -> None:
    with repo.reading() as repository:
        result = Checker(repository, RecordingMonitor()).check()
    assert result.files == 4 and result.damage == []


@pytest.mark.parametrize(("where", "refused"), [("end", True), ("middle", True), ("fits", False)])
def test_a_backup_stores_no_holes_that_a_reader_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, refused: bool
) -> None:
    monkeypatch.setattr("casfs.backup.source_reader.MAX_HOLE_BYTES", 1 << 20)
    path = tmp_path / "file"
    with open(path, "wb") as file:
        file.write(os.urandom(4096))
        file.truncate((1 << 20) + (8192 if refused else 0))
        if where == "middle":
            file.seek(0, os.SEEK_END)
            file.write(os.urandom(4096))
    reader = SourceReader(
        Chunker(new_config("2020-01-01T00:00:00Z").chunker), lambda *_: None, digest_of
    )
    fd = os.open(path, os.O_RDONLY)
    try:
        read: Callable[[], object] = lambda: reader.read(fd, os.fstat(fd))  # noqa: E731
        if refused:
            with pytest.raises(OSError, match="which a snapshot cannot hold"):
                read()
        else:
            read()
    finally:
        os.close(fd)
    assert content.MAX_HOLE_BYTES == 64 << 40
