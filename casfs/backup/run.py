"""Backup: walk the sources once, merge with the previous snapshot, publish.

One thread walks, compares, reads and hashes; the writer's threads do the rest. Entries are visited in
the order of their names, a directory's own entry after all that is in it, so that every tree is written
once and memory holds one directory of each level. When that is stored, files that had changed while they
were captured are looked at once more.
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
from pathlib import Path
from typing import TYPE_CHECKING

from casfs import __version__
from casfs.backup.capture import DEFAULT_ATTEMPTS, Capturer
from casfs.backup.exclude import Exclusions
from casfs.backup.final_retry import FinalRetry
from casfs.backup.reflink import Freeze, Reflinker
from casfs.backup.source_fs import make_node
from casfs.backup.source_reader import SourceReader
from casfs.backup.sources import SourceNode, build_source_tree
from casfs.backup.stability import DEFAULT_PATIENCE_S, RetryBudget
from casfs.backup.walker import NewTree, Walker, WalkStats
from casfs.digest import SnapshotId
from casfs.display import escape_path
from casfs.errors import IntegrityError, NotFoundError, RefusedError
from casfs.format.snapshot import Snapshot, SnapshotStats, require_encodable
from casfs.format.tree import Node, NodeType, TreeRef, replace
from casfs.monitor import Monitor
from casfs.paths import normalize_source_path
from casfs.problems import source_left_out
from casfs.repository.repository import Repository
from casfs.store.writer import BlobWriter, WriteStats
from casfs.trees.writer import TreeWriter

if TYPE_CHECKING:
    from casfs.backup.file_cache import FileCache

log = logging.getLogger(__name__)

MAX_OWNER_NAMES = 65_536
MAX_OWNER_NAMES_BYTES = 2 * 1024 * 1024
"""Names of users, and of groups, kept in one snapshot; beyond either limit numbers have to do."""

_OWNER_BYTES = 16
"""What an owner takes in a snapshot's file besides the name, at most."""

_ROOM_BYTES = 2 * MAX_OWNER_NAMES_BYTES + 1024 * 1024
"""What a snapshot's file takes besides what is known before the sources are read."""


@dataclass(frozen=True, slots=True)
class BackupOptions:
    """What to back up and how; `time_ns` None is now, `parent` None is the one that fits.

    `patience_s` is for pauses and further attempts at files that change, in the whole backup; with one
    attempt or no patience there is no last look at its end either.
    """

    paths: tuple[bytes, ...]
    host: str = field(default_factory=socket.gethostname)
    tags: tuple[str, ...] = ()
    time_ns: int | None = None
    exclusions: Exclusions = field(default_factory=Exclusions)
    one_file_system: bool = False
    parent: str | None = None
    use_parent: bool = True
    attempts: int = DEFAULT_ATTEMPTS
    patience_s: float = DEFAULT_PATIENCE_S
    freeze: Freeze = Freeze.AUTO
    reread: bool = False
    dry_run: bool = False
    spool_in_memory: bool = False
    stdin_name: bytes | None = None


@dataclass(frozen=True, slots=True)
class BackupResult:
    """What was published (`snapshot_id` is None for a dry run)."""

    snapshot_id: SnapshotId | None
    snapshot: Snapshot
    missing_sources: int


def run_backup(repository: Repository, options: BackupOptions, monitor: Monitor) -> BackupResult:
    """Read the sources and publish a snapshot of them.

    Problems of single entries go to `monitor` and into the counts. Raises NotFoundError where no source
    exists or all are left out, UsageError where the snapshot's file could not hold all paths, and what the
    repository raises; nothing is published then.
    """
    began = time.monotonic()
    sources = _included_sources(options, monitor)
    _require_a_source(sources, repository.root)
    draft = Snapshot(
        root=Node(b"", NodeType.DIRECTORY, 0, 0, 0, 0, 0, 0, 1),
        time_ns=options.time_ns if options.time_ns is not None else time.time_ns(),
        host=options.host,
        user=_user_name(),
        paths=_kept_paths(options),
        tags=options.tags,
        program=f"casfs {__version__}",
    )
    # A snapshot that could not be published is refused before anything is stored.
    require_encodable(draft, _ROOM_BYTES)
    parent = _find_parent(repository, options)
    backup = _Backup(repository, options, sources, monitor)
    try:
        root = backup.read(parent)
    finally:
        backup.close()
    stats, stored = backup.stats, backup.stored
    snapshot = replace(
        draft,
        root=root,
        users=_owner_names(backup.uids, lambda number: pwd.getpwuid(number).pw_name),
        groups=_owner_names(backup.gids, lambda number: grp.getgrgid(number).gr_name),
        parent=parent[0] if parent is not None else None,
        stats=SnapshotStats(
            files=stats.files,
            directories=stats.directories,
            others=stats.others,
            unchanged=stats.unchanged,
            unreadable=stats.unreadable,
            vanished=stats.vanished,
            silently_changed=stats.silently_changed,
            new_blobs=stored.new_blobs,
            new_plain_bytes=stored.new_plain_bytes,
            new_stored_bytes=stored.new_stored_bytes,
            seconds=round(time.monotonic() - began, 3),
        ),
    )
    snapshot_id = None if options.dry_run else repository.snapshots.publish(snapshot)
    return BackupResult(snapshot_id, snapshot, stats.missing_sources)


