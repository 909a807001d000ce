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
from casfs.restore import removal, target_fs, temporary_entries
from casfs.restore.metadata import require_same, set_entry_metadata, set_metadata
from casfs.restore.staging import FileIdentity, identify, link_inode, private_directory
from casfs.trees.content import ContentReader
from casfs.trees.file_content import FileContent, Ranges, read_only_chunk

_READ_BYTES = 1 << 20
_FILE = int(NodeType.FILE)


def _write_content(fd: int, content: FileContent, size: int) -> Ranges:
    """Write the content of a file of `size` bytes to an empty open file, and return the lost ranges.

    Raises what `FileContent.parts` raises. Thread-safe.
    """
    written = 0
    for part in content.parts():
        if part.data is not None:
            _write_at(fd, part.data, part.begin)
            written = part.begin + part.length
    if written < size:
        os.ftruncate(fd, size)
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
    written = os.pwrite(fd, data, offset)
    while written < len(data):
        written += os.pwrite(fd, memoryview(data)[written:], offset + written)


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

    @property
    def is_plain(self) -> bool:
        """Whether the entry was written and nothing else is to be said about it."""
        return self.written and not (
            self.metadata_errors
            or self.lost
            or self.replaced_folder
            or self.is_verified is not None
            or self.unchanged
            or self.skipped
            or self.linked
            or self.error is not None
        )


@dataclass(frozen=True, slots=True)
class WritingOptions:
    """How entries are written.

    With `salvage`, lost ranges of a file become zeros. `verify` reads written files back. `replace_folders`
    permits an entry to replace a directory that is not empty. `has_keyed_digests` is set where the digests of
    chunks are keyed, so that none is that of a whole file.
    """

    overwrite: Overwrite = Overwrite.ALWAYS
    salvage: bool = False
    verify: bool = False
    replace_folders: bool = False
    dry_run: bool = False
    has_keyed_digests: bool = True


