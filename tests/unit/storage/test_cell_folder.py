"""Cells on disk: what was added is found again, what is damaged is missing, and the folder stays small."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from casfs.storage import cell_folder as module
from casfs.storage.cell_folder import CELL_BYTES, CellFolder
from tests.support.stores import PROJECT, flip, noise

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "objects"


def files(folder: Path) -> list[Path]:
    """Return the files of cells."""
    return sorted(path for path in folder.glob("??/*") if path.is_file())


def size_of(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in files(folder))


@pytest.mark.parametrize("size", [0, 1, 1000, CELL_BYTES])
def test_a_cell_comes_back_as_it_was_added(folder: Path, size: int) -> None:
    CellFolder(folder, 64 * MIB).add("packs/ab/abcd", 7, memoryview(noise("a", size)))
    found = CellFolder(folder, 64 * MIB)
    assert found.get("packs/ab/abcd", 7) == noise("a", size)
    assert found.holds("packs/ab/abcd", 7)
    assert found.get("packs/ab/abcd", 6) is None
    assert found.get("packs/ab/abce", 7) is None


def test_only_the_user_can_read_the_cells(folder: Path) -> None:
    old = os.umask(0)
    try:
        CellFolder(folder, MIB).add("packs/x", 0, b"data")
    finally:
        os.umask(old)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.glob("??"))}
    assert modes == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files(folder)} == {0o600}
    assert (folder / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172")


@pytest.mark.parametrize("offset", [0, 31, 32, -1])
def test_a_damaged_cell_is_missing_and_goes(folder: Path, offset: int) -> None:
    cells = CellFolder(folder, MIB)
    cells.add("packs/x", 0, noise("a", 5000))
    (path,) = files(folder)
    flip(path, offset)
    assert cells.get("packs/x", 0) is None
    assert files(folder) == []


def test_a_cell_that_was_cut_off_or_grew_is_missing(folder: Path) -> None:
    cells = CellFolder(folder, MIB)
    changes: list[Callable[[bytes], bytes]] = [
        lambda data: data[:-1],
        lambda data: data[:20],
        lambda data: data + b"x",
    ]
    for change in changes:
        cells.add("packs/x", 0, noise("a", 5000))
        (path,) = files(folder)
        path.write_bytes(change(path.read_bytes()))
        assert cells.get("packs/x", 0) is None


def test_a_cell_under_the_name_of_another_is_missing(folder: Path) -> None:
    cells = CellFolder(folder, MIB)
    cells.add("packs/x", 0, b"first")
    (first,) = files(folder)
    data = first.read_bytes()
    cells.add("packs/y", 0, b"second")
    (second,) = [path for path in files(folder) if path != first]
    second.write_bytes(data)
    assert cells.get("packs/y", 0) is None


def test_a_link_in_place_of_a_cell_is_not_followed(folder: Path, tmp_path: Path) -> None:
    cells = CellFolder(folder, MIB)
    cells.add("packs/x", 0, b"data")
    (path,) = files(folder)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert cells.get("packs/x", 0) is None


def test_the_cells_used_longest_ago_go_first(folder: Path) -> None:
    limit_bytes = 4 * MIB
    cells = CellFolder(folder, limit_bytes)
    for number in range(14):
        cells.add("packs/x", number, noise(f"{number}", CELL_BYTES - 32))
    long_ago = time.time() - 100_000
    for age, path in enumerate(sorted(files(folder), key=lambda path: path.name)):
        os.utime(path, (long_ago - age, long_ago - age))
    assert cells.get("packs/x", 3) is not None
    for number in range(14, 20):
        cells.add("packs/x", number, noise(f"{number}", CELL_BYTES - 32))
    cells.evict()
    assert size_of(folder) <= limit_bytes * 0.9
    assert cells.get("packs/x", 3) is not None
    assert all(cells.get("packs/x", number) is not None for number in range(14, 20))


def test_the_limit_holds_while_cells_are_added(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOK_AFTER_BYTES", MIB)
    cells = CellFolder(folder, 2 * MIB)
    for number in range(40):
        cells.add("packs/x", number, noise(f"{number}", CELL_BYTES))
        assert size_of(folder) <= 2 * MIB + MIB + 2 * CELL_BYTES
    cells.close()
    assert size_of(folder) <= 2 * MIB


def test_a_limit_of_zero_keeps_nothing(folder: Path) -> None:
    CellFolder(folder, 0).add("packs/x", 0, b"data")
    assert not folder.exists()


def test_remains_of_a_process_that_died_go(folder: Path) -> None:
    cells = CellFolder(folder, MIB)
    cells.add("packs/x", 0, b"data")
    (path,) = files(folder)
    young, old = path.with_name(".young"), path.with_name(".old")
    for one in (young, old):
        one.write_bytes(b"unfinished")
    os.utime(old, (1, 1))
    cells.evict()
    assert files(folder) == [young, path]


def test_forgetting_an_object_removes_its_cells_alone(folder: Path) -> None:
    cells = CellFolder(folder, MIB)
    for number in range(3):
        cells.add("packs/x", number, b"x")
    cells.add("packs/y", 0, b"y")
    assert cells.forget("packs/x")
    assert not cells.forget("packs/x")
    assert cells.get("packs/y", 0) == b"y"
    assert len(files(folder)) == 1


def test_a_folder_that_is_deleted_meanwhile_does_no_harm(folder: Path) -> None:
    cells = CellFolder(folder, MIB)
    cells.add("packs/x", 0, b"x")
    subprocess.run(["rm", "-r", str(folder)], check=True)
    assert cells.get("packs/x", 0) is None
    cells.add("packs/x", 1, b"x")
    cells.evict()
    cells.close()
    assert cells.get("packs/x", 0) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it mounts a full disk")
def test_a_full_disk_ends_the_caching_and_nothing_else(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(full)], check=True)
    try:
        cells = CellFolder(full / "objects", 64 * MIB)
        cells.add("packs/x", 0, noise("a", CELL_BYTES))
        cells.add("packs/x", 1, b"small")
        assert cells.get("packs/x", 0) is None
        assert cells.get("packs/x", 1) is None
        assert [path for path in files(full / "objects") if path.stat().st_size] == []
    finally:
        subprocess.run(["umount", str(full)], check=True)


_CHURN = """
import sys
from pathlib import Path
from casfs.storage import cell_folder
from tests.support.stores import noise
cell_folder._LOOK_AFTER_BYTES = 1 << 18
cells = cell_folder.CellFolder(Path(sys.argv[1]), 1 << 20)
for number in range(400):
    name, size = f"packs/{number % 7}", 1000 * (number % 60)
    found = cells.get(name, number % 60)
    assert found in (None, noise(f"{number % 7} {number % 60}", size)), (name, number)
    cells.add(name, number % 60, noise(f"{number % 7} {number % 60}", size))
"""


def test_several_processes_use_a_folder_at_the_same_time(folder: Path) -> None:
    running = [
        subprocess.Popen([sys.executable, "-c", _CHURN, str(folder)], cwd=PROJECT) for _ in range(3)
    ]
    assert [process.wait() for process in running] == [0, 0, 0]
    cells = CellFolder(folder, MIB)
    cells.evict()
    assert size_of(folder) <= MIB
