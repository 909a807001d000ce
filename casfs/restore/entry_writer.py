"""Write one entry of a snapshot into a directory of the target.

A file gets its name after every chunk and the whole file have verified; until then it has a temporary name in
the same directory. Entries share no state, and results are returned, so any thread may write any entry.
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
from casfs.format.node_types import TYPES_BY_MODE_BITS
from casfs.format.tree import Node, NodeType, captured_digest, hard_link_key
from casfs.repository.repository import Repository
from casfs.restore import target_fs
from casfs.restore.staging import FileIdentity, identify, link_inode, private_directory
from casfs.trees.file_content import FileContent, Ranges

_READ_BYTES = 1 << 20


def write_content(
    fd: int, repository: Repository, node: Node, read: Callable[[Digest], bytes], salvage: bool
) -> Ranges:
    """Write the content of a file to an empty open file, and return the lost ranges.

    `read` returns the verified plaintext of a chunk or raises BlobError. Raises BlobError or TreeError where
    a chunk or the whole file does not verify. With `salvage`, lost ranges become zeros and are returned, and
    only a content list that contradicts the node raises. Thread-safe.
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


def _ignore(_: int) -> None:
    """Do nothing with a number of bytes."""


def verify_content(fd: int, node: Node, on_bytes: Callable[[int], None] = _ignore) -> bool:
    """Return whether an open file, read from its position, has the captured digest of a node.

    `on_bytes` is called with the number of bytes of each piece that was read.
    """
    whole = blake3()
    while data := os.read(fd, _READ_BYTES):
        whole.update(data)
        on_bytes(len(data))
    return whole.digest() == captured_digest(node)


def _write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        offset += written
        view = view[written:]


log = logging.getLogger(__name__)


class Overwrite(StrEnum):
    """The treatment of entries that exist in the target."""

    ALWAYS = "always"
    IF_CHANGED = "if-changed"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class LinkTarget:
    """A restored name of the same file: a path below an open directory, and the file that it is."""

    fd: int
    path: bytes
    identity: FileIdentity


@dataclass(slots=True)
class EntryResult:
    """The result of one entry.

    `written`: the entry was written under its name. `unchanged`: the existing entry was already equal.
    `skipped`: the existing entry was kept. `linked`: the entry was written as a hard link. `lost` are ranges
    restored as zeros. `identity` is that of an entry with hard links. `metadata_errors` are the messages of
    `set_metadata`. `is_verified` is the result of reading the file back (None: not requested). `error` is the
    reason why the entry was not restored.
    """

    path: bytes
    node: Node
    written: bool = False
    unchanged: bool = False
    skipped: bool = False
    linked: bool = False
    identity: FileIdentity | None = None
    lost: Ranges = field(default_factory=list)
    metadata_errors: list[str] = field(default_factory=list)
    is_verified: bool | None = None
    error: IntegrityError | OSError | None = None
    link_error: OSError | None = None
    replaced_folder: bool = False


