"""Restore: a tree of a snapshot, written below a target folder without a mount.

One thread goes through the tree, and a crew writes small entries; what happened is told in the order of the
tree. What is damaged is reported and the rest is restored. Nothing is written outside the target: every
directory is reached by its descriptor, and a symlink in the way is replaced and never followed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from casfs.digest import Digest
from casfs.errors import CasfsError, IntegrityError
from casfs.format.tree import CaptureState, Node, NodeType, captured_digest, hard_link_key
from casfs.monitor import Monitor, Problem, ProblemKind
from casfs.paths import join
from casfs.patterns import Pattern
from casfs.problems import changed_file, damaged_entry, restore_failed
from casfs.repository.repository import Repository
from casfs.restore import target_fs
from casfs.restore.entry_writer import EntryResult, EntryWriter, LinkTarget, Overwrite
from casfs.restore.ordered_pool import DEFAULT_LIMITS, OrderedPool, PoolLimits
from casfs.restore.prefetch import Prefetcher
from casfs.restore.selection import Selection
from casfs.trees.content import EXTENT, HOLE
from casfs.trees.reader import TreeReader

_HANDED_OVER_BYTES = 1 << 20
"""A file of one chunk is written by the crew if it is no larger; others are, and are read, one at a time."""

_FULL = frozenset([errno.ENOSPC, errno.EDQUOT])

_LinkKey = tuple[int, int, int, bytes]
"""Device, inode, kind and content: an inode's number may have served two files in one backup."""


_Job = tuple[int, bytes, Node, bytes | None]
"""The directory, the path in the snapshot, and the node of an entry; its only chunk where that was read."""


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """What to restore and how; patterns are matched against paths in the snapshot."""

    include: tuple[Pattern, ...] = ()
    exclude: tuple[Pattern, ...] = ()
    overwrite: Overwrite = Overwrite.ALWAYS
    delete: bool = False
    verify: bool = False
    salvage: bool = False
    dry_run: bool = False


@dataclass(slots=True)
class RestoreResult:
    """What was done; `damaged` files were not restored whole, `failed` entries not at all."""

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


@dataclass(slots=True)
class _Frame:
    """A directory that is being restored; `fd` is -1 until something in it is wanted.

    `mode` is that which a directory of the target had, where it was changed to write into it.
    """

    node: Node
    path: bytes
    fd: int
    wanted: bool
    nodes: Iterator[Node] = field(default_factory=lambda: iter(()))
    created: bool = False
    mode: int | None = None
    complete: bool = True
    kept: set[bytes] = field(default_factory=set)


