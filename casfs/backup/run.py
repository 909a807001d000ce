"""Run a backup: walk the sources once, merge with the parent snapshot, publish a snapshot.

One thread walks, compares, reads, hashes and packs; the threads of the writer compress, write and commit.
Entries are visited in the order of their names, and a directory after its entries, so that every tree is
written once and memory holds one directory of each level. After the walk, files in state `changed` are
captured again.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec import UNSET, UnsetType

from casfs import __version__
from casfs.backup.allowance import DEFAULT_MAX_HOLE_BYTES, Allowances
from casfs.backup.capture import DEFAULT_ATTEMPTS, Capturer
from casfs.backup.entry_builder import EntryBuilder
from casfs.backup.exclude import Exclusions
from casfs.backup.final_retry import FinalRetry
from casfs.backup.named_sources import included_sources, lstat_error, require_a_source
from casfs.backup.owner_names import (
    MAX_OWNER_NAMES_BYTES,
    group_names,
    user_name,
    user_names,
)
from casfs.backup.reflink import Freeze, Reflinker
from casfs.backup.source_fs import make_node
from casfs.backup.source_process import DEFAULT_MOUNT_TIMEOUT_S, ServedMounts
from casfs.backup.source_reader import SourceReader
from casfs.backup.sources import SourceNode, build_source_tree
from casfs.backup.stability import DEFAULT_PATIENCE_S, RetryBudget
from casfs.backup.stored_content import content_check
from casfs.backup.walker import NewTree, Walker
from casfs.digest import SnapshotId
from casfs.errors import (
    NotPublishedError,
    PacksRemovedError,
    StorageError,
    StorageUnavailableError,
)
from casfs.format.snapshot import Snapshot, SnapshotStats, require_encodable
from casfs.format.tree import Node, NodeType, replace
from casfs.monitor import Monitor, Unit
from casfs.paths import normalize_source_path
from casfs.repository.place import LocalPlace, Place
from casfs.repository.repository import Repository
from casfs.repository.snapshot_filter import latest_of
from casfs.storage.concurrency import begin
from casfs.store.writer import BlobWriter, WriteStats

if TYPE_CHECKING:
    # Each is imported by the function that needs it: most backups need none of them.
    from casfs.backup.file_cache import FileCache
    from casfs.backup.protection import Protection, ProtectionResult

log = logging.getLogger(__name__)

DEFAULT_STDIN_NAME = b"stdin"

_MOST_READINGS = 3
"""How often the sources are read before a backup fails, where other hosts remove packs that it needs."""

_ROOM_BYTES = 2 * MAX_OWNER_NAMES_BYTES + 1024 * 1024
"""Upper bound of the encoded size of the fields that are known only after the walk."""


@dataclass(frozen=True, slots=True)
class BackupOptions:
    """The sources and options of a backup.

    `time_ns` None is the current time; `parent` None is the newest snapshot of the same host and paths,
    with or without the paths that are missing now. `patience_s` limits the pauses and further attempts at
    changing files in the whole backup; with a single attempt or no patience, the final retry is skipped
    too. `max_hole_bytes` limits the holes that are read of the files of each user, except root and the
    user of the process.
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
    max_hole_bytes: int = DEFAULT_MAX_HOLE_BYTES
    mount_timeout_s: float = DEFAULT_MOUNT_TIMEOUT_S
    freeze: Freeze = Freeze.AUTO
    reread: bool = False
    dry_run: bool = False
    spool_in_memory: bool = False
    stdin_name: bytes | None = None
    stdin_command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BackupResult:
    """The published snapshot; `snapshot_id` is None for a dry run.

    At most `abandoned_bytes` of what was newly stored belongs to attempts at files that changed, and to no
    snapshot.
    `new` files are not in the parent snapshot, `modified` files are there with other metadata. `protection`
    is None where the repository has no lock policy. `false_packs` is the number of packs without blobs that
    another machine said they hold; this backup stored them again.
    """

    snapshot_id: SnapshotId | None
    snapshot: Snapshot
    missing_sources: int
    abandoned_bytes: int = 0
    new: int = 0
    modified: int = 0
    protection: ProtectionResult | None = None
    false_packs: int = 0