def _find_parent(
    repository: Repository, options: BackupOptions
) -> tuple[SnapshotId, Snapshot] | None:
    if not options.use_parent:
        return None
    if options.parent is not None:
        return repository.snapshots.resolve(options.parent)
    if repository.is_locked:
        return None
    paths = _kept_paths(options)
    newest: tuple[SnapshotId, Snapshot] | None = None
    for snapshot_id, snapshot in repository.snapshots.iterate():
        if snapshot.host == options.host and snapshot.paths == paths:
            newest = snapshot_id, snapshot
    return newest


def _included_sources(options: BackupOptions, monitor: Monitor) -> tuple[bytes, ...]:
    """Return the named sources without those that options leave out, which are reported.

    Raises NotFoundError where none is left.
    """
    matcher = options.exclusions.matcher()
    reasons = {
        source: reason
        for source in options.paths
        if (reason := options.exclusions.reason_against(source, matcher)) is not None
    }
    included = tuple(source for source in options.paths if source not in reasons)
    if reasons and not included:
        source, reason = next(iter(reasons.items()))
        what = f"{escape_path(source)} is left out"
        if len(reasons) > 1:
            what = f"all sources are left out, as {escape_path(source)}"
        raise NotFoundError(f"{what}: {reason}; nothing was published")
    for source, reason in reasons.items():
        monitor.problem(source_left_out(source, reason))
    return included


def _require_a_source(sources: tuple[bytes, ...], root: Path) -> None:
    """Raise NotFoundError where none of the sources exists; one that does not is a problem."""
    if not sources:
        return
    errors = {path: error for path in sources if (error := _lstat_error(path)) is not None}
    found = [path for path in sources if path not in errors]
    if any(not (os.path.exists(path) and os.path.samefile(path, root)) for path in found):
        return
    if found:
        raise RefusedError(f"{root} is the repository itself; nothing was published")
    for path, error in errors.items():
        if not isinstance(error, FileNotFoundError):
            raise NotFoundError(
                f"{escape_path(path)} cannot be read: {error.strerror}; nothing was published"
            )
    names = ", ".join(escape_path(path) for path in sources[:3])
    more = ", …" if len(sources) > 3 else ""
    verb = "do not exist" if len(sources) > 1 else "does not exist"
    raise NotFoundError(f"{names}{more} {verb}; nothing was published")


def _lstat_error(path: bytes) -> OSError | None:
    """Return why nothing can be known of what a path names, or None."""
    try:
        os.lstat(path)
    except OSError as error:
        return error
    return None


def _kept_paths(options: BackupOptions) -> tuple[bytes, ...]:
    if options.stdin_name is not None:
        return (options.stdin_name,)
    return tuple(sorted({normalize_source_path(path) for path in options.paths}))


