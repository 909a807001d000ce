"""Restore a tree of a snapshot into a target folder, without a mount.

One thread walks the tree, and a worker pool writes small entries; results are reported in the order of the
tree. Damaged entries are reported, and the rest is restored. The restore writes nothing outside the target:
it reaches every directory by its descriptor, and replaces symlinks in its way without following them.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from casfs.digest import Digest
from casfs.display import escape_path
from casfs.errors import CasfsError, IntegrityError
from casfs.format.tree import CaptureState, HardLinkKey, Node, NodeType, hard_link_key
from casfs.monitor import EntryChange, Monitor, Problem, ProblemKind
from casfs.paths import join
from casfs.patterns import Pattern
from casfs.problems import changed_file, damaged_entry, restore_failed
from casfs.repository.prefetch import Prefetcher
from casfs.repository.repository import Repository
from casfs.restore import name_merging, removal, target_fs, temporary_entries
from casfs.restore.entry_writer import (
    EntryResult,
    EntryWriter,
    LinkTarget,
    Overwrite,
    WritingOptions,
)
from casfs.restore.metadata import set_metadata
from casfs.restore.open_directories import Directory, OpenDirectories
from casfs.restore.ordered_pool import DEFAULT_LIMITS, OrderedPool, PoolLimits
from casfs.restore.selection import Selection
from casfs.restore.staging import FileIdentity
from casfs.restore.writer_process import EntryJob, WriterProcesses, process_count
from casfs.trees.content import EXTENT, HOLE
from casfs.trees.reader import TreeReader

log = logging.getLogger(__name__)

_MAX_POOLED_BYTES = 1 << 20
"""The pool writes files of a single chunk up to this size. The walking thread writes larger files."""

_FILE, _CHANGED = int(NodeType.FILE), int(CaptureState.CHANGED)
"""Plain integers, for a look at every node."""

_DISK_FULL_ERRNOS = frozenset([errno.ENOSPC, errno.EDQUOT])


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """The options of a restore; patterns are matched against paths in the snapshot.

    `sources` are the paths of the snapshot. Directories that only lead to them keep their metadata, and
    nothing is deleted in them.
    """

    include: tuple[Pattern, ...] = ()
    exclude: tuple[Pattern, ...] = ()
    overwrite: Overwrite = Overwrite.ALWAYS
    delete: bool = False
    verify: bool = False
    salvage: bool = False
    dry_run: bool = False
    sources: tuple[bytes, ...] = (b".",)


@dataclass(slots=True)
class RestoreResult:
    """Counts of a restore: `damaged` files were restored in part or not, `failed` entries not at all."""

    files: int = 0
    directories: int = 0
    others: int = 0
    restored_bytes: int = 0
    skipped: int = 0
    deleted: int = 0
    flagged: int = 0
    damaged: int = 0
    failed: int = 0
    verified: int = 0


def _ignore(_: bytes) -> None:
    """Do nothing with a path."""


class Restorer:
    """Restore into one target. Use each instance for one restore, from one thread.

    `on_deleted` is called with the path of each entry that `delete` removes, or would remove in a dry run; a
    directory, which goes with everything below it, ends in a slash.
    """

    def __init__(
        self,
        repository: Repository,
        options: RestoreOptions,
        monitor: Monitor,
        *,
        limits: PoolLimits = DEFAULT_LIMITS,
        on_deleted: Callable[[bytes], None] = _ignore,
    ) -> None:
        self.result = RestoreResult()
        self._repository = repository
        self._options = options
        self._monitor = monitor
        self._selection = Selection(options.include, options.exclude)
        self._prefetcher: Prefetcher | None = None
        self._trees = TreeReader(self._read)
        self._writing = WritingOptions(
            options.overwrite,
            salvage=options.salvage,
            verify=options.verify,
            replace_folders=options.delete,
            dry_run=options.dry_run,
            has_keyed_digests=repository.has_keyed_digests,
        )
        self._writer = EntryWriter(self._writing, repository.content)
        self._selects = bool(options.include or options.exclude)
        self._keeps_excluded = bool(options.delete and options.exclude)
        self._limits = limits
        self._pool: OrderedPool[EntryJob, EntryResult] = OrderedPool(
            self._write, self._on_pooled_result, limits=limits
        )
        self._links: dict[HardLinkKey, tuple[bytes, FileIdentity]] = {}
        self._zeroed: dict[HardLinkKey, list[tuple[int, int]]] = {}
        self._root_fd, self._folder = -1, b""
        # Not the bound method: another pool may take the place of this one.
        self._directories = OpenDirectories(
            lambda step: self._pool.call_after(step), self._on_lost_directory
        )
        self._prefix_bytes = 0
        self._on_deleted = on_deleted
        self._sources = [source.strip(b"/") for source in options.sources]
        self._merging_devices: dict[int, bool] = {}

    def restore(self, path: bytes, node: Node, folder: bytes, with_root: bool) -> RestoreResult:
        """Restore the node at `path` of a snapshot; the entries of a directory go directly into `folder`.

        `with_root` applies the directory's own metadata to `folder`. Raises NotFoundError where the patterns
        select no entry.
        """
        self._folder = folder
        included = self._selection.begin(path, node.tree is not None)
        root = self._open_target(path, node, included)
        try:
            if self._reads_everything():
                self._prefetcher = Prefetcher(self._repository, path, node)
                self._start_processes(node)
            self._walk(root, with_root and node.tree is not None)
            self._pool.drain()
        finally:
            self._close(root)
        self._report_unmatched_patterns(path)
        return self.result

    def _start_processes(self, node: Node) -> None:
        """Let processes write the small entries of a large tree; they get the chunks that were prefetched."""
        count = process_count()
        if count and node.tree is not None and node.tree.nodes >= self._limits.process_entries:
            workers = WriterProcesses(self._writing, self._write, count)
            self._pool = OrderedPool(
                self._write, self._on_pooled_result, limits=self._limits, workers=workers
            )

    def _open_target(self, path: bytes, node: Node, included: bool) -> Directory:
        """Open the target folder, and return its frame.

        A single entry is restored as the only entry of a directory without metadata of its own.
        """
        mode, created = None, False
        if self._options.dry_run:
            self._root_fd = target_fs.open_if_exists(None, self._folder)
        else:
            self._root_fd, mode, created = target_fs.open_root(self._folder)
            self._warn_of_foreign_owner()
        if node.tree is not None:
            root = self._frame(path, node, self._root_fd, included)
        else:
            above = Node(b"", NodeType.DIRECTORY, 0o700, 0, 0, 0, 0, 0, 1)
            root = Directory(above, path.rpartition(b"/")[0], self._root_fd, included)
            root.nodes = iter([node])
            root.complete = False
        root.mode, root.created = mode, created
        if self._root_fd >= 0:
            self._prepare(root)
        self._prefix_bytes = len(root.path) + 1 if root.path else 0
        return root

    def _warn_of_foreign_owner(self) -> None:
        owner = os.fstat(self._root_fd).st_uid
        if owner not in (os.geteuid(), 0):
            log.warning(
                "the target %s belongs to user %d, who can read and replace what is restored there",
                escape_path(self._folder),
                owner,
            )

    def _close(self, root: Directory) -> None:
        """End all threads, then close all descriptors: no thread may write to a closed one."""
        self._pool.close()
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._directories.close()
        if self._root_fd >= 0:
            target_fs.close_restoring_mode(self._root_fd, root.mode)

    def _report_unmatched_patterns(self, path: bytes) -> None:
        """Report the patterns that matched nothing; raise NotFoundError where nothing was selected."""
        if not (self.result.damaged or self.result.failed):
            self._selection.require_match()
        for problem in self._selection.problems(path):
            self._monitor.problem(problem)

    def _reads_everything(self) -> bool:
        """Return whether the options make the restore read every file, so that prefetching pays."""
        options = self._options
        return not (
            options.include
            or options.exclude
            or options.dry_run
            or options.overwrite != Overwrite.ALWAYS
        )

    def _read(self, digest: Digest) -> bytes:
        if self._prefetcher is not None:
            return self._prefetcher.read(digest)
        return self._repository.store.read(digest)

    def _walk(self, root: Directory, with_root: bool) -> None:
        stack = self._directories.stack
        self._directories.push(root)
        while stack:
            frame = stack[-1]
            child = self._advance(frame)
            if child is not None:
                self._directories.push(child)
                continue
            is_root = len(stack) == 1
            # A directory that only leads to what was asked for keeps the metadata that it has.
            with_metadata = frame.created or self._may_change(frame)
            if is_root:
                with_metadata = with_metadata and with_root and frame.included
            self._directories.pop()
            self._pool.call_after(partial(self._leave, frame, with_metadata))

    def _may_change(self, frame: Directory) -> bool:
        """Return whether an existing directory was itself backed up, and was asked for."""
        return (
            frame.included
            and self._options.overwrite != Overwrite.NEVER
            and self._is_source(frame.path)
        )

    def _is_source(self, path: bytes) -> bool:
        """Return whether a path of the snapshot is a source or lies in one, and does not only lead to one."""
        return any(
            source in (b"", b".") or path == source or path.startswith(source + b"/")
            for source in self._sources
        )

    def _prepare(self, frame: Directory, above: Directory | None = None) -> None:
        """Clear and examine an open directory, which is in `above`, before anything is written to it."""
        if self._options.dry_run:
            return
        if not frame.created:
            temporary_entries.remove_abandoned(frame.fd)
        if frame.created and above is not None:
            # A new directory treats names as the one that it is in.
            merges_names = above.folded is not None
        else:
            merges_names = name_merging.merges_names(frame.fd, self._merging_devices)
        frame.folded = {} if merges_names else None
        frame.is_fresh = frame.created and target_fs.is_fresh(frame.fd)

    def _is_merged(self, frame: Directory, path: bytes, name: bytes) -> bool:
        """Report an entry for whose name the target finds another entry that was restored before."""
        if frame.fd < 0:
            try:
                self._open_with_parents(len(self._directories.stack) - 1, frame)
            except OSError:
                return False  # restoring the entry fails in the same way, and reports it
        if frame.folded is None:
            return False
        first = frame.folded.setdefault(name_merging.fold_name(name), name)
        if first == name:
            return False
        self._pool.drain()
        # Inode numbers do not show it: some file systems give each spelling of a name another one.
        if target_fs.entry_stat(frame.fd, name) is None:
            return False
        if {first, name} <= {os.fsencode(text) for text in os.listdir(frame.fd)}:
            return False
        message = (
            f"the target does not distinguish its name from {escape_path(first)}, which was restored; "
            "restore it to another folder"
        )
        self._fail(path, OSError(errno.EEXIST, message))
        return True

    def _advance(self, frame: Directory) -> Directory | None:
        """Restore entries up to a directory to enter, and return its frame; None after the last entry."""
        dry_run = self._options.dry_run
        for node in frame.nodes:
            path = join(frame.path, node.name)
            if self._prefetcher is not None:
                self._prefetcher.path = path
            if self._options.delete:
                frame.names.add(node.name)
            is_directory = node.tree is not None
            included = True
            if self._selects:
                if self._selection.excludes_node(path, is_directory):
                    continue
                included = self._selection.includes(path, is_directory, frame.included)
            # A directory without a descriptor has not been asked whether it merges names.
            may_merge = frame.folded is not None or frame.fd < 0
            if may_merge and included and not dry_run and self._is_merged(frame, path, node.name):
                continue
            if is_directory:
                child = self._frame(path, node, -1, included)
                if included and not self._enter(child):
                    continue
                if not included and dry_run and frame.fd >= 0:
                    self._directories.set_open(child, target_fs.open_if_exists(frame.fd, node.name))
                return child
            if included:
                self._restore_entry(frame, path, node)
        return None

    def _frame(self, path: bytes, node: Node, fd: int, included: bool) -> Directory:
        frame = Directory(node, path, fd, included)
        frame.nodes = self._nodes(frame)
        return frame

    def _nodes(self, frame: Directory) -> Iterator[Node]:
        """Yield the entries of a directory up to the first damaged tree, which is reported."""
        assert frame.node.tree is not None
        try:
            yield from self._trees.nodes(frame.node.tree)
        except IntegrityError as error:
            frame.complete = False
            message = f"the directory cannot be read completely: {error}"
            self._pool.call_after(partial(self._damaged, frame.path, message))

    def _enter(self, child: Directory) -> bool:
        """Create a directory and the missing ones above it; return False where an entry is in its way."""
        self.result.directories += 1
        self._progress(child.path)
        try:
            if self._options.dry_run:
                return self._open_existing(child)
            return self._open_with_parents(len(self._directories.stack), child)
        except OSError as error:
            self._pool.call_after(partial(self._fail, child.path, error))
            return False

    def _open_existing(self, child: Directory) -> bool:
        """Open a directory if it exists; return False where an entry in its way would be kept."""
        above = self._directories.stack[-1]
        name = child.node.name
        st = target_fs.entry_stat(above.fd, name) if above.fd >= 0 else None
        if st is not None and stat.S_ISDIR(st.st_mode):
            self._directories.set_open(child, target_fs.open_if_exists(above.fd, name))
        elif st is not None and self._options.overwrite == Overwrite.NEVER:
            self.result.skipped += 1
            return False
        return True

    def _open_with_parents(self, depth: int, child: Directory) -> bool:
        stack = self._directories.stack
        level = depth - 1
        while stack[level].fd < 0:
            level -= 1
        above = stack[level]
        for frame in (*stack[level + 1 : depth], child):
            if not self._open_in(above, frame):
                return False
            above = frame
            level += 1
            if level < len(stack):
                self._directories.limit_open(level)
        return True

    def _open_in(self, above: Directory, child: Directory) -> bool:
        name = child.node.name
        st = target_fs.entry_stat(above.fd, name)
        if st is not None and not stat.S_ISDIR(st.st_mode):
            if self._options.overwrite == Overwrite.NEVER:
                self.result.skipped += 1
                return False
            removal.remove(above.fd, name, st)
            st = None
        if st is None:
            self._directories.set_open(child, target_fs.make_directory(above.fd, name))
            child.created = True
        else:
            self._directories.set_open(child, *target_fs.open_writable(above.fd, name, st))
        self._prepare(child, above)
        return True

    def _leave(self, frame: Directory, with_metadata: bool) -> None:
        """Finish a directory after all its entries: delete others, set its metadata, close it."""
        if frame.fd < 0:
            return
        if self._options.delete and frame.complete and self._may_delete_in(frame):
            self._delete_others(frame)
        if with_metadata and not self._options.dry_run:
            self._report_metadata_errors(
                frame.path, set_metadata(frame.fd, frame.node, inherits=not frame.is_fresh)
            )
            frame.mode = None
        self._directories.finish(frame)

    def _on_lost_directory(self, directory: Directory, error: OSError) -> None:
        self._pool.call_after(partial(self._fail, directory.path, error))

    def _may_delete_in(self, frame: Directory) -> bool:
        """Return whether a directory was backed up itself, and is on the file system of the target."""
        if not frame.included or not self._is_source(frame.path):
            return False
        return os.fstat(frame.fd).st_dev == os.fstat(self._root_fd).st_dev

    def _delete_others(self, frame: Directory) -> None:
        names: set[bytes] | set[str] = frame.names
        if frame.folded is not None:
            names = {name_merging.fold_name(name) for name in frame.names}
        for text in os.listdir(frame.fd):
            name = os.fsencode(text)
            path = join(frame.path, name)
            known = name if frame.folded is None else name_merging.fold_name(name)
            if known in names or temporary_entries.is_temporary(name):
                continue
            try:
                st = target_fs.entry_stat(frame.fd, name)
                if st is None:
                    continue
                is_directory = stat.S_ISDIR(st.st_mode)
                if self._selection.excludes(path, is_directory):
                    continue
                if is_directory and self._options.exclude:
                    self._delete_directory(frame, name)
                    continue
                if not self._options.dry_run:
                    removal.remove(frame.fd, name, st)
                elif is_directory and st.st_dev != os.fstat(frame.fd).st_dev:
                    continue
                self._count_deleted(path, is_directory)
            except OSError as error:
                self._fail(path, error)

    def _delete_directory(self, frame: Directory, name: bytes) -> None:
        """Delete a directory that the snapshot lacks, except what the patterns exclude in it."""

        def count(path: bytes) -> None:
            self._count_deleted(join(frame.path, path.rstrip(b"/")), path.endswith(b"/"))

        removal.remove_except(
            frame.fd, name, partial(self._keeps, frame), count, self._options.dry_run
        )

    def _keeps(self, frame: Directory, path: bytes, is_directory: bool) -> bool:
        """Return whether a pattern excludes an entry of the target, at a path below a directory."""
        return self._selection.excludes(join(frame.path, path), is_directory)

    def _holds_excluded(self, frame: Directory, name: bytes) -> bool:
        """Return whether replacing an entry of the target would delete entries that patterns exclude."""
        if frame.fd < 0:
            return False
        st = target_fs.entry_stat(frame.fd, name)
        if st is None or not stat.S_ISDIR(st.st_mode):
            return False
        keeps = partial(self._keeps, frame)
        return not removal.remove_except(frame.fd, name, keeps, _ignore, dry_run=True)

    def _count_deleted(self, path: bytes, is_directory: bool) -> None:
        self.result.deleted += 1
        self._on_deleted(path + b"/" if is_directory else path)

    def _restore_entry(self, frame: Directory, path: bytes, node: Node) -> None:
        self._progress(path)
        dry_run = self._options.dry_run
        try:
            if (
                frame.fd < 0
                and not dry_run
                and not self._open_with_parents(len(self._directories.stack) - 1, frame)
            ):
                return
            if self._keeps_excluded and self._holds_excluded(frame, node.name):
                raise OSError(errno.ENOTEMPTY, "a directory with excluded entries is in its place")
        except OSError as error:
            self._pool.call_after(partial(self._on_result, EntryResult(path, node, error=error)))
            return
        key = hard_link_key(node) if node.nlink > 1 else None
        if key is not None:
            self._restore_name(frame, path, node, key)
            return
        if _is_small(node) and not dry_run:
            chunk = self._prefetched_chunk(node)
            if chunk is not None or self._prefetcher is None or not _has_chunk(node):
                size = len(chunk) if chunk is not None else 0
                self._pool.work(EntryJob(frame.fd, frame.is_fresh, path, node, chunk), size)
                return
        result = self._writer.write(
            frame.fd,
            path,
            node,
            self._read_counted,
            on_reread=self._monitor.progress.read_bytes_again,
        )
        self._finish_file(node)
        self._pool.call_after(partial(self._on_result, result))

    def _prefetched_chunk(self, node: Node) -> bytes | None:
        """Return the only chunk of a small file if prefetching is on and the chunk is intact, or None."""
        if self._prefetcher is None or not _has_chunk(node):
            return None
        try:
            return self._prefetcher.read(Digest(node.content[8:]))
        except CasfsError:
            return None  # writing the file reads it again, and gets the error

    def _write(self, job: EntryJob) -> EntryResult:
        """Write an entry. Thread-safe."""
        fd, is_fresh, path, node, chunk = job
        read = self._repository.store.read if chunk is None else lambda _: chunk
        return self._writer.write(fd, path, node, read, is_fresh=is_fresh)

    def _restore_name(self, frame: Directory, path: bytes, node: Node, key: HardLinkKey) -> None:
        """Restore a file with several names: as a hard link where another of its names was restored."""
        self._pool.drain()
        known = self._links.get(key)
        link_target = LinkTarget(self._root_fd, *known) if known is not None else None
        result = self._writer.write(
            frame.fd,
            path,
            node,
            self._read_counted,
            link_target,
            self._monitor.progress.read_bytes_again,
        )
        self._finish_file(node)
        is_new = result.written and not result.linked and not self._options.dry_run
        if result.identity is not None and (is_new or result.unchanged):
            self._links[key] = path[self._prefix_bytes :], result.identity
        if result.linked:
            result.lost = self._zeroed.get(key, [])
        elif result.lost:
            self._zeroed[key] = result.lost
        self._on_result(result)

    def _read_counted(self, digest: Digest) -> bytes:
        """Read a chunk of a file that this thread writes."""
        plain = self._read(digest)
        self._monitor.progress.read_bytes(len(plain))
        return plain

    def _finish_file(self, node: Node) -> None:
        if node.kind == _FILE:
            self._monitor.progress.finish_file(node.size)

    def _on_pooled_result(self, result: EntryResult) -> None:
        if result.node.kind == _FILE:
            self._monitor.progress.add_bytes(result.node.size)
        self._on_result(result)

    def _on_result(self, result: EntryResult) -> None:
        """Count and report the result of one entry."""
        path, node, error = result.path, result.node, result.error
        if node.state == _CHANGED:
            self.result.flagged += 1
            self._monitor.problem(changed_file(path, node))
        if result.lost:
            ranges = ", ".join(f"{begin}-{end}" for begin, end in result.lost)
            message = f"it is damaged; bytes {ranges} were restored as zeros"
            self._damaged(path, message, None, result.lost)
        if result.metadata_errors:
            self._report_metadata_errors(path, result.metadata_errors)
        self.result.skipped += result.skipped
        if result.link_error is not None:
            message = f"it is a copy: the hard link to its other name failed: {result.link_error.strerror}"
            self._monitor.problem(Problem(ProblemKind.METADATA, path, message))
        if result.written and result.replaced_folder:
            self._count_deleted(path, True)
        if result.written:
            self._count(node)
            self._monitor.entry(path, EntryChange.RESTORE)
        if result.is_verified is not None:
            if result.is_verified or self._options.salvage:
                self.result.verified += 1
            else:
                self._damaged(path, "digest mismatch when the restored file was read back")
        if isinstance(error, IntegrityError):
            self._damaged(path, f"it is damaged and was not restored: {error}", error)
        elif error is not None:
            if error.errno in _DISK_FULL_ERRNOS:
                target = join(self._folder, path[self._prefix_bytes :])
                raise OSError(error.errno, os.strerror(error.errno or 0), target) from error
            self._fail(path, error)

    def _report_metadata_errors(self, path: bytes, errors: list[str]) -> None:
        for message in errors:
            self._monitor.problem(
                Problem(ProblemKind.METADATA, path, f"not all metadata could be set: {message}")
            )

    def _count(self, node: Node) -> None:
        if node.kind == _FILE:
            self.result.files += 1
            self.result.restored_bytes += node.size
        else:
            self.result.others += 1

    def _progress(self, path: bytes) -> None:
        self._monitor.progress.path = path
        self._monitor.progress.items += 1

    def _damaged(
        self,
        path: bytes,
        message: str,
        error: IntegrityError | None = None,
        ranges: list[tuple[int, int]] | None = None,
    ) -> None:
        self.result.damaged += 1
        self._monitor.problem(damaged_entry(path, message, error, ranges or ()))

    def _fail(self, path: bytes, error: OSError) -> None:
        self.result.failed += 1
        self._monitor.problem(restore_failed(path, error))


def _is_small(node: Node) -> bool:
    """Return whether an entry needs at most one chunk, which is small."""
    if node.kind != _FILE:
        return True
    is_single_chunk = not node.levels and len(node.content) <= EXTENT.size
    return is_single_chunk and node.size <= _MAX_POOLED_BYTES


def _has_chunk(node: Node) -> bool:
    """Return whether a small entry has a chunk to read."""
    content = node.content
    return node.kind == _FILE and len(content) == EXTENT.size and content[8:] != HOLE