class EntryWriter:
    """Write entries of snapshots. `extents` returns the reader of a file's content list. Thread-safe."""

    def __init__(self, options: WritingOptions, extents: Callable[[Node], ContentReader]) -> None:
        self._options = options
        self._extents = extents
        self._recomputes_whole = options.salvage or options.has_keyed_digests
        self._replaces_all = options.overwrite == Overwrite.ALWAYS and not options.dry_run

    def write(
        self,
        fd: int,
        path: bytes,
        node: Node,
        read: Callable[[Digest], bytes],
        link_target: LinkTarget | None = None,
        on_reread: Callable[[int], None] = _ignore,
        is_fresh: bool = False,
    ) -> EntryResult:
        """Write the entry at `path` of a snapshot into the open directory `fd`.

        `read` returns the verified plaintext of a chunk; `link_target` is a restored name of the same file.
        `on_reread` is called with the number of bytes of each piece that a verification reads back. In a dry
        run, `fd` is -1 for a directory that does not exist. `is_fresh` is the result of `target_fs.is_fresh`
        for the directory. Errors are in the result.
        """
        result = EntryResult(path, node)
        try:
            # A file that replaces whatever has its name need not look at it: rename() refuses a directory.
            if not (self._replaces_all and node.kind == _FILE and node.nlink <= 1):
                st = target_fs.entry_stat(fd, node.name) if fd >= 0 else None
                if st is not None and not self._may_replace(fd, result, st, link_target):
                    return result
            if self._options.dry_run:
                result.written = True
                return result
            if link_target is None or not self._link(fd, result, link_target):
                if node.kind == _FILE:
                    self._write_file(fd, result, read, on_reread, is_fresh)
                elif is_fresh:
                    self._write_special(fd, result, fd)
                else:
                    with private_directory(fd) as staging:
                        self._write_special(fd, result, staging)
            result.written = True
        except (IntegrityError, OSError) as error:
            result.error = error
        return result

    def _may_replace(
        self, fd: int, result: EntryResult, st: os.stat_result, link_target: LinkTarget | None
    ) -> bool:
        node = result.node
        if self._options.overwrite == Overwrite.NEVER:
            result.skipped = True
            return False
        same = (
            self._options.overwrite == Overwrite.IF_CHANGED
            and _is_equal(fd, node, st)
            and _is_linked_alike(node, st, link_target)
            and _has_trusted_owner(node, st)
        )
        if same and self._keep_existing(fd, result, st):
            return False
        if stat.S_ISDIR(st.st_mode):
            self._require_replaceable(fd, result)
        return True

    def _require_replaceable(self, fd: int, result: EntryResult) -> None:
        """Raise OSError where the directory in the place of an entry is to be kept."""
        if self._options.replace_folders:
            result.replaced_folder = True
        else:
            target_fs.require_empty(fd, result.node.name)

    def _keep_existing(self, fd: int, result: EntryResult, st: os.stat_result) -> bool:
        """Set the metadata of an equal existing entry; return False where this user cannot open it.

        Raise OSError where the name does not refer to the file of `st` any more.
        """
        node = result.node
        if not self._options.dry_run and node.kind != _FILE:
            result.metadata_errors += set_entry_metadata(fd, node.name, node, st)
        elif not self._options.dry_run:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            try:
                opened = os.open(node.name, flags, dir_fd=fd)
            except PermissionError:
                return False
            try:
                require_same(opened, st)
                result.metadata_errors += set_metadata(opened, node)
            finally:
                os.close(opened)
        result.skipped = result.unchanged = True
        result.identity = identify(st)
        return True

    def _link(self, fd: int, result: EntryResult, link_target: LinkTarget) -> bool:
        """Write the entry as a hard link to a restored name; return False where linking fails."""
        with private_directory(fd) as staging:
            name = temporary_entries.temporary_name()
            try:
                try:
                    link_inode(
                        link_target.fd, link_target.path, link_target.identity, staging, name
                    )
                except OSError as error:
                    result.link_error = error
                    return False
                self._rename_into_place(staging, name, fd, result)
            except BaseException:
                target_fs.unlink_quietly(staging, name)
                raise
        result.linked = True
        return True

    def _write_file(
        self,
        fd: int,
        result: EntryResult,
        read: Callable[[Digest], bytes],
        on_reread: Callable[[int], None],
        is_fresh: bool,
    ) -> None:
        node = result.node
        # The name is known before the file exists: an interrupt at any moment can remove the file.
        name = temporary_entries.temporary_name()
        try:
            # Only this user can look into a fresh directory, so the file may have its mode from the start,
            # unless it gets xattrs: its owner cannot set those of a write-protected file.
            has_mode = is_fresh and node.extra is None
            opened = target_fs.create_file(fd, name, node.mode & 0o777 if has_mode else 0o600)
            try:
                data = None if self._recomputes_whole else read_only_chunk(node, read)
                if data is not None:
                    _write_at(opened, data, 0)
                else:
                    content = FileContent(
                        node, self._extents(node), read, salvage=self._options.salvage
                    )
                    result.lost = _write_content(opened, content, node.size)
                errors = set_metadata(opened, node, inherits=not is_fresh)
                if errors:
                    result.metadata_errors += errors
                self._rename_into_place(fd, name, fd, result)
                if node.nlink > 1:
                    result.identity = identify(os.fstat(opened))
                if self._options.verify:
                    # By its descriptor: the mode may not permit the owner to open the file.
                    os.lseek(opened, 0, os.SEEK_SET)
                    result.is_verified = verify_content(opened, node, on_reread)
            finally:
                os.close(opened)
        except BaseException:
            target_fs.unlink_quietly(fd, name)
            raise

    def _write_special(self, fd: int, result: EntryResult, staging: int) -> None:
        name = temporary_entries.temporary_name()
        try:
            target_fs.make_special(staging, name, result.node)
            result.metadata_errors += set_entry_metadata(staging, name, result.node)
            made = os.stat(name, dir_fd=staging, follow_symlinks=False)
            self._rename_into_place(staging, name, fd, result)
            result.identity = identify(made)
        except BaseException:
            target_fs.unlink_quietly(staging, name)
            raise

    def _rename_into_place(self, staging: int, name: bytes, fd: int, result: EntryResult) -> None:
        node = result.node
        try:
            os.rename(name, node.name, src_dir_fd=staging, dst_dir_fd=fd)
        except IsADirectoryError:
            st = os.stat(node.name, dir_fd=fd, follow_symlinks=False)
            self._require_replaceable(fd, result)
            removal.remove(fd, node.name, st)
            os.rename(name, node.name, src_dir_fd=staging, dst_dir_fd=fd)
        # rename() does nothing where both names refer to one inode: the temporary name must be removed.
        if node.nlink > 1:
            target_fs.unlink_quietly(staging, name)


def _is_equal(fd: int, node: Node, st: os.stat_result) -> bool:
    """Return whether an entry of the target is equal to a node, as far as its metadata show."""
    if (
        TYPES_BY_MODE_BITS.get(stat.S_IFMT(st.st_mode)) != node.kind
        or st.st_mtime_ns != node.mtime_ns
    ):
        return False
    if node.kind == _FILE:
        return st.st_size == node.size
    if node.kind == NodeType.SYMLINK:
        return os.readlink(node.name, dir_fd=fd) == node.content
    return st.st_rdev == (node.extra.rdev if node.extra is not None else 0)


def _is_linked_alike(node: Node, st: os.stat_result, link_target: LinkTarget | None) -> bool:
    """Return whether an entry of the target is hard-linked as its node is, to the names restored so far."""
    if hard_link_key(node) is None:
        return st.st_nlink == 1
    return link_target is None or identify(st) == link_target.identity


def _has_trusted_owner(node: Node, st: os.stat_result) -> bool:
    """Return whether no user can have forged an entry that has the size and the time of a node.

    The owner of a file can set its times at will. So the file of another user must not get the owner, the
    set-group-id bit or the capabilities of the node: a program of one user would have the rights of another.
    A file with several names may be a file of root elsewhere, which must not get another owner.
    """
    if st.st_nlink > 1 and os.geteuid() == 0 and (st.st_uid, st.st_gid) != (node.uid, node.gid):
        return False
    if st.st_uid not in (0, os.geteuid(), node.uid):
        return False
    names = [name for name, _ in node.extra.xattrs] if node.extra is not None else []
    has_rights = node.mode & stat.S_ISGID or b"security.capability" in names
    return st.st_uid in (0, os.geteuid()) or not has_rights
