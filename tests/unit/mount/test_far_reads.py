"""Reads of a mount from a remote place: a directory of small files comes with few requests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from casfs_mount.background import BackgroundPool
from casfs_mount.blob_reader import BlobReader
from casfs_mount.chunk_cache import ChunkCache
from casfs_mount.event_loop_guard import EventLoopGuard
from casfs_mount.inodes import ROOT, Numbering
from casfs_mount.prefetch import Prefetcher
from casfs_mount.server import open_view
from casfs_mount.tree_cache import TreeCache
from casfs_mount.view import MountContext

from casfs.digest import Digest
from casfs.format.tree import NodeType
from casfs.repository.opening import open_for_reading
from tests.support.far import FarRepository
from tests.support.stores import noise

FILES = 1000
FILE_BYTES = 10_000


class Prompt(BackgroundPool):
    """Runs each task at once."""

    def submit(self, task: Callable[[], None]) -> bool:
        task()
        return True


def read_all(far: FarRepository) -> int:
    """Read every file of the snapshot in order, as `cp` does; return the requests of packs."""
    with far.reading() as repository:
        root = repository.snapshots.resolve("latest")[1].root
        blobs = BlobReader(repository.store, EventLoopGuard())
        trees = TreeCache(blobs.read)
        numbers = Numbering(root, 1, trees)
        prefetcher = Prefetcher(numbers, trees, blobs, Prompt())
        far.requests()
        found = 0
        stack = [(1, root)]
        while stack:
            number, directory = stack.pop()
            for beside, node, _ in numbers.entries(number, directory):
                if node.kind == NodeType.FILE:
                    prefetcher.on_open(beside, True)
                    content = blobs.read(Digest(node.content[8:40]))
                    assert content == noise(node.name.decode(), FILE_BYTES)
                    found += 1
                elif node.tree is not None:
                    stack.append((beside, node))
        assert found == FILES
        asked = far.requests()
        return sum(one.startswith(("read packs", "read meta")) for one in asked)


def mount(far: FarRepository) -> int:
    """Do what a mount does before it is usable, and list its root; return the number of entries there."""
    with open_for_reading(far.place, reader="mount") as repository:
        guard = EventLoopGuard()
        blobs = BlobReader(repository.store, guard)
        background = Prompt()
        context = MountContext(
            repository=repository,
            blobs=blobs,
            tree_cache=TreeCache(blobs.read),
            chunk_cache=ChunkCache(blobs.read, guard, background, 1 << 20),
            guard=guard,
            background=background,
        )
        view = open_view(context, "latest")
        return len(list(view.entries(ROOT, 0)))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_mount_is_usable_after_few_round_trips_with_and_without_a_cache(
    tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    for number in range(20):
        (source / f"{number}" / "below").mkdir(parents=True)
        (source / f"{number}" / "below" / "file").write_bytes(noise(f"{number}", 5000))
    far = FarRepository.create(monkeypatch)
    for number in range(5):
        (source / "changing").write_bytes(noise(f"changing {number}", 1000))
        far.back_up(source)
    assert far.round_trips(lambda: mount(far)) <= 6
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_home / "another cache"))
    assert far.round_trips(lambda: mount(far)) <= 12


def test_a_directory_of_small_files_needs_few_requests_and_then_none(
    tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(FILES):
        (source / f"{number:04}").write_bytes(noise(f"{number:04}", FILE_BYTES))
    far = FarRepository.create(monkeypatch)
    far.back_up(source)
    assert read_all(far) <= 10
    assert read_all(far) == 0
