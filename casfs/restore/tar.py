"""Stream verified data: the content of a file, or a directory as a tar.

The tar has the POSIX pax format: values that a plain header cannot represent, such as nanoseconds, long
names, large numbers and xattrs, are in an extended header before it. Long names that are not UTF-8 are in
GNU's long-name entries instead. This module builds the records as bytes, because xattrs need not be text.
Memory is bounded: the prefetched blobs, and a limited number of hard links. The stream ends at the first
damage, because a reader would take the rest for intact.
"""

from __future__ import annotations

import functools
import os
import struct
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from casfs.digest import Digest
from casfs.display import escape_path
from casfs.errors import IntegrityError
from casfs.format.snapshot import Snapshot
from casfs.format.tree import HardLinkKey, Node, NodeType, hard_link_key
from casfs.monitor import Monitor, Problem, ProblemKind
from casfs.repository.prefetch import Prefetcher
from casfs.repository.repository import Repository
from casfs.trees.content import ContentReader
from casfs.trees.file_content import FileContent
from casfs.trees.reader import TreeReader, is_flagged

_ZEROS = bytes(1 << 20)
MAX_LINKS = 100_000
"""Hard-linked files remembered at a time; a file beyond the limit is written again in full."""

_MAX_OCTAL_7 = 8**7 - 1
_MAX_OCTAL_11 = 8**11 - 1
_TYPES = {
    NodeType.FILE: tarfile.REGTYPE,
    NodeType.DIRECTORY: tarfile.DIRTYPE,
    NodeType.SYMLINK: tarfile.SYMTYPE,
    NodeType.FIFO: tarfile.FIFOTYPE,
    NodeType.CHARACTER_DEVICE: tarfile.CHRTYPE,
    NodeType.BLOCK_DEVICE: tarfile.BLKTYPE,
}

_ACL_KEYWORDS = {
    b"system.posix_acl_access": b"SCHILY.acl.access",
    b"system.posix_acl_default": b"SCHILY.acl.default",
}
_ACL_VERSION = struct.Struct("<I")
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_TAGS = {
    0x01: ("user", False),
    0x02: ("user", True),
    0x04: ("group", False),
    0x08: ("group", True),
    0x10: ("mask", False),
    0x20: ("other", False),
}


class DamagedContentError(IntegrityError):
    """The content of a file is damaged; `offset` (in bytes) is where its intact beginning ends."""

    def __init__(self, path: bytes, offset: int, cause: IntegrityError) -> None:
        super().__init__(path, offset, cause)
        self.path = path
        self.offset = offset
        self.cause = cause

    def __str__(self) -> str:
        return f"{escape_path(self.path)} is damaged from byte {self.offset} on: {self.cause}"


Read = Callable[[Digest], bytes]
"""Returns the verified plaintext of a blob."""


def file_bytes(node: Node, path: bytes, read: Read) -> Iterator[bytes]:
    """Yield the content of a regular file in verified chunks, and holes as zeros.

    Raises DamagedContentError at a damaged chunk, and at the end where the digest of the whole file
    differs from the captured one.
    """
    content = FileContent(node, ContentReader(node.content, node.levels, read), read)
    done = 0
    try:
        for part in content.parts():
            if part.data is not None:
                yield part.data
            else:
                for begin in range(0, part.length, len(_ZEROS)):
                    yield _ZEROS[: part.length - begin]
            done = part.begin + part.length
    except IntegrityError as error:
        raise DamagedContentError(path, done, error) from error


@dataclass(slots=True)
class TarStats:
    """Counts of the entries of a tar; `content_bytes` is the size of the files in it."""

    files: int = 0
    directories: int = 0
    others: int = 0
    links: int = 0
    left_out: int = 0
    flagged: int = 0
    content_bytes: int = 0


@dataclass(slots=True)
class _Link:
    """A written file with hard links that were not visited yet."""

    path: bytes
    names_left: int


