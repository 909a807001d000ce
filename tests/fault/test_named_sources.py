"""Sources that a user named: each is backed up, or reported, wherever it lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from casfs.format.tree import NodeType
from casfs.monitor import ProblemKind
from tests.support.capturing import BackupFixture
from tests.support.mounts import tmpfs


@pytest.fixture
def data(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    (data / "deep/er").mkdir(parents=True)
    (data / "deep/er/file").write_text("content")
    return data


@pytest.mark.parametrize("missing", ["nope", "er/nope", "er/file/nope"])
def test_a_missing_source_inside_another_source_is_reported(
    backups: BackupFixture, data: Path, missing: str
) -> None:
    found = backups.back_up(data / "deep", data / "deep" / missing)
    assert found.exit == 3
    (problem,) = found.problems
    assert problem.kind == ProblemKind.MISSING_SOURCE
    assert problem.path == bytes(data / "deep" / missing)
    assert found.file(data / "deep/er/file").size == len("content")


def test_a_source_inside_another_source_is_no_problem(backups: BackupFixture, data: Path) -> None:
    found = backups.back_up(data, data / "deep/er", data / "deep/er/file")
    assert (found.exit, found.problems) == (0, [])


@pytest.mark.parametrize("slash", ["/", "/.", "//"])
def test_a_slash_after_a_link_means_the_directory_that_it_leads_to(
    backups: BackupFixture, data: Path, monkeypatch: pytest.MonkeyPatch, slash: str
) -> None:
    monkeypatch.chdir(data.parent)
    os.symlink("data/deep", "link")
    for source in (f"link{slash}", f"{data.parent}/link{slash}"):
        found = backups.back_up(source)  # type: ignore[arg-type]
        assert (found.exit, found.problems) == (0, [])
        assert found.file(Path(source.rstrip("/."))).kind == NodeType.DIRECTORY
        assert found.file(Path(source.rstrip("/.")) / "er/file").size == len("content")
    assert backups.back_up(Path("link")).file(Path("link")).kind == NodeType.SYMLINK


def test_a_named_directory_on_another_file_system_is_backed_up_with_what_it_lies_in(
    backups: BackupFixture, data: Path
) -> None:
    (data / "mounted").mkdir()
    with tmpfs(data / "mounted") as mounted:
        (mounted / "named").mkdir()
        (mounted / "named/file").write_text("named")
        (mounted / "other").write_text("not named")
        for named in (mounted, mounted / "named"):
            found = backups.back_up(data, named, one_file_system=True)
            assert (found.exit, found.problems) == (0, [])
            assert found.file(mounted / "named/file").size == len("named")
            assert (found.node(mounted / "other") is not None) == (named == mounted)
            assert found.file(data / "deep/er/file").size == len("content")
        alone = backups.back_up(data, one_file_system=True)
        assert alone.file(mounted).kind == NodeType.DIRECTORY
        assert alone.node(mounted / "named") is None