class _Backup:
    """The reading of one backup's sources: the walk, and a last look at what it flagged."""

    def __init__(
        self,
        repository: Repository,
        options: BackupOptions,
        sources: tuple[bytes, ...],
        monitor: Monitor,
    ) -> None:
        self.stats = WalkStats()
        self.stored = WriteStats()
        self.uids: set[int] = set()
        self.gids: set[int] = set()
        self._repository = repository
        self._options = options
        self._sources = sources
        self._monitor = monitor
        self._freezer = Reflinker(options.freeze)
        self._patience = RetryBudget(options.patience_s)
        self._memory = _open_file_cache(repository, options)

    def read(self, parent: tuple[SnapshotId, Snapshot] | None) -> Node:
        """Return the root of the new snapshot; all that it refers to is durable and indexed then."""
        options = self._options
        # A dry run stores no trees that could be read again.
        looks_again = options.attempts > 1 and options.patience_s > 0 and not options.dry_run
        place = build_source_tree(list(self._sources))
        root = self._written(lambda writer: self._walk(writer, place, parent, not looks_again))
        if looks_again and root.tree is not None and root.tree.flagged:
            self._patience.release_reserve()
            root = self._written(lambda writer: self._retry_changed(writer, place, root))
        return root

    def close(self) -> None:
        """Leave nothing at work."""
        if self._memory is not None:
            self._memory.close()

    def _written(self, read: Callable[[BlobWriter], Node]) -> Node:
        writer = self._repository.writer(self._options.dry_run, self._options.spool_in_memory)
        try:
            root = read(writer)
            stored = writer.finish()
            if self._memory is not None and not self._options.dry_run:
                self._memory.commit()
        finally:
            writer.close()
        self.stored.new_blobs += stored.new_blobs
        self.stored.new_plain_bytes += stored.new_plain_bytes
        self.stored.new_stored_bytes += stored.new_stored_bytes
        self.stored.packs += stored.packs
        return root

    def _walk(
        self,
        writer: BlobWriter,
        place: SourceNode,
        parent: tuple[SnapshotId, Snapshot] | None,
        tell_changed: bool,
    ) -> Node:
        capturer = self._capturer(writer)
        is_stored = _content_check(self._repository, parent)
        walker = Walker(
            capturer=capturer,
            trees=self._repository.trees,
            new_tree=self._new_tree(writer, keep_trees=is_stored is None),
            exclusions=self._options.exclusions,
            one_file_system=self._options.one_file_system,
            left_out=os.stat(self._repository.root),
            is_stored=is_stored,
            monitor=self._monitor,
            reread=self._options.reread,
            tell_changed=tell_changed,
            memory=self._memory,
        )
        self.stats, self.uids, self.gids = walker.stats, walker.uids, walker.gids
        if self._options.stdin_name is not None:
            return _read_stdin(capturer, walker, self._options.stdin_name)
        return walker.walk(place, parent[1].root if parent is not None else None)

    def _retry_changed(self, writer: BlobWriter, place: SourceNode, root: Node) -> Node:
        look = FinalRetry(
            self._capturer(writer), self._repository.trees, self._new_tree(writer), self._monitor
        )
        return look.run(root, place)

    def _capturer(self, writer: BlobWriter) -> Capturer:
        digest = self._repository.codec.digest
        reader = SourceReader(self._repository.chunker(), writer.put, digest)
        return Capturer(reader, self._freezer, self._patience, self._options.attempts)

    def _new_tree(self, writer: BlobWriter, keep_trees: bool = True) -> NewTree:
        digest, seed = self._repository.codec.digest, self._repository.tree_seed
        if not keep_trees:
            return lambda previous, nodes: TreeWriter(writer.put, digest, seed)
        return lambda previous, nodes: TreeWriter(writer.put, digest, seed, previous, nodes)


def _open_file_cache(repository: Repository, options: BackupOptions) -> FileCache | None:
    """Return what stands for the previous snapshot where that cannot be read."""
    domain = repository.vault.domain if repository.vault is not None else None
    if domain is None or not repository.is_locked or not options.use_parent:
        return None
    from casfs.backup.file_cache import FileCache

    return FileCache(repository.store.index, domain.memory_key, repository.loss_epoch)


def _content_check(
    repository: Repository, parent: tuple[SnapshotId, Snapshot] | None
) -> Callable[[Node], bool] | None:
    """Return what tells whether an unchanged file's content is still stored, or None if it must be.

    Where nothing was lost from the index since the parent was published, and no pack is condemned,
    nobody needs to ask.
    """
    index = repository.store.index
    if parent is None or (index.is_complete(parent[0]) and not index.marked_for_removal()):
        return None

    def is_stored(node: Node) -> bool:
        try:
            return all(index.are_stored(repository.content(node).blobs()))
        except IntegrityError:
            return False

    return is_stored


def _read_stdin(capturer: Capturer, walker: Walker, name: bytes) -> Node:
    """Return the root of a snapshot with the one file that is read from standard input."""
    st = os.fstat(0)
    now_ns = time.time_ns()
    node = replace(capturer.capture_stream(name, 0, st), mtime_ns=now_ns, ctime_ns=now_ns, inode=0)
    walker.count(node)
    root = make_node(b"", os.stat("."), NodeType.DIRECTORY, ())
    return replace(root, tree=_single_tree(walker, node))


def _single_tree(walker: Walker, node: Node) -> TreeRef:
    tree = walker.new_tree(None, None)
    tree.add(node)
    return tree.finish()


def _owner_names(numbers: set[int], name_of: Callable[[int], str]) -> tuple[tuple[int, str], ...]:
    found: list[tuple[int, str]] = []
    room_bytes = MAX_OWNER_NAMES_BYTES
    for number in sorted(numbers)[:MAX_OWNER_NAMES]:
        try:
            name = _unicode(name_of(number))
        except (KeyError, OverflowError):
            continue
        room_bytes -= _OWNER_BYTES + len(name.encode())
        if room_bytes < 0:
            break
        found.append((number, name))
    return tuple(found)


def _user_name() -> str:
    try:
        return _unicode(getpass.getuser())
    except (KeyError, OSError):
        return str(os.getuid())


def _unicode(name: str) -> str:
    """Return a name of an account in which bytes that are not UTF-8 are escaped: it is there for people."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