class TarWriter:
    """Write the entries below directories of one snapshot to `write`, as one tar.

    Use each instance for one tar. Sockets, which a tar cannot represent, are skipped; files in state
    `changed` are written as captured. The monitor gets a problem for each of both.
    """

    def __init__(
        self,
        repository: Repository,
        snapshot: Snapshot,
        write: Callable[[bytes], object],
        monitor: Monitor,
        *,
        max_links: int = MAX_LINKS,
    ) -> None:
        self._max_links = max_links
        self.stats = TarStats()
        self._repository = repository
        self._users = dict(snapshot.users)
        self._groups = dict(snapshot.groups)
        self._write = write
        self._monitor = monitor
        self._written_bytes = 0
        self._links: dict[HardLinkKey, _Link] = {}

    def add_below(self, root: Node, path: bytes) -> None:
        """Write all entries below the directory at `path` of the snapshot, with names relative to it.

        The directory's own metadata are not in the tar, so that extracting it does not change the folder
        it is extracted into. Raises DamagedContentError, BlobError and TreeError.
        """
        with Prefetcher(self._repository, path, root) as ahead:
            for name, node in TreeReader(ahead.read).walk(root):
                ahead.path = path + b"/" + name if path else name
                self._add(name, ahead.path, node, ahead.read)

    def finish(self) -> TarStats:
        """Write the end of the tar."""
        self._put(bytes(2 * tarfile.BLOCKSIZE))
        self._put(bytes(-self._written_bytes % tarfile.RECORDSIZE))
        return self.stats

    def _add(self, name: bytes, path: bytes, node: Node, read: Read) -> None:
        progress = self._monitor.progress
        progress.path = path
        progress.items += 1
        if node.kind == NodeType.SOCKET:
            self._skip(path, "a tar cannot contain a socket; it is left out")
            return
        if is_flagged(node):
            self.stats.flagged += 1
            message = "it changed while it was captured; written as captured"
            self._monitor.problem(Problem(ProblemKind.CHANGED, path, message))
        first = self._first_name(node)
        if first is not None:
            self._put(self._header(name, node, tarfile.LNKTYPE, first))
            self.stats.links += 1
            self._count(node)
            return
        if (
            node.kind in (NodeType.CHARACTER_DEVICE, NodeType.BLOCK_DEVICE)
            and _device(node) is None
        ):
            self._skip(path, "its device number does not fit into a tar; it is left out")
            return
        if node.kind == NodeType.DIRECTORY:
            name += b"/"
        target = node.content if node.kind == NodeType.SYMLINK else b""
        self._put(self._header(name, node, _TYPES[NodeType(node.kind)], target))
        if node.kind == NodeType.FILE:
            for data in file_bytes(node, path, read):
                self._put(data)
                progress.read_bytes(len(data))
            progress.finish_file(node.size)
            self._put(bytes(-node.size % tarfile.BLOCKSIZE))
            self.stats.content_bytes += node.size
        self._remember(name, node)
        self._count(node)

    def _skip(self, path: bytes, message: str) -> None:
        self.stats.left_out += 1
        self._monitor.problem(Problem(ProblemKind.LEFT_OUT, path, message))

    def _count(self, node: Node) -> None:
        if node.kind == NodeType.FILE:
            self.stats.files += 1
        elif node.kind == NodeType.DIRECTORY:
            self.stats.directories += 1
        else:
            self.stats.others += 1

    def _first_name(self, node: Node) -> bytes | None:
        """Return the name under which the same file was already written, or None."""
        key = hard_link_key(node)
        link = self._links.get(key) if key is not None else None
        if key is None or link is None:
            return None
        link.names_left -= 1
        if not link.names_left:
            del self._links[key]
        return link.path

    def _remember(self, name: bytes, node: Node) -> None:
        key = hard_link_key(node)
        if key is not None and key not in self._links:
            if len(self._links) >= self._max_links:
                self._links.pop(next(iter(self._links)))
            self._links[key] = _Link(name, node.nlink - 1)

    def _put(self, data: bytes) -> None:
        self._write(data)
        self._written_bytes += len(data)

    def _header(self, name: bytes, node: Node, kind: bytes, target: bytes) -> bytes:
        """Return the header of an entry, preceded by an extended header where it needs one."""
        info = tarfile.TarInfo()
        info.type = kind
        info.mode = node.mode
        records: dict[bytes, bytes] = {}
        info.name, long_name = _name(records, b"path", name, b"L")
        info.linkname, long_link = _name(records, b"linkpath", target, b"K")
        user, group = self._users.get(node.uid, ""), self._groups.get(node.gid, "")
        info.uname = _text(records, b"uname", user.encode("utf-8", "surrogateescape"), 31)
        info.gname = _text(records, b"gname", group.encode("utf-8", "surrogateescape"), 31)
        info.uid = _number(records, b"uid", node.uid, _MAX_OCTAL_7)
        info.gid = _number(records, b"gid", node.gid, _MAX_OCTAL_7)
        size = node.size if kind == tarfile.REGTYPE else 0
        info.size = _number(records, b"size", size, _MAX_OCTAL_11)
        seconds, rest_ns = divmod(node.mtime_ns, 1_000_000_000)
        info.mtime = min(max(seconds, 0), _MAX_OCTAL_11)
        if rest_ns or info.mtime != seconds:
            records[b"mtime"] = _decimal_seconds(node.mtime_ns)
        if kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
            device = _device(node)
            assert device is not None
            info.devmajor, info.devminor = device
        if node.extra is not None and kind != tarfile.LNKTYPE:
            for attribute, value in node.extra.xattrs:
                # As GNU tar does: an equals sign would end the keyword.
                keyword = attribute.replace(b"%", b"%25").replace(b"=", b"%3D")
                records[b"SCHILY.xattr." + keyword] = value
                if attribute in _ACL_KEYWORDS and (text := _acl_text(value)):
                    records[_ACL_KEYWORDS[attribute]] = text
        header = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
        return long_name + long_link + _extended_header(records) + header


