"""What a backup does not do again: open what is unchanged, store what is stored."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.cli import Casfs, program
from tests.support.comparing import tree_differences

MIB = 1 << 20

# What a backup may store when no content is new: trees, the snapshot, a pack around them.
ONLY_TREES = 64 * 1024

_OPENED = re.compile(
    rb'^(?:\d+ +)?open(?:at2?)?\((?:[^<]*<(?P<folder>[^>]*)>, )?"(?P<name>(?:[^"\\]|\\.)*)"'
    rb".*\) += \d+(?:<.*>)?$"
)


def opened_files(casfs: Casfs, source: Path, trace: Path, *arguments: str | Path) -> set[str]:
    """Run `casfs ARGUMENTS` under strace and return the files below `source` that it opened.

    Directories do not count, and neither do descriptors that cannot be read from (O_PATH).
    """
    subprocess.run(
        [
            *("strace", "-f", "-y", "-qq", "-s", "4096", "-o", str(trace)),
            *("-e", "trace=open,openat,openat2"),
            *program(),
            *map(str, arguments),
        ],
        env=casfs.environment(),
        cwd=casfs.home,
        check=True,
        capture_output=True,
    )
    found = set()
    for line in trace.read_bytes().splitlines():
        match = _OPENED.match(line)
        if match is None or b"O_PATH" in line or b"O_DIRECTORY" in line:
            continue
        # strace shows what the descriptor became behind the call: 5</the/path>.
        path = line.rpartition(b" = ")[2].partition(b"<")[2].removesuffix(b">")
        if path.startswith(os.fsencode(source) + b"/") and not os.path.isdir(path):
            found.add(os.fsdecode(path[len(os.fsencode(source)) + 1 :]))
    return found


def settle(tree: Path) -> None:
    """Make every file old, so that none is as young as the backup that captured it.

    ctime can't be set: the clock has to pass it, and a backup trusts nothing that is too young.
    """
    for folder, _, files in os.walk(tree):
        for name in files:
            os.utime(os.path.join(folder, name), (1e9, 1e9), follow_symlinks=False)
    newest = max(
        os.lstat(os.path.join(folder, name)).st_ctime_ns
        for folder, _, files in os.walk(tree)
        for name in files
    )
    probe = tree.parent / "clock"
    while True:
        probe.touch()
        now = os.stat(probe).st_ctime_ns
        if now > newest + 100_000_000:
            break
    probe.unlink()


@pytest.fixture
def settled(source: Path) -> Path:
    settle(source)
    return source


def test_unchanged_files_are_not_opened(repository: Casfs, settled: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    everything = opened_files(repository, settled, trace, "backup", settled)
    assert everything == {
        "readme.txt",
        "documents/report.txt",
        "documents/letters/to-anna.txt",
        "pictures/photo.raw",
    }
    (settled / "documents" / "report.txt").write_bytes(b"a changed report\n")
    (settled / "new").write_bytes(b"new")
    changed = opened_files(repository, settled, trace, "backup", settled)
    assert changed == {"documents/report.txt", "new"}


def test_an_unchanged_backup_counts_every_file_as_unchanged_and_stores_nothing(
    repository: Casfs, settled: Path
) -> None:
    first = repository.backup(settled)
    second = repository.backup(settled)
    assert (first["files"], first["unchanged"]) == (4, 0)
    assert (second["files"], second["unchanged"]) == (4, 4)
    assert second["parent"] == first["id"]
    assert second["id"] != first["id"]
    assert second["new_bytes"] <= ONLY_TREES


def test_a_snapshot_of_unchanged_files_can_be_restored(
    repository: Casfs, settled: Path, tmp_path: Path
) -> None:
    repository.backup(settled)
    repository.backup(settled)
    repository.run("restore", "latest", "--target", tmp_path / "target")
    assert tree_differences(settled, tmp_path / "target" / str(settled).lstrip("/")) == []


@pytest.mark.parametrize(
    "change",
    ["same size and mtime", "metadata only", "replaced by a copy"],
)
def test_a_change_that_hides_behind_the_size_and_the_mtime_is_found(
    repository: Casfs, settled: Path, tmp_path: Path, change: str
) -> None:
    file = settled / "documents" / "report.txt"
    repository.backup(settled)
    before = file.stat()
    if change == "same size and mtime":
        file.write_bytes(b"A REPORT\n" * 1000)
    elif change == "replaced by a copy":
        (settled / "new").write_bytes(b"another!\n" * 1000)
        (settled / "new").rename(file)
    else:
        file.chmod(0o600)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    again = repository.backup(settled)
    assert again["unchanged"] == 3
    repository.run("restore", "latest", "--target", tmp_path / "target")
    assert tree_differences(settled, tmp_path / "target" / str(settled).lstrip("/")) == []


def test_a_moved_file_is_read_and_stores_nothing_new(
    repository: Casfs, settled: Path, tmp_path: Path
) -> None:
    (settled / "big").write_bytes(random.Random(1).randbytes(5 * MIB))
    settle(settled)
    first = repository.backup(settled)
    assert first["new_bytes"] > 5 * MIB
    (settled / "big").rename(settled / "pictures" / "moved")
    opened = opened_files(repository, settled, tmp_path / "trace", "backup", settled)
    assert opened == {"pictures/moved"}
    (settled / "pictures" / "moved").rename(settled / "moved again")
    moved = repository.backup(settled)
    assert moved["new_bytes"] <= ONLY_TREES
    assert moved["new_blobs"] <= moved["dirs"] + 1
    assert moved["bytes"] == first["bytes"]


def test_a_copy_of_a_whole_tree_stores_only_trees(repository: Casfs, settled: Path) -> None:
    repository.backup(settled)
    shutil.copytree(settled, settled / "copy", symlinks=True)
    copied = repository.backup(settled)
    assert copied["files"] == 8
    assert copied["new_bytes"] <= ONLY_TREES


def test_a_small_edit_in_a_big_file_stores_a_small_part_of_it(
    repository: Casfs, settled: Path
) -> None:
    dice = random.Random(2)
    data = dice.randbytes(24 * MIB)
    (settled / "big").write_bytes(data)
    repository.backup(settled)
    (settled / "big").write_bytes(data[: 11 * MIB] + b"a few bytes more" + data[11 * MIB :])
    edited = repository.backup(settled)
    assert 0 < edited["new_bytes"] < 10 * MIB


def test_one_new_file_in_a_large_directory_stores_one_piece_of_its_tree(
    repository: Casfs, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(24_000):
        (source / f"entry with a rather long name number {number:06d}").touch()
    settle(source)
    first = repository.backup(source)
    (source / "entry with a rather long name number 012000 and a half").touch()
    second = repository.backup(source)
    assert second["new_bytes"] < first["new_bytes"] / 2


def test_other_paths_and_other_hosts_have_their_own_parent_snapshots(
    repository: Casfs, settled: Path
) -> None:
    first = repository.backup(settled, "--host", "one")
    other = repository.backup(settled, "--host", "two")
    part = repository.backup(settled / "documents", "--host", "one")
    again = repository.backup(settled, "--host", "one")
    assert first["parent"] is None
    assert other["parent"] is None
    assert part["parent"] is None
    assert again["parent"] == first["id"]


def test_the_parent_can_be_chosen_or_switched_off(repository: Casfs, settled: Path) -> None:
    first = repository.backup(settled)
    repository.backup(settled)
    named = repository.backup("--parent", first["id"][:16], settled)
    assert (named["parent"], named["unchanged"]) == (first["id"], 4)
    without = repository.backup("--no-parent", settled)
    assert (without["parent"], without["unchanged"]) == (None, 0)
    assert without["new_bytes"] <= ONLY_TREES
    repository.refuses("backup", "--parent", "0" * 64, settled, mentions=["000000"])
