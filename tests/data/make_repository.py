"""Make a frozen repository and its manifest; run once for each format, kept to show how they were made.

    python -m tests.data.make_repository tests/data/repository-v2 2

What it made is committed and never made again: it is what a version of that day wrote.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from casfs.backup.run import BackupOptions, run_backup
from casfs.digest import digest_of
from casfs.format.codec import BlobKind
from casfs.format.snapshot import Snapshot
from casfs.format.tree import (
    Capture,
    CaptureState,
    ChangeReason,
    Node,
    NodeExtra,
    NodeType,
    captured_digest,
)
from casfs.monitor import RecordingMonitor
from casfs.repository.creation import create_repository
from casfs.repository.opening import OpenOptions, open_for_reading, open_for_writing
from casfs.repository.repository import Repository
from casfs.trees.content import HOLE, ContentWriter

if TYPE_CHECKING:
    from casfs.crypto.opening import Unlock


def main(folder: Path, format_: int) -> None:
    """Write the repository and, beside it, the manifest."""
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_STATE_HOME"] = os.environ["XDG_CACHE_HOME"] = f"{name}/own"
        create_repository(folder, format_=format_)
        source = Path(name) / "source"
        source.mkdir()
        fill(source)
        with open_for_writing(folder, "backup") as repository:
            here = os.getcwd()
            os.chdir(source)
            try:
                options = BackupOptions(
                    (b".",), host="frozen", tags=("one", "two"), time_ns=1_700_000_000_000_000_000
                )
                run_backup(repository, options, RecordingMonitor())
            finally:
                os.chdir(here)
            publish_by_hand(repository)
        manifest = shortened(describe(folder))
    shutil.rmtree(folder / "index")
    (folder / "reserve").unlink()
    for empty in ("locks", "tmp"):
        (folder / empty / ".keep").touch()
    text = json.dumps(manifest, indent=0, separators=(",", ":"))
    folder.with_suffix(".json").write_text(text + "\n", encoding="ascii")


def fill(source: Path) -> None:
    """Make a small tree with one of each kind that any user can make."""
    (source / "empty").touch()
    (source / "text").write_bytes(b"What is the digest of a file that changes?\n" * 40)
    (source / "noise").write_bytes(hashlib.shake_128(b"noise").digest(3000))
    big = bytearray(b"".join(b"line %d of a larger file\n" % i for i in range(30_000)))
    (source / "chunks").write_bytes(big)
    with open(source / "sparse", "wb") as file:
        file.truncate(1 << 20)
        file.seek(500_000)
        file.write(b"in the middle")
    (source / "link").symlink_to("text")
    os.link(source / "text", source / "other name of text")
    os.mkfifo(source / "fifo", 0o640)
    with open(os.fsencode(source) + b"/not \xff utf-8\n", "wb") as file:
        file.write(b"named in bytes")
    os.setxattr(source / "text", "user.note", b"kept\0too")
    many = source / "many"
    many.mkdir()
    for i in range(3000):
        (many / f"{i:04}").touch()
    for path in sorted(source.rglob("*"), reverse=True):
        os.utime(path, ns=(0, 1_600_000_000_123_456_789), follow_symlinks=False)
    os.chmod(source / "noise", 0o4711)
    os.chmod(many, 0o1777)


def publish_by_hand(repository: Repository) -> None:
    """Publish a snapshot with what no calm backup makes: flagged files, and a list of lists."""
    writer = repository.writer()
    content = ContentWriter(writer.put, digest_of)
    data = b""
    for i in range(1500):
        chunk = b"chunk %d" % i
        writer.put(BlobKind.DATA, digest_of(chunk), chunk)
        content.add(len(chunk), digest_of(chunk))
        data += chunk
    content.add(4096, HOLE)
    data += bytes(4096)
    records, levels = content.finish()
    torn = b"half of one, half of another"
    writer.put(BlobKind.DATA, digest_of(torn), torn)
    times = (1_600_000_000_000_000_000, 1_600_000_000_000_000_001)
    tree = repository.tree_writer(writer.put)
    tree.add(
        Node(
            *(
                b"appended",
                NodeType.FILE,
                0o600,
                7,
                8,
                *times,
                11,
                1,
                len(data),
                CaptureState.APPENDED,
                True,
            ),
            *(records, levels, digest_of(data), None),
            NodeExtra(capture=Capture(ChangeReason.GREW, 1, digest_of(data + b"more"))),
        )
    )
    tree.add(
        Node(
            *(
                b"changed",
                NodeType.FILE,
                0o600,
                7,
                8,
                *times,
                12,
                1,
                len(torn),
                CaptureState.CHANGED,
                True,
            ),
            *(len(torn).to_bytes(8, "little") + digest_of(torn), 0, None, None),
            NodeExtra(capture=Capture(ChangeReason.REWRITTEN, 3, digest_of(b"seen later"))),
        )
    )
    root = Node(b"", NodeType.DIRECTORY, 0o755, 0, 0, *times, 2, 2, tree=tree.finish())
    writer.finish()
    repository.snapshots.publish(
        Snapshot(
            root=root,
            time_ns=1_700_000_100_000_000_000,
            host="frozen",
            user="nobody",
            paths=(b"by hand",),
            users=((7, "seven"),),
            groups=((8, "eight"),),
            program="by hand",
        )
    )


def describe(folder: Path, unlock: Unlock | None = None) -> dict[str, dict[str, dict[str, object]]]:
    """Return every entry of every snapshot by id and path, with all that a user would miss."""
    found: dict[str, dict[str, dict[str, object]]] = {}
    with open_for_reading(folder, OpenOptions(unlock=unlock)) as repository:
        for snapshot_id, snapshot in repository.snapshots.iterate():
            entries = found.setdefault(snapshot_id.hex(), {})
            for path, node in repository.trees.walk(snapshot.root):
                digest = captured_digest(node)
                entry: dict[str, object] = {
                    "kind": int(node.kind),
                    "mode": node.mode,
                    "mtime_ns": node.mtime_ns,
                    "size": node.size,
                    "state": int(node.state),
                    "blake3": digest.hex() if digest is not None else None,
                    "target": node.content.decode() if node.kind == NodeType.SYMLINK else None,
                    "xattrs": [
                        [name.decode(), value.hex()]
                        for name, value in (node.extra.xattrs if node.extra is not None else ())
                    ],
                }
                entries[base64.b64encode(path).decode()] = {k: v for k, v in entry.items() if v}
    return found


def shortened(
    manifest: dict[str, dict[str, dict[str, object]]],
) -> dict[str, dict[str, dict[str, object]]]:
    """Return a manifest that has one in a hundred of the files in `many`."""
    return {
        name: {
            path: entry
            for path, entry in entries.items()
            if not base64.b64decode(path).startswith(b"many/")
            or base64.b64decode(path).endswith(b"00")
        }
        for name, entries in manifest.items()
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]))
