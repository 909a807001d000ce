"""Writing one entry of a snapshot into a directory of the target: what each thread of a restore does.

A file appears under its name only when every chunk and then the whole file have verified; until then it has
a temporary name beside it. Nothing here is shared between entries, and what happened is returned.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from blake3 import blake3

from casfs.digest import Digest
from casfs.errors import IntegrityError
from casfs.format.tree import Node, NodeType, captured_digest, hard_link_key
from casfs.repository.repository import Repository
from casfs.restore import target_fs
from casfs.trees.file_content import FileContent, Ranges

_READ_BYTES = 1 << 20


def write_content(
    fd: int, repository: Repository, node: Node, read: Callable[[Digest], bytes], salvage: bool
) -> Ranges:
    """Write the content of a file into an empty one and return the ranges that are lost.

    `read` returns a chunk's verified plaintext, or raises BlobError. Raises BlobError or TreeError unless
    everything verifies. With `salvage` lost chunks are left as zeros instead. Safe in several threads.
    """
    content = FileContent(node, repository.content(node), read, salvage)
    written = 0
    for part in content.parts():
        if part.data is not None:
            _write_at(fd, part.data, part.begin)
            written = part.begin + part.length
    if written < node.size:
        os.ftruncate(fd, node.size)
    return content.lost


def verify_content(fd: int, node: Node) -> bool:
    """Tell whether an open file has the content of a node."""
    whole = blake3()
    while data := os.read(fd, _READ_BYTES):
        whole.update(data)
    return whole.digest() == captured_digest(node)


def _write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        offset += written
        view = view[written:]


log = logging.getLogger(__name__)


class Overwrite(StrEnum):
    """What happens to an entry that the target has already."""

    ALWAYS = "always"
    IF_CHANGED = "if-changed"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class LinkTarget:
    """Another name of a file, restored before: a path below an open directory."""

    fd: int
    path: bytes


@dataclass(slots=True)
class EntryResult:
    """What became of one entry.

    `written`: it is under its name. `unchanged`: it was there already as it should be. `skipped`: another
    entry was left in its place. `lost` are ranges that are zeros, `metadata_errors` says what metadata could
    not be set, `reads_back` is whether its content verified (None: not asked). `error` is why there is
    nothing.
    """

    path: bytes
    node: Node
    written: bool = False
    unchanged: bool = False
    skipped: bool = False
    linked: bool = False
    lost: Ranges = field(default_factory=list)
    metadata_errors: list[str] = field(default_factory=list)
    reads_back: bool | None = None
    error: IntegrityError | OSError | None = None


class EntryWriter:
    """Write entries of one repository's snapshots; safe to share between threads."""

    def __init__(
        self,
        repository: Repository,
        overwrite: Overwrite,
        salvage: bool = False,
        verify: bool = False,
        replace_folders: bool = False,
        dry_run: bool = False,
    ) -> None:
        self._repository = repository
        self._salvage = salvage
        self._dry_run = dry_run
        self._overwrite = overwrite
        self._verify = verify
        self._replace_folders = replace_folders

    def write(
        self,
        fd: int,
        path: bytes,
        node: Node,
        read: Callable[[Digest], bytes],
        first: LinkTarget | None = None,
    ) -> EntryResult:
        """Write the entry at `path` of a snapshot into the open directory `fd`; raises nothing of its own.

        `read` returns a chunk's verified plaintext; `first` is a name of the same file. In a dry run `fd` may
        be -1 for a directory that is not there.
        """
        outcome = EntryResult(path, node)
        try:
            st = target_fs.entry_stat(fd, node.name) if fd >= 0 else None
            if st is not None and not self._may_replace(fd, outcome, st, first):
                return outcome
            if self._dry_run:
                outcome.written = True
                return outcome
            if first is None or not self._link(fd, outcome, st, first):
                if node.kind == NodeType.FILE:
                    self._write_file(fd, outcome, st, read)
                else:
                    self._write_special(fd, outcome, st)
            outcome.written = True
        except (IntegrityError, OSError) as error:
            outcome.error = error
        return outcome

    def _may_replace(
        self, fd: int, outcome: EntryResult, st: os.stat_result, first: LinkTarget | None
    ) -> bool:
        node = outcome.node
        if self._overwrite == Overwrite.NEVER:
            outcome.skipped = True
            return False
        same = (
            self._overwrite == Overwrite.IF_CHANGED
            and node.kind == NodeType.FILE
            and stat.S_ISREG(st.st_mode)
            and st.st_size == node.size
            and st.st_mtime_ns == node.mtime_ns
            and _is_linked_alike(node, st, first)
        )
        if same and self._leave_as_it_is(fd, outcome):
            return False
        if stat.S_ISDIR(st.st_mode) and not self._replace_folders:
            target_fs.require_empty(fd, node.name)
        return True

    def _leave_as_it_is(self, fd: int, outcome: EntryResult) -> bool:
        """Give a file that is the same its metadata; False where this user may not even open it."""
        node = outcome.node
        if not self._dry_run:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            try:
                opened = os.open(node.name, flags, dir_fd=fd)
            except PermissionError:
                return False
            try:
                outcome.metadata_errors += target_fs.set_metadata(fd, node.name, node, opened)
            finally:
                os.close(opened)
        outcome.skipped = outcome.unchanged = True
        return True

    def _link(
        self, fd: int, outcome: EntryResult, st: os.stat_result | None, first: LinkTarget
    ) -> bool:
        """Make a further name of a file that was restored before; False where that cannot be."""
        name = target_fs.temporary_name()
        try:
            try:
                os.link(
                    first.path,
                    name,
                    src_dir_fd=first.fd,
                    dst_dir_fd=fd,
                    follow_symlinks=False,
                )
            except OSError as error:
                log.info("%r cannot be linked, it is copied: %s", outcome.path, error)
                return False
            _put_in_place(fd, name, outcome.node, st)
        except BaseException:
            target_fs.unlink_quietly(fd, name)
            raise
        outcome.linked = True
        return True

    def _write_file(
        self,
        fd: int,
        outcome: EntryResult,
        st: os.stat_result | None,
        read: Callable[[Digest], bytes],
    ) -> None:
        # An interrupt may come at any moment; the name is known before anything has it.
        name = target_fs.temporary_name()
        try:
            opened = target_fs.create_file(fd, name)
            try:
                outcome.lost = write_content(
                    opened, self._repository, outcome.node, read, self._salvage
                )
                outcome.metadata_errors += target_fs.set_metadata(fd, name, outcome.node, opened)
                _put_in_place(fd, name, outcome.node, st)
                if self._verify:
                    # By its descriptor: its mode may keep out even its owner.
                    os.lseek(opened, 0, os.SEEK_SET)
                    outcome.reads_back = verify_content(opened, outcome.node)
            finally:
                os.close(opened)
        except BaseException:
            target_fs.unlink_quietly(fd, name)
            raise

    def _write_special(self, fd: int, outcome: EntryResult, st: os.stat_result | None) -> None:
        name = target_fs.temporary_name()
        try:
            target_fs.make_special(fd, name, outcome.node)
            outcome.metadata_errors += target_fs.set_metadata(fd, name, outcome.node, None)
            _put_in_place(fd, name, outcome.node, st)
        except BaseException:
            target_fs.unlink_quietly(fd, name)
            raise


def _is_linked_alike(node: Node, st: os.stat_result, first: LinkTarget | None) -> bool:
    """Tell whether an entry of the target has the other names that its node has, as far as met."""
    if hard_link_key(node) is None:
        return st.st_nlink == 1
    return first is None or os.path.samestat(
        st, os.stat(first.path, dir_fd=first.fd, follow_symlinks=False)
    )


def _put_in_place(fd: int, name: bytes, node: Node, st: os.stat_result | None) -> None:
    if st is not None and stat.S_ISDIR(st.st_mode):
        target_fs.remove(fd, node.name, st)
    os.rename(name, node.name, src_dir_fd=fd, dst_dir_fd=fd)
    # Two names of one inode are not renamed onto each other: then the temporary one is left.
    if st is not None and node.nlink > 1:
        target_fs.unlink_quietly(fd, name)
