"""`.casfs`: a folder at the root of a snapshot, reachable but not listed, with files about the snapshot.

`changed`, `damage`, `manifest.b3` and `snapshot.json` are generated while a program reads them and cost
nothing before. They name files in directories that not every user may enter, so only the owner of the mount
can read them. If a reader seeks backwards, the file is generated again from its beginning.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec

from casfs.digest import Digest, SnapshotId
from casfs.display import escape_path
from casfs.errors import CasfsError
from casfs.format.snapshot import Snapshot
from casfs.format.tree import Node, NodeType, captured_digest
from casfs.trees.reader import TreeReader, flagged_files
from casfs_mount.damage_log import DamageLog
from casfs_mount.event_loop_guard import EventLoopGuard

FOLDER = b".casfs"
CHANGED, DAMAGE, MANIFEST, SNAPSHOT = b"changed", b"damage", b"manifest.b3", b"snapshot.json"
FILES = (CHANGED, DAMAGE, MANIFEST, SNAPSHOT)

_BATCH_BYTES = 256 * 1024


class ReportFiles:
    """The files about one snapshot; `root` is the directory that the mount shows as its root."""

    def __init__(
        self,
        snapshot_id: SnapshotId,
        snapshot: Snapshot,
        root: Node,
        trees: TreeReader,
        damage: DamageLog,
        guard: EventLoopGuard,
        unproven: bool = False,
    ) -> None:
        self._owner = os.getuid(), os.getgid()
        self._unproven = unproven
        self._snapshot_id = snapshot_id
        self._snapshot = snapshot
        self._root = root
        self._trees = trees
        self._damage = damage
        self._guard = guard

    def node(self, name: bytes) -> Node:
        """Return the node of the folder or of one of its files; generated files have size 0."""
        directory = name == FOLDER
        size = 0
        if name == SNAPSHOT:
            size = len(self._describe())
        elif name == DAMAGE:
            size = len(self._damage.text())
        return Node(
            name=name,
            kind=NodeType.DIRECTORY if directory else NodeType.FILE,
            mode=0o500 if directory else 0o400,
            uid=self._owner[0],
            gid=self._owner[1],
            mtime_ns=self._snapshot.time_ns,
            ctime_ns=self._snapshot.time_ns,
            inode=0,
            nlink=2 if directory else 1,
            size=size,
        )

    def open(self, name: bytes) -> ReportReader:
        """Return a reader of one of the files."""
        make: dict[bytes, Callable[[], Iterator[bytes]]] = {
            CHANGED: self._changed,
            DAMAGE: lambda: iter([self._damage.text()]),
            MANIFEST: self._manifest,
            SNAPSHOT: lambda: iter([self._describe()]),
        }
        return ReportReader(make[name], self._guard)

    def _changed(self) -> Iterator[bytes]:
        for path, _ in flagged_files(self._trees, self._root):
            yield escape_path(path).encode("utf-8", "surrogateescape") + b"\n"

    def _manifest(self) -> Iterator[bytes]:
        for path, node in self._trees.walk(self._root):
            digest = captured_digest(node)
            if digest is not None:
                yield manifest_line(path, digest)

    def _describe(self) -> bytes:
        snapshot = self._snapshot
        tree = self._root.tree
        fields: dict[str, Any] = {
            "id": self._snapshot_id.hex(),
            "time": _iso_time(snapshot.time_ns),
            "time_ns": snapshot.time_ns,
            "host": snapshot.host,
            "username": snapshot.user,
            "paths": [path.decode("utf-8", "surrogateescape") for path in snapshot.paths],
            "tags": list(snapshot.tags),
            "parent": snapshot.parent.hex() if snapshot.parent is not None else None,
            "program": snapshot.program,
            "unproven": self._unproven,
            "entries": tree.nodes if tree is not None else 0,
            "bytes": tree.total_bytes if tree is not None else 0,
            "flagged": tree.flagged if tree is not None else 0,
            "stats": msgspec.to_builtins(snapshot.stats),
        }
        return json.dumps(fields, indent=2).encode("ascii") + b"\n"


class ReportReader:
    """An open report, generated as it is read; safe to share between threads, which take turns."""

    streamed = True

    def __init__(self, make: Callable[[], Iterator[bytes]], guard: EventLoopGuard) -> None:
        self._make = make
        self._guard = guard
        self._lock = threading.Lock()
        self._pieces = make()
        self._buffer = b""
        self._begin = 0
        self._error: CasfsError | None = None

    def whole(self, max_bytes: int) -> None:
        """Return None: a report is generated while it is read."""

    def read(self, offset: int, size: int) -> list[memoryview]:
        """Return `size` bytes from `offset` in one part, fewer only at the end or before an error.

        Raises the error that broke off the generation, for every read at or after that offset.
        """
        self._guard.require_may_block()
        with self._lock:
            if offset < self._begin:
                self._pieces = self._make()
                self._buffer, self._begin, self._error = b"", 0, None
            while True:
                have = self._begin + len(self._buffer)
                if have >= offset + size or not self._more(max(offset - self._begin, 0)):
                    break
            skip = offset - self._begin
            found = memoryview(self._buffer)[skip : skip + size]
            if not found and self._error is not None:
                raise self._error
            return [found]

    def _more(self, used: int) -> bool:
        """Drop the first `used` bytes of the buffer and append a batch; return False at the end."""
        kept = self._buffer[used:]
        self._begin += min(used, len(self._buffer))
        parts = [kept]
        added = 0
        try:
            for piece in self._pieces:
                parts.append(piece)
                added += len(piece)
                if added >= _BATCH_BYTES:
                    break
        except CasfsError as error:
            # A report that broke off must not look complete.
            self._error = error
        self._buffer = b"".join(parts)
        return added > 0


def _iso_time(time_ns: int) -> str:
    try:
        return datetime.fromtimestamp(time_ns // 1_000_000_000, UTC).isoformat()
    except (OverflowError, ValueError, OSError):
        return f"@{time_ns // 1_000_000_000}"


def manifest_line(path: bytes, digest: Digest) -> bytes:
    """Return a line in the format of b3sum, for `b3sum --check`.

    Backslashes, newlines and a carriage return at the end are escaped; a backslash at the beginning of the
    line marks that. The format cannot represent a name that is not UTF-8: such a name gets U+FFFD, as
    b3sum itself writes it, and b3sum reports that it cannot check the line.
    """
    text = path.decode("utf-8", "replace").encode()
    escaped = text.replace(b"\\", b"\\\\").replace(b"\n", b"\\n")
    if escaped.endswith(b"\r"):
        escaped = escaped[:-1] + b"\\r"
    mark = b"\\" if escaped != text else b""
    return b"%s%s  %s\n" % (mark, digest.hex().encode("ascii"), escaped)
