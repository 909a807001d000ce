"""Backup: walk the sources once, merge with the previous snapshot, publish.

One thread walks, compares, reads and hashes; the writer's threads do the rest. Entries are visited in
the order of their names, a directory's own entry after all that is in it, so that every tree is written
once and memory holds one directory of each level.
"""

from __future__ import annotations

import getpass
import grp
import logging
import os
import pwd
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from casfs import __version__
from casfs.capture import DEFAULT_ATTEMPTS, Capturer
from casfs.digest import SnapshotId
from casfs.errors import IntegrityError, NotFoundError
from casfs.exclude import Exclusions
from casfs.monitor import Monitor
from casfs.repository import Repository
from casfs.selection import keep_path, select
from casfs.snapshot import Snapshot, SnapshotStats
from casfs.source import make_node
from casfs.store.writer import BlobWriter
from casfs.tree import Kind, Node, TreeRef, replace
from casfs.treewriter import TreeWriter
from casfs.walk import Walker, WalkStats

log = logging.getLogger(__name__)

MAX_OWNER_NAMES = 65_536
"""Names of owners kept in one snapshot; beyond it numbers have to do."""


@dataclass(frozen=True, slots=True)
class BackupOptions:
    """What to back up and how; `time_ns` None is now, `parent` None is the one that fits."""

    paths: tuple[bytes, ...]
    host: str = field(default_factory=socket.gethostname)
    tags: tuple[str, ...] = ()
    time_ns: int | None = None
    exclusions: Exclusions = field(default_factory=Exclusions)
    one_file_system: bool = False
    parent: str | None = None
    use_parent: bool = True
    attempts: int = DEFAULT_ATTEMPTS
    dry_run: bool = False
    spool_in_memory: bool = False
    stdin_name: bytes | None = None


@dataclass(frozen=True, slots=True)
class BackupResult:
    """What was published (`snapshot_id` is None for a dry run)."""

    snapshot_id: SnapshotId | None
    snapshot: Snapshot
    missing_sources: int


def back_up(repository: Repository, options: BackupOptions, monitor: Monitor) -> BackupResult:
    """Read the sources and publish a snapshot of them.

    Problems of single entries go to `monitor` and into the counts. Raises NotFoundError where no source
    exists, and what the repository raises; nothing is published then.
    """
    began = time.monotonic()
    _require_a_source(options)
    time_ns = options.time_ns if options.time_ns is not None else time.time_ns()
    parent = _find_parent(repository, options)
    writer = repository.writer(options.dry_run, options.spool_in_memory)
    try:
        root, stats, users, groups = _read_sources(repository, options, parent, writer, monitor)
        stored = writer.finish()
    finally:
        writer.close()
    snapshot = Snapshot(
        root=root,
        time_ns=time_ns,
        host=options.host,
        user=_user_name(),
        paths=_kept_paths(options),
        tags=options.tags,
        users=users,
        groups=groups,
        parent=parent[0] if parent is not None else None,
        program=f"casfs {__version__}",
        stats=SnapshotStats(
            files=stats.files,
            directories=stats.directories,
            others=stats.others,
            unchanged=stats.unchanged,
            unreadable=stats.unreadable,
            vanished=stats.vanished,
            new_blobs=stored.new_blobs,
            new_plain_bytes=stored.new_plain_bytes,
            new_stored_bytes=stored.new_stored_bytes,
            seconds=round(time.monotonic() - began, 3),
        ),
    )
    snapshot_id = None if options.dry_run else repository.publish(snapshot)
    return BackupResult(snapshot_id, snapshot, stats.missing_sources)


def _find_parent(
    repository: Repository, options: BackupOptions
) -> tuple[SnapshotId, Snapshot] | None:
    if not options.use_parent:
        return None
    if options.parent is not None:
        return repository.resolve(options.parent)
    paths = _kept_paths(options)
    newest: tuple[SnapshotId, Snapshot] | None = None
    for snapshot_id, snapshot in repository.snapshots():
        if snapshot.host == options.host and snapshot.paths == paths:
            newest = snapshot_id, snapshot
    return newest


def _require_a_source(options: BackupOptions) -> None:
    """Raise NotFoundError where there is nothing to back up; a part that is missing is a problem."""
    if options.stdin_name is not None or any(map(os.path.lexists, options.paths)):
        return
    names = ", ".join(os.fsdecode(path) for path in options.paths[:3])
    more = ", …" if len(options.paths) > 3 else ""
    verb = "do not exist" if len(options.paths) > 1 else "does not exist"
    raise NotFoundError(f"{names}{more} {verb}; nothing was published")


def _kept_paths(options: BackupOptions) -> tuple[bytes, ...]:
    if options.stdin_name is not None:
        return (options.stdin_name,)
    return tuple(sorted({keep_path(path) for path in options.paths}))


def _read_sources(
    repository: Repository,
    options: BackupOptions,
    parent: tuple[SnapshotId, Snapshot] | None,
    writer: BlobWriter,
    monitor: Monitor,
) -> tuple[Node, WalkStats, tuple[tuple[int, str], ...], tuple[tuple[int, str], ...]]:
    capturer = Capturer(
        repository.chunker(), writer.put, repository.codec.digest, attempts=options.attempts
    )
    walker = Walker(
        capturer=capturer,
        trees=repository.trees,
        new_tree=lambda previous, nodes: TreeWriter(
            writer.put, repository.codec.digest, repository.config.tree_seed, previous, nodes
        ),
        exclusions=options.exclusions,
        one_file_system=options.one_file_system,
        left_out=os.stat(repository.root),
        is_stored=_content_check(repository, parent),
        monitor=monitor,
    )
    if options.stdin_name is not None:
        root = _read_stdin(capturer, walker, options.stdin_name)
    else:
        root = walker.walk(
            select(list(options.paths)), parent[1].root if parent is not None else None
        )
    stats = walker.stats
    users = _names(walker.uids, lambda number: pwd.getpwuid(number).pw_name)
    groups = _names(walker.gids, lambda number: grp.getgrgid(number).gr_name)
    return root, stats, users, groups


def _content_check(
    repository: Repository, parent: tuple[SnapshotId, Snapshot] | None
) -> Callable[[Node], bool] | None:
    """Return what tells whether an unchanged file's content is still stored, or None if it must be.

    Where nothing was lost from the index since the parent was published, nobody needs to ask.
    """
    index = repository.store.index
    if parent is None or index.is_complete(parent[0]):
        return None

    def is_stored(node: Node) -> bool:
        try:
            return all(index.known(repository.content(node).blobs()))
        except IntegrityError:
            return False

    return is_stored


def _read_stdin(capturer: Capturer, walker: Walker, name: bytes) -> Node:
    """Return the root of a snapshot with the one file that is read from standard input."""
    st = os.fstat(0)
    now_ns = time.time_ns()
    node = replace(capturer.capture_stream(name, 0, st), mtime_ns=now_ns, ctime_ns=now_ns, inode=0)
    walker.count(node)
    root = make_node(b"", os.stat("."), Kind.DIRECTORY, ())
    return replace(root, tree=_single_tree(walker, node))


def _single_tree(walker: Walker, node: Node) -> TreeRef:
    tree = walker.new_tree(None, None)
    tree.add(node)
    return tree.finish()


def _names(numbers: set[int], name_of: Callable[[int], str]) -> tuple[tuple[int, str], ...]:
    found = []
    for number in sorted(numbers)[:MAX_OWNER_NAMES]:
        try:
            found.append((number, name_of(number)))
        except (KeyError, OverflowError):
            continue
    return tuple(found)


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
