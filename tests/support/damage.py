"""A small repository of everything that can be damaged, and the ways to damage it.

What must survive a damage is computed from the intact repository: which files have a blob, or a
directory above them, that touches the damaged bytes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from casfs.digest import Digest
from casfs.format.pack import BLOB_HEADER, TRAILER
from casfs.format.tree import Node, NodeType
from casfs.paths import join
from casfs.repository.creation import create_repository
from casfs.repository.opening import open_for_reading
from casfs.repository.repository import Repository
from casfs.storage.locks import RepositoryLock
from casfs.store.blob_store import pack_name
from tests.support.observation import Files
from tests.support.process_runner import KIB, Scene, Stage, make_scene
from tests.support.stores import pack_paths

SWAPPED = "swapped with another"
APPENDED = "with bytes appended"
CLOSED = "not to be read"
REMOVED = "removed"
CUT = "cut short"

WHOLE_FILE = (SWAPPED, APPENDED, CLOSED, REMOVED)
INSIDE = ("with a flipped bit", "with a zeroed block", CUT)
WHATS = (*INSIDE, *WHOLE_FILE)


@dataclass(frozen=True, slots=True)
class Target:
    """Bytes of a file of the repository; `other` is one of the same kind."""

    path: Path
    begin: int
    end: int
    other: Path


@dataclass(frozen=True, slots=True)
class Reach:
    """The parts of packs that a file of a snapshot needs, as (path of the pack, begin, end)."""

    parts: frozenset[tuple[Path, int, int]]

    def touches(self, target: Target, what: str) -> bool:
        """Return whether a damage can affect this file while the index is intact."""
        if what == APPENDED:
            return False
        return any(_hits(target, what, *part) for part in self.parts)


def _hits(target: Target, what: str, path: Path, begin: int, end: int) -> bool:
    if what == SWAPPED:
        return path in (target.path, target.other)
    if path != target.path or what in WHOLE_FILE:
        return path == target.path
    return end > target.begin and (what == CUT or begin < target.end)


class IntactRepository:
    """The repository that is copied for every damage; it is only ever read."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self.scene = scene = make_scene(stage, folder)
        for number in range(6):
            scene.write(f"a/{number}", f"a {number}", 20 * KIB)
            (scene.source / "a" / f"text {number}").write_bytes(b"text %d " % number * 2 * KIB)
        scene.write("a/big", "big", 3000 * KIB)
        scene.write("b/c/deep", "deep", 30 * KIB)
        self.first = scene.back_up()["id"]
        for number in range(3):
            scene.write(f"new/{number}", f"new {number}", 20 * KIB)
        (scene.source / "a" / "0").unlink()
        self.second = scene.back_up()["id"]
        scene.write("gone/0", "gone 0", 80 * KIB)
        scene.write("gone/1", "gone 1", 80 * KIB)
        third = scene.back_up()["id"]
        shutil.rmtree(scene.source / "gone")
        scene.act("forget", ids=[third]).done()
        del scene.published[third]
        with RepositoryLock.acquire(scene.root / "locks", "backup"):
            assert scene.act("prune", share=1.0).done()["waiting_packs"] >= 2
            # What a process leaves that was killed.
            (lock,) = (scene.root / "locks").iterdir()
            left = lock.read_bytes()
        self.foreign = folder / "foreign"
        foreign = Scene(stage, self.foreign, scene.source / "b")
        create_repository(foreign.root)
        foreign.back_up()
        condemned = scene.root / "condemned"
        self.foreign_condemned = folder / "condemned"
        (reported,) = os.listdir(condemned)
        self.foreign_condemned.write_bytes((condemned / reported).read_bytes().replace(b"1", b"2"))
        with open_for_reading(scene.root) as repository:
            # Who opens a repository removes these.
            for name in (lock.name, "f" * 16):
                (scene.root / "locks" / name).write_bytes(left)
            self.targets = self._find_targets(repository)
            self.reaches = {
                snapshot_id.hex(): _reaches(repository, scene.root, snapshot.root)
                for snapshot_id, snapshot in repository.snapshots.iterate()
            }
        self.published: dict[str, Files] = dict(scene.published)

    def _find_targets(self, repository: Repository) -> dict[str, Target]:
        root = self.scene.root
        _, snapshot = repository.snapshots.resolve(self.first)
        inside = os.fsencode(self.scene.source).lstrip(b"/")
        file = repository.trees.resolve(snapshot.root, inside + b"/a/3")
        text = repository.trees.resolve(snapshot.root, inside + b"/a/text 3")
        folder = repository.trees.resolve(snapshot.root, inside + b"/a")
        assert file is not None and folder is not None and folder.tree is not None
        assert text is not None
        assert repository.store.locate(Digest(text.content[8:])).is_grouped
        data = _place(repository, root, Digest(file.content[8:]))
        tree = _place(repository, root, Digest(folder.tree.digest))
        # By age: the order of names is another one each time.
        packs = sorted(
            pack_paths(root),
            key=lambda path: path.stat().st_mtime_ns,
        )
        other = next(path for path in packs if path not in (data[0], tree[0]))
        size = data[0].stat().st_size
        (condemned,) = (root / "condemned").iterdir()
        lock, other_lock = sorted((root / "locks").iterdir())[:2]
        snapshots = root / "snapshots"

        def whole(path: Path, another: Path) -> Target:
            length = path.stat().st_size
            return Target(path, length // 3, length * 2 // 3, another)

        return {
            "data of a pack": Target(*data, other),
            "the directory of a pack": Target(
                data[0], size - TRAILER.size - BLOB_HEADER.size - 60, size - TRAILER.size, other
            ),
            "the trailer of a pack": Target(data[0], size - TRAILER.size + 8, size, other),
            "a group of a pack": Target(*_place(repository, root, Digest(text.content[8:])), other),
            "a tree": Target(*tree, other),
            "a snapshot": whole(snapshots / self.first, snapshots / self.second),
            "the configuration": whole(root / "config", self.foreign / "config"),
            "the index": whole(root / "index" / "data.mdb", self.foreign / "index" / "data.mdb"),
            "the seal of the index": whole(
                root / "index" / "seal", self.foreign / "index" / "seal"
            ),
            "what is condemned": whole(condemned, self.foreign_condemned),
            "a lock that was left": whole(lock, other_lock),
        }


def _place(repository: Repository, root: Path, digest: Digest) -> tuple[Path, int, int]:
    location = repository.store.locate(digest)
    path = root / pack_name(repository.store.index.pack_ref(location.pack))
    return path, location.offset, location.offset + location.stored_bytes


def _reaches(repository: Repository, root: Path, node: Node) -> dict[str, Reach]:
    """Return the parts of packs that each file needs, by its path."""
    found: dict[str, Reach] = {}

    def walk(node: Node, path: bytes, above: frozenset[tuple[Path, int, int]]) -> None:
        if node.tree is not None:
            here = above | {_place(repository, root, Digest(node.tree.digest))}
            for below in repository.trees.nodes(node.tree):
                walk(below, join(path, below.name), here)
        elif node.kind == NodeType.FILE:
            places = {_place(repository, root, d) for d in repository.content(node).blobs()}
            found[os.fsdecode(path)] = Reach(above | places)

    walk(node, b"", frozenset())
    return found


def damage(target: Target, what: str) -> None:
    """Do it to a file; `CLOSED` is for who cannot read everything."""
    DAMAGES[what](target)


def _flip(target: Target) -> None:
    with target.path.open("r+b") as file:
        file.seek((target.begin + target.end) // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x10]))


def _zero(target: Target) -> None:
    with target.path.open("r+b") as file:
        file.seek(target.begin)
        file.write(bytes(min(target.end - target.begin, 4096)))


def _cut(target: Target) -> None:
    os.truncate(target.path, (target.begin + target.end) // 2)


def _swap(target: Target) -> None:
    mine, others = target.path.read_bytes(), target.other.read_bytes()
    target.path.write_bytes(others)
    target.other.write_bytes(mine)


def _append(target: Target) -> None:
    with target.path.open("ab") as file:
        file.write(b"appended" * 100)


DAMAGES: dict[str, Callable[[Target], None]] = {
    INSIDE[0]: _flip,
    INSIDE[1]: _zero,
    CUT: _cut,
    SWAPPED: _swap,
    APPENDED: _append,
    CLOSED: lambda target: target.path.chmod(0),
    REMOVED: lambda target: target.path.unlink(),
}


def moved(target: Target, old: Path, new: Path) -> Target:
    """Return the same target in a copy of the repository."""

    def move(path: Path) -> Path:
        return new / path.relative_to(old) if path.is_relative_to(old) else path

    return Target(move(target.path), target.begin, target.end, move(target.other))
