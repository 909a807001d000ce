"""Forgetting, pruning and repairing under a mount: readers get right bytes or an errno."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from tests.support.cli import Casfs
from tests.support.mounts import is_mounted, mounted
from tests.support.stored_objects import StoredObjects
from tests.support.waiting import wait_until

MIB = 1 << 20

pytestmark = pytest.mark.fuse

PRUNE = ("prune", "--margin", "0s", "--max-unused", "0%")


@pytest.fixture
def contents(repository: Casfs, tmp_path: Path) -> dict[str, bytes]:
    """What the second of two snapshots holds; half of it is in the first one's packs."""
    rng = random.Random(8)
    tree = tmp_path / "tree"
    tree.mkdir()
    contents = {f"file{n}": rng.randbytes(3 * MIB + n) for n in range(8)}
    for name, content in contents.items():
        (tree / name).write_bytes(content)
    repository.backup("tree", cwd=tmp_path)
    for name in list(contents)[:4]:
        contents[name] = rng.randbytes(2 * MIB)
        (tree / name).write_bytes(contents[name])
    repository.backup("tree", cwd=tmp_path)
    return contents


def packs(casfs: Casfs) -> set[str]:
    return {pack.digest for pack in StoredObjects(casfs).packs()}


def drop(path: Path) -> None:
    """Drop a file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def test_a_prune_that_repacks_changes_nothing_for_readers(
    repository: Casfs, contents: dict[str, bytes], tmp_path: Path
) -> None:
    before = packs(repository)
    wrong: list[str] = []
    rounds = 0
    stop = threading.Event()
    with mounted(repository, "--cache-size", "1M", "latest", at=tmp_path / "mount") as mount:

        def read() -> None:
            nonlocal rounds
            while not stop.is_set():
                for name, content in contents.items():
                    drop(mount / "tree" / name)
                    try:
                        found = (mount / "tree" / name).read_bytes()
                    except OSError as error:
                        wrong.append(f"{name}: {error}")
                    else:
                        if found != content:
                            wrong.append(name)
                rounds += 1

        reader = threading.Thread(target=read)
        reader.start()
        try:
            wait_until(lambda: rounds > 0, "everything was read once")
            repository.run("forget", "--keep-last", "1")
            repository.run(*PRUNE)
            after = rounds
            wait_until(lambda: rounds > after + 1, "everything was read after the prune")
        finally:
            stop.set()
            reader.join()
    assert wrong == []
    assert not before <= packs(repository), "nothing was repacked"


def test_a_file_of_a_forgotten_snapshot_reads_correctly_or_fails(
    repository: Casfs, contents: dict[str, bytes], tmp_path: Path
) -> None:
    old = (tmp_path / "tree/file7").read_bytes()
    with mounted(repository, at=tmp_path / "mount") as mount:
        first = min(name for name in os.listdir(mount / "snapshots") if name != "latest")
        shared = (mount / "snapshots" / first / "tree/file7").open("rb")
        lost = (mount / "snapshots" / first / "tree/file0").open("rb")
        repository.run("forget", "--keep-last", "1")
        repository.run(*PRUNE)
        assert shared.read() == old, "another snapshot needs it"
        with pytest.raises(OSError, match="Input/output error"):
            lost.read()
        shared.close()
        lost.close()
        wait_until(lambda: first not in os.listdir(mount / "snapshots"), "it leaves the list")
        for name, content in contents.items():
            assert (mount / "snapshots/latest/tree" / name).read_bytes() == content
        assert is_mounted(mount)


def test_a_rebuilt_index_changes_nothing_for_readers(
    repository: Casfs, contents: dict[str, bytes], tmp_path: Path
) -> None:
    with mounted(repository, "latest", at=tmp_path / "mount") as mount:
        assert (mount / "tree/file0").read_bytes() == contents["file0"]
        repository.run("repair", "index")
        repository.run("forget", "--keep-last", "1")
        repository.run(*PRUNE)
        for name, content in contents.items():
            drop(mount / "tree" / name)
            assert (mount / "tree" / name).read_bytes() == content, name
