"""A mount of many snapshots, and of one with many files, costs little before and after a walk."""

from __future__ import annotations

import os
import random
import re
import subprocess
from pathlib import Path

import pytest

from tests.e2e.places import MakeCasfs
from tests.support.cli import Casfs
from tests.support.mounts import mounted, processes_naming
from tests.support.synthetic_repository import Shape, build

pytestmark = [pytest.mark.fuse, pytest.mark.slow]

MAX_BYTES = 100_000_000
"""The memory of a mount, whatever is read through it."""

SHAPE = Shape(snapshots=400, crowd=60_000, folders=1500, files=60)


@pytest.fixture(scope="module")
def fixture(tmp_path_factory: pytest.TempPathFactory, make_casfs: MakeCasfs) -> tuple[Casfs, int]:
    folder = tmp_path_factory.mktemp("large")
    (folder / "home").mkdir()
    entries = build(folder / "repository", SHAPE)
    casfs = make_casfs(folder, folder / "home")
    if casfs.repository is None:
        casfs.at(folder / "repository").run("mirror", casfs.where)
    return casfs, entries


def peak_bytes(mount: Path) -> int:
    (process,) = processes_naming(mount)
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def test_a_walk_through_many_files_takes_bounded_memory(
    fixture: tuple[Casfs, int], tmp_path: Path
) -> None:
    casfs, entries = fixture
    with mounted(casfs, "latest", at=tmp_path / "mount") as mount:
        before = peak_bytes(mount)
        command = ["find", str(mount), "-printf", "%i\n"]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.split()
        assert len(found) == len(set(found)) == entries + 1
        assert peak_bytes(mount) < MAX_BYTES
        assert peak_bytes(mount) - before < 300 * entries, "it keeps little of what it showed"


def test_several_readers_of_large_files_take_bounded_memory(
    repository: Casfs, tmp_path: Path
) -> None:
    names = [f"large-{number}" for number in range(4)]
    (tmp_path / "source").mkdir()
    for name in names:
        (tmp_path / "source" / name).write_bytes(random.Random(name).randbytes(32 << 20))
    repository.backup("source", cwd=tmp_path)
    with mounted(repository, "latest", at=tmp_path / "mount") as mount:
        readers = [
            subprocess.Popen(["cmp", str(tmp_path / "source" / name), str(mount / "source" / name)])
            for name in names
        ]
        assert [reader.wait() for reader in readers] == [0] * len(readers)
        assert peak_bytes(mount) < MAX_BYTES


def test_a_crowded_directory_is_listed_in_pieces(
    fixture: tuple[Casfs, int], tmp_path: Path
) -> None:
    """Its first entry is there before the server has read the whole directory."""
    casfs, _ = fixture
    with mounted(casfs, "latest", at=tmp_path / "mount") as mount:
        (process,) = processes_naming(mount)

        def server_ticks() -> int:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])

        with os.scandir(mount / "crowd") as listing:
            begun = server_ticks()
            assert next(listing).name == "entry-0000000"
            first = server_ticks() - begun
            assert sum(1 for _ in listing) == SHAPE.crowd - 1
            everything = server_ticks() - begun
        assert first * 4 < everything


def test_all_snapshots_and_versions_of_a_path_are_shown_at_once(
    fixture: tuple[Casfs, int], tmp_path: Path
) -> None:
    casfs, _ = fixture
    with mounted(casfs, at=tmp_path / "mount") as mount:
        assert len(os.listdir(mount / "snapshots")) == SHAPE.snapshots + 1
        assert len(os.listdir(mount / "ids")) == SHAPE.snapshots + 1
        assert len(os.listdir(mount / "hosts" / "host-0")) == SHAPE.snapshots // 5 + 1
        assert len(os.listdir(mount / "versions" / "notes")) == SHAPE.snapshots + 1
        assert len(os.listdir(mount / "versions" / "home")) == 1 + 1
        assert len(os.listdir(mount / "snapshots" / "latest" / "home")) == 200
        assert peak_bytes(mount) < 150_000_000
    reported = casfs.json("log", "latest:home", "--all-hosts").of_type("version")
    assert [len(version["snapshot_ids"]) for version in reported] == [SHAPE.snapshots]