def run_backup(repository: Repository, options: BackupOptions, monitor: Monitor) -> BackupResult:
    """Read the sources and publish a snapshot of them.

    Problems of single entries go to `monitor` and into the counts. Raises NotFoundError where no source
    exists or all are excluded, UsageError where the paths do not fit into the snapshot's file, and the
    errors of the repository; nothing is published then.
    """
    began = time.monotonic()
    # A stream cannot be read twice.
    readings_left = _MOST_READINGS if options.stdin_name is None else 1
    snapshot_id: SnapshotId | None = None
    protected = None
    with closing(ServedMounts(options.mount_timeout_s)) as mounts:
        sources = included_sources(options.paths, options.exclusions, mounts, monitor)
        require_a_source(sources, mounts, repository.place)
        draft = _draft_snapshot(options)
        # Refuse a snapshot that could not be published before anything is stored.
        require_encodable(draft, _ROOM_BYTES)
        begin_protection = begin(
            repository.store.storage,
            lambda: None if options.dry_run else _begin_protection(repository),
        )
        while True:
            readings_left -= 1
            parent = _find_parent(repository, options, mounts)
            protection = begin_protection()
            _begin_progress(monitor, parent)
            try:
                with closing(_Backup(repository, options, sources, mounts, monitor)) as backup:
                    root = backup.read(parent)
                if protection is not None:
                    monitor.progress.stage = "locking objects"
                    protection.protect_needed(root, parent)
            except (StorageError, StorageUnavailableError) as error:
                raise NotPublishedError(str(repository.place), error) from error
            snapshot = _complete_snapshot(draft, root, parent, backup, began)
            if options.dry_run:
                break
            try:
                unchanged_since = None
                if parent is not None and parent[1].root == root:
                    unchanged_since = parent[0]
                snapshot_id = repository.snapshots.publish(
                    snapshot, unchanged_since=unchanged_since
                )
                break
            except PacksRemovedError as error:
                if not readings_left:
                    raise
                log.warning("%s; reading the sources again", error.reason)
                repository.snapshots.begin_again()
    if protection is not None and snapshot_id is not None:
        protected = protection.protect_snapshot(snapshot_id)
    stats = backup.entries.stats
    return BackupResult(
        snapshot_id,
        snapshot,
        len(stats.missing_sources),
        backup.abandoned_bytes,
        stats.new,
        stats.modified,
        protected,
        len(repository.claims.false_packs),
    )


def _begin_protection(repository: Repository) -> Protection | None:
    """Return the protection that the lock policy asks for, None where nothing can be locked."""
    if repository.store.storage.bucket is None:
        return None
    from casfs.backup.protection import Protection

    return Protection.begin(repository)


def _draft_snapshot(options: BackupOptions) -> Snapshot:
    """Return a snapshot with the fields that are known before the walk."""
    return Snapshot(
        root=Node(b"", NodeType.DIRECTORY, 0, 0, 0, 0, 0, 0, 1),
        time_ns=options.time_ns if options.time_ns is not None else time.time_ns(),
        host=options.host,
        user=user_name(),
        paths=_kept_paths(options),
        tags=options.tags,
        program=f"casfs {__version__}",
        directory=_recorded_directory(options),
    )


