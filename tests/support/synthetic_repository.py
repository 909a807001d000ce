"""Large repositories written straight into the store.

`python -m tests.support.synthetic_repository FOLDER` makes one.
Many snapshots, each with one file changed, and the last one with a crowded directory and very many
files besides. The trees are what a backup would have stored; the files' data is not there, so that the
repository serves every listing and no read of a file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from casfs.digest import digest_of
from casfs.format.codec import BlobKind
from casfs.format.snapshot import Snapshot
from casfs.format.tree import Node, NodeType
from casfs.repository.creation import create_repository
from casfs.repository.opening import OpenOptions, open_for_writing
from casfs.store.writer import BlobWriter
from casfs.trees.content import EXTENT
from casfs.trees.writer import TreeWriter

_BEGIN_NS = 1_500_000_000 * 10**9
_HOUR_NS = 3600 * 10**9
_SEED = 7


@dataclass(frozen=True, slots=True)
class Shape:
    """How large it shall be; the files of the last snapshot are `crowd + folders * files`, and a few."""

    snapshots: int = 1000
    crowd: int = 100_000
    folders: int = 19_000
    files: int = 100


class _TreeBuilder:
    def __init__(self, writer: BlobWriter) -> None:
        self._writer = writer
        self._made = 0

    def file(self, name: bytes) -> Node:
        """Return a file of a size and a content of its own, as numbered."""
        self._made += 1
        size = 1 + self._made * 7919 % 60_000
        content = EXTENT.pack(size, digest_of(b"%d" % self._made))
        time_ns = _BEGIN_NS + self._made * 1_000_003
        return Node(
            name,
            NodeType.FILE,
            0o644,
            1000,
            1000,
            time_ns,
            time_ns,
            self._made,
            1,
            size,
            content=content,
        )

    def directory(self, name: bytes, nodes: Iterable[Node]) -> Node:
        """Store a directory's tree and return its node."""
        tree = TreeWriter(self._put, digest_of, _SEED)
        for node in nodes:
            tree.add(node)
        self._made += 1
        return Node(
            *(name, NodeType.DIRECTORY, 0o755, 1000, 1000, _BEGIN_NS, _BEGIN_NS, self._made, 2),
            tree=tree.finish(),
        )

    def _put(self, kind: BlobKind, digest: bytes, data: bytes) -> None:
        self._writer.put(kind, digest_of(data), data)

    def crowd(self, count: int) -> Node:
        return self.directory(b"crowd", (self.file(b"entry-%07d" % n) for n in range(count)))

    def many(self, shape: Shape) -> Node:
        """Return a directory of directories of directories of files, a hundred of each above."""

        def above() -> Iterator[Node]:
            for start in range(0, shape.folders, 100):
                yield self.directory(
                    b"group-%05d" % start,
                    (
                        self.directory(
                            b"folder-%06d" % n,
                            (self.file(b"file-%04d.data" % m) for m in range(shape.files)),
                        )
                        for n in range(start, min(start + 100, shape.folders))
                    ),
                )

        return self.directory(b"many", above())


def build(root: Path, shape: Shape) -> int:
    """Make a repository of that shape; return how many entries its last snapshot has below the root."""
    create_repository(root)
    with open_for_writing(root, "plant", OpenOptions(sync=False)) as repository:
        writer = repository.writer()
        planter = _TreeBuilder(writer)
        constant = [planter.directory(b"home", (planter.file(b"%03d" % n) for n in range(200)))]
        last = [planter.crowd(shape.crowd), planter.directory(b"deep", []), planter.many(shape)]
        snapshots = []
        for n in range(shape.snapshots):
            nodes = [*constant, planter.file(b"notes")]
            if n == shape.snapshots - 1:
                nodes += last
            root_node = planter.directory(b"", sorted(nodes, key=lambda node: node.name))
            snapshots.append(
                Snapshot(
                    root_node,
                    time_ns=_BEGIN_NS + n * _HOUR_NS,
                    host=f"host-{n % 5}",
                    user="planter",
                    paths=(b".",),
                    tags=("daily",) if n % 24 == 0 else (),
                )
            )
        writer.finish()
        for snapshot in snapshots:
            repository.snapshots.publish(snapshot)
        tree = snapshots[-1].root.tree
        return tree.nodes if tree is not None else 0


def main() -> int:
    """Make what the command line asks for and print the number of entries."""
    shape = Shape()
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.synthetic_repository", description=__doc__
    )
    parser.add_argument("folder", type=Path)
    for name in ("snapshots", "crowd", "folders", "files"):
        parser.add_argument(f"--{name}", type=int, default=getattr(shape, name))
    options = parser.parse_args()
    print(
        build(
            options.folder,
            Shape(options.snapshots, options.crowd, options.folders, options.files),
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
