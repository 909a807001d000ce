"""`backup --freeze` with the installed command: on disks that can clone files, and on others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import Casfs
from tests.support.loop_devices import MIB, endless_writer, fresh_disk, generations

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("disks")]

SIZE = 4 * MIB


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def disk(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    with fresh_disk(tmp_path_factory.mktemp("disks"), request.param) as found:
        yield found


@pytest.fixture
def plain_disk(tmp_path: Path) -> Iterator[Path]:
    with fresh_disk(tmp_path, "ext4", 32 * MIB) as found:
        yield found


@pytest.mark.parametrize("options", [[], ["--freeze", "auto"], ["--freeze", "require"]])
def test_a_constantly_written_file_is_captured_as_it_was_at_one_instant(
    repository: Casfs, disk: Path, tmp_path: Path, options: list[str]
) -> None:
    file = disk / "file"
    with endless_writer(file, SIZE):
        result = repository.json("backup", *options, file)
    assert result.of_type("problem") == []
    assert result.one("snapshot")["flagged"] == 0
    repository.run("restore", "latest", "--target", tmp_path / "target")
    restored = (tmp_path / "target" / file.relative_to("/")).read_bytes()
    assert len(restored) == SIZE
    assert len(generations(restored)) == 1
    repository.run("check", "--read-data")


def test_required_clones_on_a_disk_without_clones_leave_out_every_file(
    repository: Casfs, plain_disk: Path
) -> None:
    (plain_disk / "file").write_bytes(b"content")
    (plain_disk / "empty").touch()
    result = repository.json("backup", "--freeze", "require", plain_disk, expect=3)
    problems = {line["path"].rpartition("/")[2]: line for line in result.of_type("problem")}
    assert problems["file"]["kind"] == "unreadable"
    assert "cloned" in problems["file"]["message"]
    assert "empty" not in problems
    snapshot = repository.backup("--freeze", "auto", plain_disk)
    assert (snapshot["unreadable"], snapshot["files"]) == (0, 2)
    never = repository.backup("--freeze", "never", "--no-parent", plain_disk)
    assert (never["unreadable"], never["files"]) == (0, 2)
