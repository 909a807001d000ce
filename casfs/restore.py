"""Restore: a tree of a snapshot, written below a target folder without a mount.

A file appears under its name only when every chunk and then the whole file have verified. What is
damaged is reported and the rest is restored. Nothing is written outside the target: every directory is
reached by its descriptor, and a symlink in the way is replaced and never followed.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from casfs import target
from casfs.digest import Digest
from casfs.errors import IntegrityError
from casfs.filling import Filler, reads_back
from casfs.intake.exclude import PatternMatcher
from casfs.monitor import Monitor, Problem, ProblemKind
from casfs.readahead import ReadAhead
from casfs.repository import Repository
from casfs.telling import problem_of_damage, problem_of_flag, problem_of_restoring
from casfs.tree import Kind, Node, State, captured_digest, hard_link_key
from casfs.treereader import TreeReader, join

log = logging.getLogger(__name__)

_LinkKey = tuple[int, int, int, bytes]
"""Device, inode, kind and content: an inode's number may have served two files in one backup."""


class Overwrite(StrEnum):
    """What happens to an entry that the target has already."""

    ALWAYS = "always"
    IF_CHANGED = "if-changed"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """What to restore and how; patterns in gitignore syntax against the path in the snapshot."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
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

    def __init__(self, repository: Repository, options: RestoreOptions, monitor: Monitor) -> None:
        self.result = RestoreResult()
        self._repository = repository
        self._options = options
        self._monitor = monitor
        self._include = PatternMatcher(options.include) if options.include else None
        self._exclude = PatternMatcher(options.exclude) if options.exclude else None
        self._ahead: ReadAhead | None = None
        self._trees = TreeReader(self._read)
        self._filler = Filler(repository, options.salvage, self._read)
        self._links: dict[_LinkKey, bytes] = {}
        self._zeroed: dict[_LinkKey, list[tuple[int, int]]] = {}
        self._root_fd, self._folder = -1, b""
        self._stack: list[_Frame] = []
        self._base = 0

    def restore(self, path: bytes, node: Node, folder: bytes, with_root: bool) -> RestoreResult:
        """Restore the node at `path` of a snapshot: a directory's entries go straight into `folder`.

        `with_root` gives `folder` the directory's own metadata too.
        """
        root, mode = None, None
        self._folder = folder
        if self._options.dry_run:
            self._root_fd = target.look_into(None, folder)
        else:
            self._root_fd, mode = target.open_root(folder)
        try:
            if node.tree is None:
                above = Node(b"", Kind.DIRECTORY, 0o700, 0, 0, 0, 0, 0, 1)
                root = _Frame(above, path.rpartition(b"/")[0], self._root_fd, self._include is None)
                root.nodes = iter([node])
                root.complete = with_root = False
            else:
                root = self._frame(path, node, self._root_fd, self._include is None)
            root.mode = mode
            self._base = len(root.path) + 1 if root.path else 0
            if self._takes_everything():
                self._ahead = ReadAhead(self._repository, path, node)
            self._run(root, with_root)
        finally:
            if self._ahead is not None:
                self._ahead.close()
            for frame in self._stack[1:]:
                if frame.fd >= 0:
                    target.close_writable(frame.fd, frame.mode)
            if self._root_fd >= 0:
                target.close_writable(self._root_fd, root.mode if root is not None else mode)
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
            self._leave(frame, frame.created or (with_root if is_root else frame.wanted))
            self._stack.pop()
            if not is_root and frame.fd >= 0:
                target.close_writable(frame.fd, frame.mode)

    def _advance(self, frame: _Frame) -> _Frame | None:
        for node in frame.nodes:
            path = join(frame.path, node.name)
            if self._ahead is not None:
                self._ahead.path = path
            if self._options.delete:
                frame.kept.add(node.name)
            is_directory = node.tree is not None
            if self._exclude is not None and self._exclude.matches(path, is_directory):
                continue
            included = (
                self._include is None or frame.wanted or self._include.matches(path, is_directory)
            )
            if is_directory:
                child = self._frame(path, node, -1, included)
                if included and not self._enter(child):
                    continue
                if not included and self._options.dry_run and frame.fd >= 0:
                    child.fd = target.look_into(frame.fd, node.name)
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
            self._damaged(frame.path, f"the directory cannot be read whole: {error}")

    def _enter(self, child: _Frame) -> bool:
        """Make a directory, with those above it that nobody needed yet; False where it is in the way."""
        self.result.directories += 1
        self._progress(child.path)
        try:
            if self._options.dry_run:
                return self._look(child)
            return self._open(len(self._stack), child)
        except OSError as error:
            self._fail(child.path, error)
            return False

    def _look(self, child: _Frame) -> bool:
        """Open what is there already of a directory; False where something else would be left."""
        above = self._stack[-1]
        name = child.node.name
        st = target.entry_stat(above.fd, name) if above.fd >= 0 else None
        if st is not None and stat.S_ISDIR(st.st_mode):
            child.fd = target.look_into(above.fd, name)
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
        st = target.entry_stat(above.fd, name)
        if st is not None and not stat.S_ISDIR(st.st_mode):
            if self._options.overwrite == Overwrite.NEVER:
                self.result.skipped += 1
                return False
            target.remove(above.fd, name, st)
            st = None
        if st is None:
            child.fd = target.make_directory(above.fd, name)
            child.created = True
        else:
            child.fd, child.mode = target.open_writable(above.fd, name, st)
        return True

    def _leave(self, frame: _Frame, with_metadata: bool) -> None:
        if frame.fd < 0:
            return
        if self._options.delete and frame.wanted and frame.complete:
            self._delete_others(frame)
        if with_metadata and not self._options.dry_run:
            self._set_metadata(frame.fd, b".", frame.node, frame.path, frame.fd)
            frame.mode = None

    def _delete_others(self, frame: _Frame) -> None:
        for text in os.listdir(frame.fd):
            name = os.fsencode(text)
            path = join(frame.path, name)
            if name in frame.kept:
                continue
            try:
                st = target.entry_stat(frame.fd, name)
                if st is None:
                    continue
                is_directory = stat.S_ISDIR(st.st_mode)
                if self._exclude is not None and self._exclude.matches(path, is_directory):
                    continue
                if not self._options.dry_run:
                    target.remove(frame.fd, name, st)
                self.result.deleted += 1
            except OSError as error:
                self._fail(path, error)

    def _restore_entry(self, frame: _Frame, path: bytes, node: Node) -> None:
        self._progress(path)
        if node.state == State.CHANGED:
            self.result.flagged += 1
            self._monitor.problem(problem_of_flag(path, node))
        dry_run = self._options.dry_run
        try:
            if frame.fd < 0 and not dry_run and not self._open(len(self._stack) - 1, frame):
                return
            st = target.entry_stat(frame.fd, node.name) if frame.fd >= 0 else None
            if st is not None and not self._may_replace(frame, path, node, st):
                return
            if dry_run:
                self._count(node)
                return
            if self._link(frame, path, node, st):
                return
            if node.kind == Kind.FILE:
                self._restore_file(frame, path, node, st)
            else:
                self._restore_special(frame, path, node, st)
        except IntegrityError as error:
            self._damaged(path, f"it is damaged and was not restored: {error}", error)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                place = join(self._folder, path[self._base :])
                raise OSError(error.errno, os.strerror(error.errno), place) from error
            self._fail(path, error)

    def _may_replace(self, frame: _Frame, path: bytes, node: Node, st: os.stat_result) -> bool:
        overwrite = self._options.overwrite
        if overwrite == Overwrite.NEVER:
            self.result.skipped += 1
            return False
        same = (
            overwrite == Overwrite.IF_CHANGED
            and node.kind == Kind.FILE
            and stat.S_ISREG(st.st_mode)
            and st.st_size == node.size
            and st.st_mtime_ns == node.mtime_ns
            and self._is_linked_alike(node, st)
        )
        if same and self._leave_as_it_is(frame, path, node):
            return False
        if stat.S_ISDIR(st.st_mode) and not self._options.delete:
            target.refuse_entries(frame.fd, node.name)
        return True

    def _leave_as_it_is(self, frame: _Frame, path: bytes, node: Node) -> bool:
        """Give a file that is the same its metadata; False where this user may not even open it."""
        if not self._options.dry_run:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            try:
                fd = os.open(node.name, flags, dir_fd=frame.fd)
            except PermissionError:
                return False
            try:
                self._set_metadata(frame.fd, node.name, node, path, fd)
            finally:
                os.close(fd)
        self.result.skipped += 1
        self._remember(path, node)
        return True

    def _is_linked_alike(self, node: Node, st: os.stat_result) -> bool:
        """Tell whether an entry of the target has the other names that its node has, as far as met."""
        key = _link_key(node)
        if key is None:
            return st.st_nlink == 1
        first = self._links.get(key)
        return first is None or os.path.samestat(
            st, os.stat(first, dir_fd=self._root_fd, follow_symlinks=False)
        )

    def _link(self, frame: _Frame, path: bytes, node: Node, st: os.stat_result | None) -> bool:
        """Make a further name of a file that was restored before; False where this is the first."""
        key = _link_key(node)
        first = self._links.get(key) if key is not None else None
        if key is None or first is None:
            return False
        name = target.temporary_name()
        try:
            try:
                os.link(
                    *(first, name),
                    src_dir_fd=self._root_fd,
                    dst_dir_fd=frame.fd,
                    follow_symlinks=False,
                )
            except OSError as error:
                log.info("%r cannot be linked, it is copied: %s", path, error)
                return False
            self._put_in_place(frame, name, node, st)
        except BaseException:
            target.unlink_quietly(frame.fd, name)
            raise
        self._count(node)
        if key in self._zeroed:
            self._tell_zeroed(path, self._zeroed[key])
        return True

    def _restore_file(
        self, frame: _Frame, path: bytes, node: Node, st: os.stat_result | None
    ) -> None:
        # An interrupt may come at any moment; the name is known before anything has it.
        name = target.temporary_name()
        try:
            fd = target.create_file(frame.fd, name)
            try:
                self._fill(fd, path, node)
                self._set_metadata(frame.fd, name, node, path, fd)
                self._put_in_place(frame, name, node, st)
                if self._options.verify:
                    self._verify(fd, path, node)
            finally:
                os.close(fd)
        except BaseException:
            target.unlink_quietly(frame.fd, name)
            raise
        self._remember(path, node)
        self._count(node)

    def _fill(self, fd: int, path: bytes, node: Node) -> None:
        lost = self._filler.fill(fd, node)
        if lost:
            key = _link_key(node)
            if key is not None:
                self._zeroed[key] = lost
            self._tell_zeroed(path, lost)

    def _restore_special(
        self, frame: _Frame, path: bytes, node: Node, st: os.stat_result | None
    ) -> None:
        name = target.temporary_name()
        try:
            target.make_special(frame.fd, name, node)
            self._set_metadata(frame.fd, name, node, path, None)
            self._put_in_place(frame, name, node, st)
        except BaseException:
            target.unlink_quietly(frame.fd, name)
            raise
        self._remember(path, node)
        self._count(node)

    def _put_in_place(
        self, frame: _Frame, name: bytes, node: Node, st: os.stat_result | None
    ) -> None:
        if st is not None and stat.S_ISDIR(st.st_mode):
            target.remove(frame.fd, node.name, st)
        os.rename(name, node.name, src_dir_fd=frame.fd, dst_dir_fd=frame.fd)
        # Two names of one inode are not renamed onto each other: then the temporary one is left.
        if st is not None and node.nlink > 1:
            target.unlink_quietly(frame.fd, name)

    def _remember(self, path: bytes, node: Node) -> None:
        key = _link_key(node)
        if key is not None:
            self._links[key] = path[self._base :]

    def _verify(self, fd: int, path: bytes, node: Node) -> None:
        """Read back what was written; by its descriptor, since its mode may keep out even its owner."""
        os.lseek(fd, 0, os.SEEK_SET)
        if not reads_back(fd, node) and not self._options.salvage:
            self._damaged(path, "what was written reads back differently")
        else:
            self.result.verified += 1

    def _set_metadata(
        self, fd: int, name: bytes, node: Node, path: bytes, open_fd: int | None
    ) -> None:
        for message in target.set_metadata(fd, name, node, open_fd):
            self._monitor.problem(
                Problem(ProblemKind.METADATA, path, f"not all metadata could be set: {message}")
            )

    def _count(self, node: Node) -> None:
        if node.kind == Kind.FILE:
            self.result.files += 1
            self.result.restored_bytes += node.size
            self._monitor.progress.done_bytes += node.size
        else:
            self.result.others += 1

    def _progress(self, path: bytes) -> None:
        self._monitor.progress.path = path
        self._monitor.progress.files += 1

    def _tell_zeroed(self, path: bytes, lost: list[tuple[int, int]]) -> None:
        ranges = ", ".join(f"{begin}-{end}" for begin, end in lost)
        self._damaged(path, f"it is damaged, zeros stand in the bytes {ranges}", None, lost)

    def _damaged(
        self,
        path: bytes,
        message: str,
        error: IntegrityError | None = None,
        ranges: list[tuple[int, int]] | None = None,
    ) -> None:
        self.result.damaged += 1
        self._monitor.problem(problem_of_damage(path, message, error, ranges or ()))

    def _fail(self, path: bytes, error: OSError) -> None:
        self.result.failed += 1
        self._monitor.problem(problem_of_restoring(path, error))


def _link_key(node: Node) -> _LinkKey | None:
    key = hard_link_key(node)
    if key is None:
        return None
    return *key, node.kind, captured_digest(node) or node.content