def _complete_snapshot(
    draft: Snapshot,
    root: Node,
    parent: tuple[SnapshotId, Snapshot] | None,
    backup: _Backup,
    began: float,
) -> Snapshot:
    """Return the draft with the results of the walk; `began` is from `time.monotonic()`."""
    entries, stats, stored = backup.entries, backup.entries.stats, backup.stored
    return replace(
        draft,
        root=root,
        paths=_without(draft.paths, stats.missing_sources),
        users=user_names(entries.uids),
        groups=group_names(entries.gids),
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


def _find_parent(
    repository: Repository, options: BackupOptions, mounts: ServedMounts
) -> tuple[SnapshotId, Snapshot] | None:
    """Return the parent that the options name, or the newest proven snapshot of the same host and paths.

    Raise RefusedError for a named one that is unproven.
    """
    if not options.use_parent:
        return None
    if options.parent is not None:
        named = repository.snapshots.resolve(options.parent)
        repository.snapshots.provenance.require_proven(named[0], "this parent")
        return named
    if repository.lacks_identity:
        return None
    paths = _kept_paths(options)
    missing = [path for path in options.paths if lstat_error(path, mounts) is not None]
    directory = _recorded_directory(options)
    # A forged snapshot could name the attacker's data as the unchanged content of a file.
    found = [
        (snapshot_id, snapshot)
        for snapshot_id, snapshot in repository.snapshots.iterate()
        if snapshot.host == options.host
        and snapshot.paths in (paths, _without(paths, missing))
        and snapshot.directory in (directory, UNSET)
        and repository.snapshots.provenance.is_from_trusted_writer(snapshot_id)
    ]
    return latest_of(found, time.time_ns()) if found else None


def _begin_progress(monitor: Monitor, parent: tuple[SnapshotId, Snapshot] | None) -> None:
    """Begin to count files and bytes; those of the parent snapshot are the estimated totals."""
    tree = parent[1].root.tree if parent is not None else None
    if parent is None or tree is None:
        monitor.progress.begin("", Unit.FILES)
        return
    monitor.progress.begin(
        "",
        Unit.FILES,
        total_items=parent[1].stats.files,
        total_bytes=tree.total_bytes,
        is_estimate=True,
    )


def _repository_stat(place: Place) -> os.stat_result | None:
    """Return the attributes of the repository's folder, None where it is on another machine."""
    return os.stat(place.root) if isinstance(place, LocalPlace) else None


def _kept_paths(options: BackupOptions) -> tuple[bytes, ...]:
    if options.stdin_name is not None:
        return (options.stdin_name,)
    return tuple(sorted({normalize_source_path(path) for path in options.paths}))


def _without(paths: tuple[bytes, ...], missing: Iterable[bytes]) -> tuple[bytes, ...]:
    """Return the paths of a snapshot without the sources that it does not hold."""
    lost = {normalize_source_path(path) for path in missing}
    return tuple(path for path in paths if path not in lost)


def _recorded_directory(options: BackupOptions) -> bytes | UnsetType:
    """Return the directory that relative sources refer to; UNSET if all are absolute or it is gone.

    A file from standard input counts as relative unless the user named it.
    """
    is_relative = any(not path.startswith(b"/") for path in _kept_paths(options))
    if options.stdin_name is not None:
        is_relative = options.stdin_name == DEFAULT_STDIN_NAME
    if not is_relative:
        return UNSET
    try:
        return os.getcwdb()
    except OSError:
        return UNSET


class _Backup:
    """The reading part of one backup: the walk, and the final retry of changed files.

    `entries` and `stored` hold the counts after `read`.
    """

    def __init__(
        self,
        repository: Repository,
        options: BackupOptions,
        sources: tuple[bytes, ...],
        mounts: ServedMounts,
        monitor: Monitor,
    ) -> None:
        self.entries: EntryBuilder
        self.stored = WriteStats()
        self._capturers: list[Capturer] = []
        self._repository = repository
        self._options = options
        self._sources = sources
        self._mounts = mounts
        self._monitor = monitor
        self._reflinker = Reflinker(options.freeze)
        self._budget = RetryBudget(options.patience_s)
        self._allowances = Allowances(options.max_hole_bytes)
        self._devices: dict[bytes, int] = {}
        self._file_cache = _open_file_cache(repository, options)

    def read(self, parent: tuple[SnapshotId, Snapshot] | None) -> Node:
        """Return the root of the new snapshot, after all blobs that it refers to are durable and indexed."""
        options = self._options
        # A dry run stores no trees, so the retry could not read them.
        retries = options.attempts > 1 and options.patience_s > 0 and not options.dry_run
        sources = build_source_tree(list(self._sources), self._mounts.is_directory_link)
        root = self._write(lambda writer: self._walk(writer, sources, parent, not retries))
        if retries and root.tree is not None and root.tree.flagged:
            self._budget.release_reserve()
            self._monitor.progress.begin("reading changed files again", Unit.FILES)
            root = self._write(lambda writer: self._retry_changed(writer, sources, root))
        return root

    def close(self) -> None:
        """End the thread of the files cache."""
        if self._file_cache is not None:
            self._file_cache.close()

    def _write(self, read: Callable[[BlobWriter], Node]) -> Node:
        """Run `read` with a writer, and make everything durable that it stored."""
        writer = self._repository.writer(self._options.dry_run, self._options.spool_in_memory)
        try:
            root = read(writer)
            self._monitor.progress.stage = "storing the last packs"
            stored = writer.finish()
            if self._file_cache is not None and not self._options.dry_run:
                self._file_cache.commit()
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
        sources: SourceNode,
        parent: tuple[SnapshotId, Snapshot] | None,
        report_changed: bool,
    ) -> Node:
        capturer = self._capturer(writer)
        is_stored = content_check(self._repository, parent)
        new_tree = self._new_tree(writer, keep_trees=is_stored is None)
        self.entries = EntryBuilder(
            capturer=capturer,
            monitor=self._monitor,
            is_stored=is_stored,
            reread=self._options.reread,
            report_changed=report_changed,
            file_cache=self._file_cache,
        )
        if self._options.stdin_name is not None:
            from casfs.backup.stream import open_stream

            with open_stream(self._options.stdin_command) as fd:
                return _read_stream(capturer, self.entries, new_tree, self._options.stdin_name, fd)
        walker = Walker(
            entries=self.entries,
            trees=self._repository.trees,
            new_tree=new_tree,
            exclusions=self._options.exclusions,
            one_file_system=self._options.one_file_system,
            repository_stat=_repository_stat(self._repository.place),
            monitor=self._monitor,
            devices=self._devices,
            mounts=self._mounts,
        )
        return walker.walk(sources, parent[1].root if parent is not None else None)

    def _retry_changed(self, writer: BlobWriter, sources: SourceNode, root: Node) -> Node:
        retry = FinalRetry(
            self._capturer(writer),
            self._repository.trees,
            self._new_tree(writer),
            self._monitor,
            self._devices,
            self._mounts,
        )
        return retry.run(root, sources)

    def _capturer(self, writer: BlobWriter) -> Capturer:
        digest = self._repository.codec.digest
        progress = self._monitor.progress
        reader = SourceReader(
            self._repository.chunker(),
            writer.put,
            digest,
            self._allowances.take_hole,
            progress.read_bytes,
        )
        capturer = Capturer(
            reader,
            self._reflinker,
            self._budget,
            self._options.attempts,
            allowances=self._allowances,
            on_attempt=progress.begin_file,
            on_reread=progress.read_bytes_again,
        )
        self._capturers.append(capturer)
        return capturer

    @property
    def abandoned_bytes(self) -> int:
        """Return how much was stored, at most, of attempts that the snapshot does not use."""
        abandoned_bytes = sum(capturer.abandoned_bytes for capturer in self._capturers)
        return min(abandoned_bytes, self.stored.new_plain_bytes)

    def _new_tree(self, writer: BlobWriter, keep_trees: bool = True) -> NewTree:
        tree_writer = self._repository.tree_writer
        if not keep_trees:
            return lambda previous, nodes: tree_writer(writer.put)
        return lambda previous, nodes: tree_writer(writer.put, previous, nodes)


def _open_file_cache(repository: Repository, options: BackupOptions) -> FileCache | None:
    """Return the files cache of a write-only host, which replaces the parent; None on other hosts."""
    keys = repository.key_manager
    if keys is None or keys.domain is None or keys.can_read or not options.use_parent:
        return None
    from casfs.backup.file_cache import FileCache

    earlier_keys = [domain.file_cache_key for domain in keys.earlier_domains]
    key = keys.domain.file_cache_key
    return FileCache(repository.store.index, key, repository.loss_epoch, earlier_keys)


def _read_stream(
    capturer: Capturer, entries: EntryBuilder, new_tree: NewTree, name: bytes, fd: int
) -> Node:
    """Return the root of a snapshot whose only file is read from a stream."""
    st = os.fstat(fd)
    now_ns = time.time_ns()
    node = replace(capturer.capture_stream(name, fd, st), mtime_ns=now_ns, ctime_ns=now_ns, inode=0)
    entries.count_difference(name, None)
    entries.count(node)
    tree = new_tree(None, None)
    tree.add(node)
    root = make_node(b"", os.stat("."), NodeType.DIRECTORY, ())
    return replace(root, tree=tree.finish())