class Restorer:
    """Restore into one target; used once, by one thread."""

    def __init__(
        self,
        repository: Repository,
        options: RestoreOptions,
        monitor: Monitor,
        *,
        limits: PoolLimits = DEFAULT_LIMITS,
    ) -> None:
        self.result = RestoreResult()
        self._repository = repository
        self._options = options
        self._monitor = monitor
        self._selection = Selection(options.include, options.exclude)
        self._ahead: Prefetcher | None = None
        self._trees = TreeReader(self._read)
        self._writer = EntryWriter(
            repository,
            options.overwrite,
            salvage=options.salvage,
            verify=options.verify,
            replace_folders=options.delete,
            dry_run=options.dry_run,
        )
        self._crew: OrderedPool[_Job, EntryResult] = OrderedPool(
            self._write, self._settle, limits=limits
        )
        self._links: dict[_LinkKey, bytes] = {}
        self._zeroed: dict[_LinkKey, list[tuple[int, int]]] = {}
        self._root_fd, self._folder = -1, b""
        self._opened: dict[int, _Frame] = {}
        self._stack: list[_Frame] = []
        self._base = 0

    def restore(self, path: bytes, node: Node, folder: bytes, with_root: bool) -> RestoreResult:
        """Restore the node at `path` of a snapshot: a directory's entries go straight into `folder`.

        `with_root` gives `folder` the directory's own metadata too. Raises NotFoundError where the patterns
        leave nothing to restore.
        """
        root, mode = None, None
        self._folder = folder
        wanted = self._selection.begin(path, node.tree is not None)
        if self._options.dry_run:
            self._root_fd = target_fs.open_if_exists(None, folder)
        else:
            self._root_fd, mode = target_fs.open_root(folder)
        try:
            if node.tree is None:
                above = Node(b"", NodeType.DIRECTORY, 0o700, 0, 0, 0, 0, 0, 1)
                root = _Frame(above, path.rpartition(b"/")[0], self._root_fd, wanted)
                root.nodes = iter([node])
                root.complete = with_root = False
            else:
                root = self._frame(path, node, self._root_fd, wanted)
            root.mode = mode
            self._base = len(root.path) + 1 if root.path else 0
            if self._takes_everything():
                self._ahead = Prefetcher(self._repository, path, node)
            self._run(root, with_root)
            self._crew.drain()
        finally:
            # Nobody writes any more when descriptors are closed.
            self._crew.close()
            if self._ahead is not None:
                self._ahead.close()
            for frame in reversed(self._opened.values()):
                target_fs.close_restoring_mode(frame.fd, frame.mode)
            if self._root_fd >= 0:
                target_fs.close_restoring_mode(
                    self._root_fd, root.mode if root is not None else mode
                )
        if not (self.result.damaged or self.result.failed):
            self._selection.require_match()
        for problem in self._selection.problems(path):
            self._monitor.problem(problem)
        return self.result

    def _takes_everything(self) -> bool:
        """Tell whether all that is there will be read, as far as can be said before."""
        options = self._options
        return not (
            options.include
            or options.exclude
            or options.dry_run
            or options.overwrite != Overwrite.ALWAYS
        )

    def _read(self, digest: Digest) -> bytes:
        if self._ahead is not None:
            return self._ahead.read(digest)
        return self._repository.store.read(digest)

    def _run(self, root: _Frame, with_root: bool) -> None:
        self._stack = [root]
        while self._stack:
            frame = self._stack[-1]
            child = self._advance(frame)
            if child is not None:
                self._stack.append(child)
                continue
            is_root = len(self._stack) == 1
            with_metadata = frame.created or (with_root if is_root else frame.wanted)
            self._stack.pop()
            self._crew.call_after(partial(self._leave, frame, with_metadata))

    def _advance(self, frame: _Frame) -> _Frame | None:
        for node in frame.nodes:
            path = join(frame.path, node.name)
            if self._ahead is not None:
                self._ahead.path = path
            if self._options.delete:
                frame.kept.add(node.name)
            is_directory = node.tree is not None
            if self._selection.leaves_out(path, is_directory):
                continue
            included = self._selection.takes(path, is_directory, frame.wanted)
            if is_directory:
                child = self._frame(path, node, -1, included)
                if included and not self._enter(child):
                    continue
                if not included and self._options.dry_run and frame.fd >= 0:
                    self._has_opened(child, target_fs.open_if_exists(frame.fd, node.name))
                return child
            if included:
                self._restore_entry(frame, path, node)
        return None

    def _frame(self, path: bytes, node: Node, fd: int, wanted: bool) -> _Frame:
        frame = _Frame(node, path, fd, wanted)
        frame.nodes = self._nodes(frame)
        return frame

    def _nodes(self, frame: _Frame) -> Iterator[Node]:
        """Yield a directory's entries; a damaged tree is reported where it ends."""
        assert frame.node.tree is not None
        try:
            yield from self._trees.nodes(frame.node.tree)
        except IntegrityError as error:
            frame.complete = False
            message = f"the directory cannot be read whole: {error}"
            self._crew.call_after(partial(self._damaged, frame.path, message))

    def _enter(self, child: _Frame) -> bool:
        """Make a directory, with those above it that nobody needed yet; False where it is in the way."""
        self.result.directories += 1
        self._progress(child.path)
        try:
            if self._options.dry_run:
                return self._look(child)
            return self._open(len(self._stack), child)
        except OSError as error:
            self._crew.call_after(partial(self._fail, child.path, error))
            return False

    def _look(self, child: _Frame) -> bool:
        """Open what is there already of a directory; False where something else would be left."""
        above = self._stack[-1]
        name = child.node.name
        st = target_fs.entry_stat(above.fd, name) if above.fd >= 0 else None
        if st is not None and stat.S_ISDIR(st.st_mode):
            self._has_opened(child, target_fs.open_if_exists(above.fd, name))
        elif st is not None and self._options.overwrite == Overwrite.NEVER:
            self.result.skipped += 1
            return False
        return True

    def _open(self, depth: int, child: _Frame) -> bool:
        opened = depth - 1
        while self._stack[opened].fd < 0:
            opened -= 1
        above = self._stack[opened]
        for frame in (*self._stack[opened + 1 : depth], child):
            if not self._open_in(above, frame):
                return False
            above = frame
        return True

    def _open_in(self, above: _Frame, child: _Frame) -> bool:
        name = child.node.name
        st = target_fs.entry_stat(above.fd, name)
        if st is not None and not stat.S_ISDIR(st.st_mode):
            if self._options.overwrite == Overwrite.NEVER:
                self.result.skipped += 1
                return False
            target_fs.remove(above.fd, name, st)
            st = None
        if st is None:
            self._has_opened(child, target_fs.make_directory(above.fd, name))
            child.created = True
        else:
            self._has_opened(child, *target_fs.open_writable(above.fd, name, st))
        return True

    def _has_opened(self, frame: _Frame, fd: int, mode: int | None = None) -> None:
        frame.fd, frame.mode = fd, mode
        if fd >= 0:
            self._opened[fd] = frame

    def _leave(self, frame: _Frame, with_metadata: bool) -> None:
        if frame.fd < 0:
            return
        if self._options.delete and frame.wanted and frame.complete:
            self._delete_others(frame)
        if with_metadata and not self._options.dry_run:
            self._report_metadata_errors(
                frame.path, target_fs.set_metadata(frame.fd, b".", frame.node, frame.fd)
            )
            frame.mode = None
        if self._opened.pop(frame.fd, None) is not None:
            target_fs.close_restoring_mode(frame.fd, frame.mode)

    def _delete_others(self, frame: _Frame) -> None:
        for text in os.listdir(frame.fd):
            name = os.fsencode(text)
            path = join(frame.path, name)
            if name in frame.kept:
                continue
            try:
                st = target_fs.entry_stat(frame.fd, name)
                if st is None:
                    continue
                is_directory = stat.S_ISDIR(st.st_mode)
                if self._selection.excludes(path, is_directory):
                    continue
                if not self._options.dry_run:
                    target_fs.remove(frame.fd, name, st)
                self.result.deleted += 1
            except OSError as error:
                self._fail(path, error)

    def _restore_entry(self, frame: _Frame, path: bytes, node: Node) -> None:
        self._progress(path)
        dry_run = self._options.dry_run
        try:
            if frame.fd < 0 and not dry_run and not self._open(len(self._stack) - 1, frame):
                return
        except OSError as error:
            self._crew.call_after(partial(self._settle, EntryResult(path, node, error=error)))
            return
        key = _link_key(node)
        if key is not None:
            self._restore_name(frame, path, node, key)
        elif _is_small(node) and not dry_run:
            blob = self._single_chunk(node)
            self._crew.work((frame.fd, path, node, blob), len(blob or b""))
        else:
            outcome = self._writer.write(frame.fd, path, node, self._read)
            self._crew.call_after(partial(self._settle, outcome))

    def _single_chunk(self, node: Node) -> bytes | None:
        """Return the only chunk of a small entry if it was read ahead; what is damaged is met again."""
        digest = node.content[EXTENT.size - len(HOLE) :]
        if self._ahead is None or node.kind != NodeType.FILE or not digest or digest == HOLE:
            return None
        try:
            return self._ahead.read(Digest(digest))
        except CasfsError:
            return None

    def _write(self, job: _Job) -> EntryResult:
        """Write an entry; in any thread."""
        fd, path, node, blob = job
        read = self._repository.store.read if blob is None else lambda _: blob
        return self._writer.write(fd, path, node, read)

    def _restore_name(self, frame: _Frame, path: bytes, node: Node, key: _LinkKey) -> None:
        """Restore one of several names of a file: a link where another one was restored before."""
        self._crew.drain()
        known = self._links.get(key)
        first = LinkTarget(self._root_fd, known) if known is not None else None
        outcome = self._writer.write(frame.fd, path, node, self._read, first)
        is_new = outcome.written and not outcome.linked and not self._options.dry_run
        if is_new or outcome.unchanged:
            self._links[key] = path[self._base :]
        if outcome.linked:
            outcome.lost = self._zeroed.get(key, [])
        elif outcome.lost:
            self._zeroed[key] = outcome.lost
        self._settle(outcome)

    def _settle(self, outcome: EntryResult) -> None:
        """Count and tell what became of an entry."""
        path, node, error = outcome.path, outcome.node, outcome.error
        if node.state == CaptureState.CHANGED:
            self.result.flagged += 1
            self._monitor.problem(changed_file(path, node))
        if outcome.lost:
            ranges = ", ".join(f"{begin}-{end}" for begin, end in outcome.lost)
            message = f"it is damaged, zeros stand in the bytes {ranges}"
            self._damaged(path, message, None, outcome.lost)
        self._report_metadata_errors(path, outcome.metadata_errors)
        self.result.skipped += outcome.skipped
        if outcome.written:
            self._count(node)
        if outcome.reads_back is not None:
            if outcome.reads_back or self._options.salvage:
                self.result.verified += 1
            else:
                self._damaged(path, "what was written reads back differently")
        if isinstance(error, IntegrityError):
            self._damaged(path, f"it is damaged and was not restored: {error}", error)
        elif error is not None:
            if error.errno in _FULL:
                place = join(self._folder, path[self._base :])
                raise OSError(error.errno, os.strerror(error.errno or 0), place) from error
            self._fail(path, error)

    def _report_metadata_errors(self, path: bytes, unset: list[str]) -> None:
        for message in unset:
            self._monitor.problem(
                Problem(ProblemKind.METADATA, path, f"not all metadata could be set: {message}")
            )

    def _count(self, node: Node) -> None:
        if node.kind == NodeType.FILE:
            self.result.files += 1
            self.result.restored_bytes += node.size
            self._monitor.progress.done_bytes += node.size
        else:
            self.result.others += 1

    def _progress(self, path: bytes) -> None:
        self._monitor.progress.path = path
        self._monitor.progress.files += 1

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


def _link_key(node: Node) -> _LinkKey | None:
    key = hard_link_key(node)
    if key is None:
        return None
    return *key, node.kind, captured_digest(node) or node.content


def _is_small(node: Node) -> bool:
    """Tell whether an entry is written with at most one chunk, and that no large one."""
    if node.kind != NodeType.FILE:
        return True
    one = not node.levels and len(node.content) <= EXTENT.size
    return one and node.size <= _HANDED_OVER_BYTES