def _text(records: dict[bytes, bytes], keyword: bytes, value: bytes, limit: int) -> str:
    """Return the text for the plain header, and add a record where that cannot represent the value."""
    if value.isascii() and len(value) <= limit:
        return value.decode("ascii")
    if not _is_utf8(value):
        return value[:limit].decode("utf-8", "surrogateescape")
    records[keyword] = value
    return value[:limit].decode("ascii", "replace").replace("\ufffd", "?")


def _name(
    records: dict[bytes, bytes], keyword: bytes, value: bytes, kind: bytes
) -> tuple[str, bytes]:
    """Return a name for the plain header, and the blocks of GNU's long name where it needs them.

    The text of an extended header is UTF-8, and GNU tar warns of the record that permits other bytes. The
    plain header and GNU's long names (kind `L`, for links `K`) hold any bytes.
    """
    if _is_utf8(value) or len(value) <= tarfile.LENGTH_NAME:
        return _text(records, keyword, value, tarfile.LENGTH_NAME), b""
    info = tarfile.TarInfo("././@LongLink")
    info.type = kind
    info.size = len(value) + 1
    blocks = (
        info.tobuf(tarfile.GNU_FORMAT)
        + value
        + b"\0"
        + bytes(-(len(value) + 1) % tarfile.BLOCKSIZE)
    )
    return value[: tarfile.LENGTH_NAME].decode("ascii", "replace").replace("\ufffd", "?"), blocks


def _number(records: dict[bytes, bytes], keyword: bytes, value: int, limit: int) -> int:
    if value <= limit:
        return value
    records[keyword] = b"%d" % value
    return 0


def _decimal_seconds(time_ns: int) -> bytes:
    seconds, rest_ns = divmod(abs(time_ns), 1_000_000_000)
    return b"%s%d.%09d" % (b"-" if time_ns < 0 else b"", seconds, rest_ns)


def _acl_text(value: bytes) -> bytes | None:
    """Return a POSIX ACL as text with numeric ids, or None for a value not in the kernel's format.

    `tar --acls` reads the ACL from this text and ignores the xattr.
    """
    if len(value) % _ACL_ENTRY.size != _ACL_VERSION.size or value[:4] != _ACL_VERSION.pack(2):
        return None
    entries = []
    for tag, permissions, number in _ACL_ENTRY.iter_unpack(value[_ACL_VERSION.size :]):
        if tag not in _ACL_TAGS or permissions > 7:
            return None
        word, has_id = _ACL_TAGS[tag]
        bits = "".join(
            letter if permissions & bit else "-" for letter, bit in (("r", 4), ("w", 2), ("x", 1))
        )
        entries.append(f"{word}:{number if has_id else ''}:{bits}")
    return ",".join(entries).encode()


def _device(node: Node) -> tuple[int, int] | None:
    """Return major and minor number of a device, or None where a tar cannot represent them."""
    rdev = node.extra.rdev if node.extra is not None else 0
    try:
        device = os.major(rdev), os.minor(rdev)
    except (OverflowError, ValueError):
        return None
    return device if max(device) <= _MAX_OCTAL_7 else None


def _extended_header(records: dict[bytes, bytes]) -> bytes:
    if not records:
        return b""
    data = b"".join(_record(keyword, value) for keyword, value in records.items())
    return _extended_block(len(data)) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


@functools.lru_cache(maxsize=1024)
def _extended_block(size: int) -> bytes:
    """Return the header block of an extended header of `size` bytes. Few sizes are common: cached."""
    info = tarfile.TarInfo("PaxHeaders/entry")
    info.type = tarfile.XHDTYPE
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def _record(keyword: bytes, value: bytes) -> bytes:
    """Return a pax record, which begins with its own length in decimal."""
    rest = b" %s=%s\n" % (keyword, value)
    length = len(rest)
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return b"%d%s" % (length, rest)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