class EntryWriter:
    """Write entries of the snapshots of one repository. Thread-safe."""

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
        link_target: LinkTarget | None = None,
        on_reread: Callable[[int], None] = _ignore,
    ) -> EntryResult:
        """Write the entry at `path` of a snapshot into the open directory `fd`.

        `read` returns the verified plaintext of a chunk; `link_target` is a restored name of the same file.
        `on_reread` is called with the number of bytes of each piece that a verification reads back. In a dry
        run, `fd` is -1 for a directory that does not exist. Errors are in the result.
        """
        result = EntryResult(path, node)
        try:
            st = target_fs.entry_stat(fd, node.name) if fd >= 0 else None
            if st is not None and not self._may_replace(fd, result, st, link_target):
                return result
            if self._dry_run:
                result.written = True
                return result
            if link_target is None or not self._link(fd, result, st, link_target):
                if node.kind == NodeType.FILE:
                    self._write_file(fd, result, st, read, on_reread)
                else:
                    self._write_special(fd, result, st)
            result.written = True
        except (IntegrityError, OSError) as error:
            result.error = error
        return result

    def _may_replace(
        self, fd: int, result: EntryResult, st: os.stat_result, link_target: LinkTarget | None
    ) -> bool:
        node = result.node
        if self._overwrite == Overwrite.NEVER:
            result.skipped = True
            return False
        same = (
            self._overwrite == Overwrite.IF_CHANGED
            and _is_equal(fd, node, st)
            and _is_linked_alike(node, st, link_target)
        )
        if same and self._keep_existing(fd, result, st):
            return False
        if stat.S_ISDIR(st.st_mode):
            if self._replace_folders:
                result.replaced_folder = True
            else:
                target_fs.require_empty(fd, node.name)
        return True

    def _keep_existing(self, fd: int, result: EntryResult, st: os.stat_result) -> bool:
        """Set the metadata of an equal existing entry; return False where this user cannot open it.

        Raise OSError where the name does not refer to the file of `st` any more.
        """
        node = result.node
        if not self._dry_run and node.kind != NodeType.FILE:
            result.metadata_errors += target_fs.set_metadata(fd, node.name, node, None, st)
        elif not self._dry_run:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            try:
                opened = os.open(node.name, flags, dir_fd=fd)
            except PermissionError:
                return False
            try:
                target_fs.require_same(opened, st)
                result.metadata_errors += target_fs.set_metadata(fd, node.name, node, opened)
            finally:
                os.close(opened)
        result.skipped = result.unchanged = True
        result.identity = identify(st)
        return True

    def _link(
        self, fd: int, result: EntryResult, st: os.stat_result | None, link_target: LinkTarget
    ) -> bool:
        """Write the entry as a hard link to a restored name; return False where linking fails."""
        with private_directory(fd) as staging:
            name = target_fs.temporary_name()
            try:
                try:
                    link_inode(
                        link_target.fd, link_target.path, link_target.identity, staging, name
                    )
                except OSError as error:
                    result.link_error = error
                    return False
                _rename_into_place(staging, name, fd, result.node, st)
            except BaseException:
                target_fs.unlink_quietly(staging, name)
                raise
        result.linked = True
        return True

    def _write_file(
        self,
        fd: int,
        result: EntryResult,
        st: os.stat_result | None,
        read: Callable[[Digest], bytes],
        on_reread: Callable[[int], None],
    ) -> None:
        # The name is known before the file exists: an interrupt at any moment can remove the file.
        name = target_fs.temporary_name()
        try:
            opened = target_fs.create_file(fd, name)
            try:
                result.lost = write_content(
                    opened, self._repository, result.node, read, self._salvage
                )
                result.metadata_errors += target_fs.set_metadata(fd, name, result.node, opened)
                _rename_into_place(fd, name, fd, result.node, st)
                if result.node.nlink > 1:
                    result.identity = identify(os.fstat(opened))
                if self._verify:
                    # By its descriptor: the mode may not permit the owner to open the file.
                    os.lseek(opened, 0, os.SEEK_SET)
                    result.is_verified = verify_content(opened, result.node, on_reread)
            finally:
                os.close(opened)
        except BaseException:
            target_fs.unlink_quietly(fd, name)
            raise

    def _write_special(self, fd: int, result: EntryResult, st: os.stat_result | None) -> None:
        with private_directory(fd) as staging:
            name = target_fs.temporary_name()
            try:
                target_fs.make_special(staging, name, result.node)
                result.metadata_errors += target_fs.set_metadata(staging, name, result.node, None)
                made = os.stat(name, dir_fd=staging, follow_symlinks=False)
                _rename_into_place(staging, name, fd, result.node, st)
                result.identity = identify(made)
            except BaseException:
                target_fs.unlink_quietly(staging, name)
                raise


def _is_equal(fd: int, node: Node, st: os.stat_result) -> bool:
    """Return whether an entry of the target is equal to a node, as far as its metadata show."""
    if (
        TYPES_BY_MODE_BITS.get(stat.S_IFMT(st.st_mode)) != node.kind
        or st.st_mtime_ns != node.mtime_ns
    ):
        return False
    if node.kind == NodeType.FILE:
        return st.st_size == node.size
    if node.kind == NodeType.SYMLINK:
        return os.readlink(node.name, dir_fd=fd) == node.content
    return st.st_rdev == (node.extra.rdev if node.extra is not None else 0)


def _is_linked_alike(node: Node, st: os.stat_result, link_target: LinkTarget | None) -> bool:
    """Return whether an entry of the target is hard-linked as its node is, to the names restored so far."""
    if hard_link_key(node) is None:
        return st.st_nlink == 1
    return link_target is None or identify(st) == link_target.identity


def _rename_into_place(
    staging: int, name: bytes, fd: int, node: Node, st: os.stat_result | None
) -> None:
    if st is not None and stat.S_ISDIR(st.st_mode):
        target_fs.remove(fd, node.name, st)
    os.rename(name, node.name, src_dir_fd=staging, dst_dir_fd=fd)
    # rename() does nothing where both names refer to one inode: the temporary name must be removed.
    if st is not None and node.nlink > 1:
        target_fs.unlink_quietly(staging, name)
