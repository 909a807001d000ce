"""Reading all that a repository shows, with no recourse to what it says of itself.

What a file is found to be is the digest of the bytes that were given for it, or `LOST` where an error
was. Anything that is no error of the project's own is a bug and is let through.
"""

from __future__ import annotations

import os
from pathlib import Path

from blake3 import blake3
from casfs_mount.background import BackgroundPool
from casfs_mount.blob_reader import BlobReader
from casfs_mount.chunk_cache import ChunkCache
from casfs_mount.event_loop_guard import EventLoopGuard
from casfs_mount.repository_view import RepositoryView
from casfs_mount.tree_cache import TreeCache
from casfs_mount.view import MountContext

from casfs.errors import CasfsError
from casfs.format.tree import Node, NodeType, TreeRef
from casfs.paths import join
from casfs.repository.repository import Repository

LOST = "lost"
FLAGGED = "flagged "
"""The prefix of the digest of a file that is reported as changed during its capture."""

Files = dict[str, str]
"""What is found of each file and directory of a snapshot, by its path."""


def look_at_source(source: Path) -> Files:
    """Describe a tree as a snapshot of it shows it: whole paths, files by digest."""
    found = {}
    for folder, directories, files in os.walk(bytes(source)):
        for name in directories:
            found[_key(os.path.join(folder, name))] = "directory"
        for name in files:
            data = Path(os.fsdecode(os.path.join(folder, name))).read_bytes()
            found[_key(os.path.join(folder, name))] = blake3(data).hexdigest()
    above = bytes(source)
    while above.strip(b"/"):
        found[_key(above)] = "directory"
        above = os.path.dirname(above)
    return found


def _key(path: bytes) -> str:
    return os.fsdecode(path.lstrip(b"/"))


def look_at_snapshots(repository: Repository) -> dict[str, Files]:
    """Describe every snapshot that is listed, by its id."""
    return {
        snapshot_id.hex(): _look(repository, snapshot.root)
        for snapshot_id, snapshot in repository.snapshots.iterate()
    }


def _look(repository: Repository, root: Node) -> Files:
    found: Files = {}
    assert root.tree is not None
    stack: list[tuple[bytes, TreeRef]] = [(b"", root.tree)]
    while stack:
        path, ref = stack.pop()
        try:
            for node in repository.trees.nodes(ref):
                below = join(path, node.name)
                if node.tree is not None:
                    found[_key(below)] = "directory"
                    stack.append((below, node.tree))
                elif node.kind == NodeType.FILE:
                    found[_key(below)] = _flagged(node, _content(repository, node))
        except CasfsError:
            found[_key(path)] = LOST
    return found


def _content(repository: Repository, node: Node) -> str:
    whole = blake3()
    try:
        for extent in repository.content(node).extents():
            if extent.digest is None:
                whole.update(bytes(extent.length))
            else:
                whole.update(repository.store.read(extent.digest))
    except CasfsError:
        return LOST
    return whole.hexdigest()


def _flagged(node: Node, content: str) -> str:
    return FLAGGED + content if node.state == 2 and content != LOST else content


def look_through_the_mount(repository: Repository) -> dict[str, Files]:
    """Describe every snapshot as the view behind a mount of the whole repository shows it."""
    guard, background = EventLoopGuard(), BackgroundPool()
    blobs = BlobReader(repository.store, guard)
    view = RepositoryView(
        MountContext(
            repository=repository,
            blobs=blobs,
            tree_cache=TreeCache(blobs.read),
            chunk_cache=ChunkCache(blobs.read, guard, background),
            guard=guard,
            background=background,
        )
    )
    found: dict[str, Files] = {}
    top = view.lookup(1, b"snapshots")
    assert top is not None
    try:
        for number, node, _ in view.entries(top[0], 0):
            if node.kind == NodeType.DIRECTORY:
                reported = view.xattr(number, b"user.casfs.snapshot")
                assert reported is not None
                found[reported.decode()] = _look_below(view, number)
    finally:
        background.close()
    return found


def _look_below(view: RepositoryView, root: int) -> Files:
    found: Files = {}
    stack = [(b"", root)]
    while stack:
        path, number = stack.pop()
        try:
            for below_number, node, _ in view.entries(number, 0):
                below = join(path, node.name)
                if node.kind == NodeType.DIRECTORY:
                    found[_key(below)] = "directory"
                    stack.append((below, below_number))
                elif node.kind == NodeType.FILE:
                    found[_key(below)] = _flagged(node, _read(view, below_number))
        except CasfsError:
            found[_key(path)] = LOST
    return found


def _read(view: RepositoryView, number: int) -> str:
    whole = blake3()
    at = 0
    try:
        reader = view.open(number)
        while parts := reader.read(at, 100_000):
            for part in parts:
                whole.update(part)
                at += len(part)
    except CasfsError:
        return LOST
    return whole.hexdigest()
