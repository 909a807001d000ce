"""Write a repository of many blobs to an object storage: `python -m bench.remote.large_repository URL BLOBS`.

Several hosts have a tree of small files each, and change a part of it every day. Everything is what backups
would have stored: packs, deltas, trees and snapshots, and all of it can be read, restored and pruned. Only
the files are small, so that ten million blobs take 3 GB. The storage's keys are taken from the environment.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from casfs.digest import digest_of
from casfs.format.codec import BlobKind
from casfs.format.snapshot import Snapshot, SnapshotStats
from casfs.format.tree import Node, NodeType
from casfs.repository.creation import create_repository
from casfs.repository.opening import OpenOptions, open_for_writing
from casfs.repository.place import place_of
from casfs.repository.repository import Repository
from casfs.storage.base import StorageOptions
from casfs.storage.url import StorageAddress, parse_address
from casfs.store.pack_builder import PACK_BLOBS
from casfs.store.writer import BlobWriter
from casfs.trees.content import EXTENT

HOSTS = 5
DAYS = 200

_BEGIN_NS = 1_700_000_000 * 10**9
_DAY_NS = 86_400 * 10**9
_FOLDER_FILES = 20
_CHANGED_OF_FOLDER = 10
_GROUP_FOLDERS = 100


@dataclass(frozen=True, slots=True)
class Shape:
    """The number of hosts and days, the files of each host, and how many of them change every day."""

    files: int
    changed: int
    hosts: int = HOSTS
    days: int = DAYS

    @classmethod
    def of_blobs(cls, blobs: int) -> Shape:
        """Return the shape of a repository with about so many blobs: half of them in the first backups."""
        files = blobs // (2 * HOSTS) // 2000 * 2000
        return cls(files, blobs // (2 * HOSTS * DAYS) // _CHANGED_OF_FOLDER * _CHANGED_OF_FOLDER)

    @property
    def days_per_session(self) -> int:
        """How many days share packs, so that these are as full of blobs as those of larger files."""
        return max(1, PACK_BLOBS * 9 // 10 // max(1, self.changed))


class HostTree:
    """The tree of one host: groups of folders of files; keeps the nodes of the folders and groups."""

    def __init__(self, host: int, shape: Shape, repository: Repository) -> None:
        self.name = f"host-{host}"
        self._shape = shape
        self._repository = repository
        self._folders = shape.files // _FOLDER_FILES
        self._versions = [bytearray(_FOLDER_FILES) for _ in range(self._folders)]
        self._is_new = [bytearray(b"\1" * _FOLDER_FILES) for _ in range(self._folders)]
        self._folder_nodes: list[Node | None] = [None] * self._folders
        self._group_nodes: list[Node | None] = [None] * (self._folders // _GROUP_FOLDERS)
        self._next = 0

    def change(self) -> None:
        """Change some files of the next folders."""
        for _ in range(self._shape.changed // _CHANGED_OF_FOLDER):
            folder = self._next
            self._next = (folder + 1) % self._folders
            for file in range(_CHANGED_OF_FOLDER):
                self._versions[folder][file * 2] += 1
                self._is_new[folder][file * 2] = 1
            self._folder_nodes[folder] = None
            self._group_nodes[folder // _GROUP_FOLDERS] = None

    def store(self, writer: BlobWriter) -> Node:
        """Store what is not stored yet and return the root."""
        groups = []
        for number, known in enumerate(self._group_nodes):
            if known is None:
                name = b"group-%05d" % number
                known = self._directory(writer, name, self._folders_of(writer, number))
                self._group_nodes[number] = known
            groups.append(known)
        return self._directory(writer, b"", groups)

    def _folders_of(self, writer: BlobWriter, group: int) -> Iterator[Node]:
        for number in range(group * _GROUP_FOLDERS, (group + 1) * _GROUP_FOLDERS):
            node = self._folder_nodes[number]
            if node is None:
                name = b"folder-%07d" % number
                files = (self._file(writer, number, n) for n in range(_FOLDER_FILES))
                node = self._folder_nodes[number] = self._directory(writer, name, files)
            yield node

    def _file(self, writer: BlobWriter, folder: int, number: int) -> Node:
        version = self._versions[folder][number]
        inode = folder * _FOLDER_FILES + number
        data = b"%s %d %d" % (self.name.encode(), inode, version)
        digest = digest_of(data)
        if self._is_new[folder][number]:
            writer.put(BlobKind.DATA, digest, data)
            self._is_new[folder][number] = 0
        time_ns = _BEGIN_NS + version * _DAY_NS + inode * 1_000_003
        return Node(
            *(b"file-%02d.data" % number, NodeType.FILE, 0o644, 1000, 1000, time_ns, time_ns),
            *(inode, 1, len(data)),
            content=EXTENT.pack(len(data), digest),
        )

    def _directory(self, writer: BlobWriter, name: bytes, nodes: Iterable[Node]) -> Node:
        tree = self._repository.tree_writer(
            lambda kind, digest, data: writer.put(kind, digest_of(data), data)
        )
        for node in nodes:
            tree.add(node)
        return Node(
            *(name, NodeType.DIRECTORY, 0o755, 1000, 1000, _BEGIN_NS, _BEGIN_NS, 0, 2),
            tree=tree.finish(),
        )


def write_repository(address: StorageAddress, shape: Shape) -> int:
    """Make a repository of a shape; return the number of its blobs.

    As many processes as there are cores write the trees of the hosts, each with a cache of its own.
    """
    create_repository(place_of(address, StorageOptions()))
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, get_context("spawn"), max_tasks_per_child=1) as pool:
        tasks = [pool.submit(_write_host, address, host, shape) for host in range(shape.hosts)]
        return sum(task.result() for task in tasks)


def _write_host(address: StorageAddress, host: int, shape: Shape) -> int:
    """Write the tree of a host, in a process of its own; return the number of its blobs."""
    for variable in ("XDG_CACHE_HOME", "XDG_STATE_HOME"):
        if variable in os.environ:
            os.environ[variable] += f"/host-{host}"
    gc.disable()  # hardly anything of the tree is garbage
    place = place_of(address, StorageOptions())
    with open_for_writing(place, "backup", OpenOptions(sync=False)) as repository:
        return _write_days(repository, HostTree(host, shape, repository), shape)


def _write_days(repository: Repository, tree: HostTree, shape: Shape) -> int:
    blobs = 0
    for begin in range(0, shape.days, shape.days_per_session):
        writer = repository.writer()
        roots = []
        try:
            for day in range(begin, min(begin + shape.days_per_session, shape.days)):
                if day:
                    tree.change()
                roots.append((day, tree.store(writer)))
            blobs += writer.finish().new_blobs
        finally:
            writer.close()
        for day, root in roots:
            repository.snapshots.publish(_snapshot(tree.name, day, root, shape))
        print(f"{tree.name}, day {roots[-1][0]}", file=sys.stderr, flush=True)
    return blobs


def _snapshot(host: str, day: int, root: Node, shape: Shape) -> Snapshot:
    return Snapshot(
        root,
        time_ns=_BEGIN_NS + day * _DAY_NS,
        host=host,
        user="synthetic",
        paths=(b"/data",),
        stats=SnapshotStats(files=shape.files),
    )


def main() -> int:
    """Write the repository and print the number of its blobs."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.remote.large_repository", description=__doc__
    )
    parser.add_argument("url")
    parser.add_argument("blobs", type=int)
    options = parser.parse_args()
    print(write_repository(parse_address(options.url), Shape.of_blobs(options.blobs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
