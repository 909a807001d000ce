"""Trees and nodes: the stored form of a directory and of its entries (FORMAT.md, "Trees").

Parsing and encoding, without I/O. A tree blob is msgpack of arrays with a fixed order of fields. Digests are
those of the stored bytes, never of a re-encoding. Stored data may be hostile, so everything that is decoded
is checked: names, their order, sizes and summaries.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from enum import IntEnum
from typing import Any, TypeVar

import msgspec

from casfs.digest import DIGEST_BYTES, EMPTY_DIGEST, Digest
from casfs.errors import TreeError

R = TypeVar("R", bound=msgspec.Struct)

MAX_DEPTH = 4096
"""The deepest nesting that is walked; a deeper path cannot be named in one system call."""

MAX_PIECE_LEVELS = 8
MAX_NAME_BYTES = 4096
"""Most file systems allow 255 bytes, exFAT, NTFS and SMB 255 UTF-16 units (up to 765 bytes), FUSE more."""
MAX_COUNT = 1 << 48
MAX_FILE_BYTES = (1 << 63) - 1
_MAX_OWNER = (1 << 32) - 2
_MAX_LINKS = (1 << 32) - 1
_MAX_DEVICE = (1 << 64) - 1


class NodeType(IntEnum):
    """The type of an entry."""

    FILE = 1
    DIRECTORY = 2
    SYMLINK = 3
    FIFO = 4
    SOCKET = 5
    CHARACTER_DEVICE = 6
    BLOCK_DEVICE = 7


_FILE, _DIRECTORY, _SYMLINK = map(int, (NodeType.FILE, NodeType.DIRECTORY, NodeType.SYMLINK))
"""Plain integers, for checks of every node."""


class CaptureState(IntEnum):
    """How a regular file was captured (see docs/design.md, "How a file was captured")."""

    STABLE = 0
    APPENDED = 1
    CHANGED = 2


_CHANGED = int(CaptureState.CHANGED)


class ChangeReason(IntEnum):
    """The reason why a capture was not simply stable.

    DAMAGED marks a file that lost chunks and was repaired.
    """

    NONE = 0
    GREW = 1
    SHRANK = 2
    REWRITTEN = 3
    REPLACED = 4
    READ_ERROR = 5
    VANISHED = 6
    DAMAGED = 7


class TreeRef(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A tree by digest, with a summary of everything below it.

    `nodes` counts the entries below at any depth, `flagged` the `changed` files. `total_bytes` is
    the sum of the regular files' sizes, at most `MAX_FILE_BYTES`: a few sparse files may add up to more.
    `xattrs` counts the entries below that have extended attributes, ACLs included. It is None where it is
    unknown, as in trees of format 1, which lack the field.
    """

    digest: bytes
    nodes: int
    total_bytes: int
    flagged: int
    xattrs: int | None = None


class _UncountedTreeRef(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The stored form of a tree reference without a count of xattrs."""

    digest: bytes
    nodes: int
    total_bytes: int
    flagged: int


class Capture(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The evidence of a capture that was not stable at the first attempt.

    `observed` is the digest that the last verifying read found, if it differs from the captured digest.
    """

    reason: int
    attempts: int
    observed: bytes | None = None


class NodeExtra(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Rarely used fields: xattrs sorted by name, device number, file system of a hard link, capture."""

    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    rdev: int = 0
    device: int = 0
    capture: Capture | None = None


class Node(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """An entry of a directory.

    `mode` contains the permission bits with setuid, setgid and sticky. Times are nanoseconds since 1970 and
    may be negative. `size` is the number of bytes captured. `content` is a file's list of extents (see
    `casfs.trees.content`; `levels` is the number of lists above the extents) or a symlink's target.
    `captured` is the plain BLAKE3 of the whole file as stored. It is None where the file's only blob has the
    same unkeyed digest, or where the file is empty. `racy` means that the next backup must not trust the file
    as unchanged.
    """

    name: bytes
    kind: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    nlink: int
    size: int = 0
    state: int = 0
    racy: bool = False
    content: bytes = b""
    levels: int = 0
    captured: bytes | None = None
    tree: TreeRef | None = None
    extra: NodeExtra | None = None


class Leaf(msgspec.Struct, array_like=True, frozen=True, tag=0, gc=False):
    """A tree piece with entries, sorted by name."""

    nodes: list[Node]


class PieceRef(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A piece of a split directory: its first name and its summary."""

    first: bytes
    tree: TreeRef


class Branch(msgspec.Struct, array_like=True, frozen=True, tag=1, gc=False):
    """A tree piece with references to pieces, sorted by their first names."""

    pieces: list[PieceRef]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Leaf | Branch)
_less = operator.lt
_names = operator.attrgetter("name")


def encode_node(node: Node) -> bytes:
    """Return an entry's bytes as stored in a leaf."""
    return _encoder.encode(storable_node(node))


def encode_piece(piece: Leaf | Branch) -> bytes:
    """Return the bytes of a tree blob."""
    if isinstance(piece, Leaf):
        return _encoder.encode(Leaf([storable_node(node) for node in piece.nodes]))
    return _encoder.encode(Branch([_storable(part) for part in piece.pieces]))


def storable_node(node: Node) -> Node:
    """Return an entry that is encoded as its stored form; nothing else may be done with it.

    A tree reference without a count of xattrs has a field less, as in format 1.
    """
    return node if node.tree is None or node.tree.xattrs is not None else _storable(node)


def _storable(record: R) -> R:
    """Return a node or piece reference whose tree reference is encoded without an unknown count."""
    tree: TreeRef = record.tree  # type: ignore[attr-defined]
    if tree.xattrs is not None:
        return record
    stored = _UncountedTreeRef(tree.digest, tree.nodes, tree.total_bytes, tree.flagged)
    return msgspec.structs.replace(record, tree=stored)


def encode_leaf(encoded_nodes: list[bytes]) -> bytes:
    """Return the bytes of a leaf from encoded entries, equal to those of `encode_piece`."""
    head = _encoder.encode([None] * len(encoded_nodes))[: -len(encoded_nodes) or None]
    return b"\x92\x00" + head + b"".join(encoded_nodes)


def decode_piece(data: bytes) -> Leaf | Branch:
    """Parse and check a tree blob; raise TreeError for data that break the format's rules."""
    try:
        piece: Leaf | Branch = _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, OverflowError) as error:
        raise TreeError(f"a tree cannot be parsed: {error}") from error
    if isinstance(piece, Leaf):
        _check_leaf(piece.nodes)
    else:
        _check_branch(piece.pieces)
    return piece


def check_name(name: bytes) -> None:
    """Raise TreeError for a name that no reader accepts in a directory."""
    if not name or b"/" in name or b"\0" in name or name in (b".", b".."):
        raise TreeError(f"the name {name!r} is none that an entry can have")
    if len(name) > MAX_NAME_BYTES:
        raise TreeError(f"its name has {len(name)} bytes; at most {MAX_NAME_BYTES} can be stored")


def check_entry(node: Node) -> None:
    """Raise TreeError for an entry that no reader accepts in a directory.

    A writer asks before it adds an entry, because a reader refuses the whole piece that holds it.
    """
    check_name(node.name)
    if node.kind == _SYMLINK and not node.content:
        raise TreeError("it is a symbolic link with an empty target")
    check_node(node)


def _check_leaf(nodes: list[Node]) -> None:
    names = list(map(_names, nodes))
    _check_order(names)
    joined = b"/".join(names)
    if b"\0" in joined or joined.count(b"/") != max(len(names) - 1, 0):
        raise TreeError("a tree has a name with a slash or NUL")
    if names and (max(map(len, names)) > MAX_NAME_BYTES or not names[0]):
        raise TreeError("a tree has a name that is empty or too long")
    if b"." in names or b".." in names:
        raise TreeError("a tree has an entry named . or ..")
    for node in nodes:
        check_node(node)


def check_node(node: Node) -> None:
    """Raise TreeError for an entry whose fields are inconsistent or out of bounds."""
    kind = node.kind
    if kind == _FILE:
        is_valid = (
            node.tree is None
            and 0 <= node.size <= MAX_FILE_BYTES
            and 0 <= node.levels <= MAX_PIECE_LEVELS
            and len(node.content) % 40 == 0
            and (node.captured is None or len(node.captured) == DIGEST_BYTES)
            and 0 <= node.state <= 2
        )
    elif kind == _DIRECTORY:
        is_valid = node.tree is not None and _is_valid(node.tree)
    else:
        is_valid = node.tree is None and 3 <= kind <= 7
        if kind == _SYMLINK:
            is_valid = is_valid and len(node.content) > 0 and b"\0" not in node.content
    if not (
        is_valid
        and 0 <= node.mode <= 0o7777
        and 0 <= node.uid <= _MAX_OWNER
        and 0 <= node.gid <= _MAX_OWNER
        and node.inode >= 0
        and 0 <= node.nlink <= _MAX_LINKS
        and (node.extra is None or _is_valid_extra(node.extra))
    ):
        raise TreeError(f"the entry {node.name!r} of a tree breaks the format's rules")


def _is_valid_extra(extra: NodeExtra) -> bool:
    capture = extra.capture
    return (
        0 <= extra.rdev <= _MAX_DEVICE
        and 0 <= extra.device <= _MAX_DEVICE
        and all(name and b"\0" not in name for name, _ in extra.xattrs)
        and (
            capture is None
            or (
                capture.reason in ChangeReason.__members__.values()
                and capture.attempts >= 0
                and (capture.observed is None or len(capture.observed) == DIGEST_BYTES)
            )
        )
    )


def _check_branch(pieces: list[PieceRef]) -> None:
    if not pieces:
        raise TreeError("a split tree has no pieces")
    _check_order([piece.first for piece in pieces])
    if not all(_is_valid(piece.tree) for piece in pieces):
        raise TreeError("a split tree has a piece that breaks the format's rules")


def _check_order(names: list[bytes]) -> None:
    if not all(map(_less, names, names[1:])):
        raise TreeError("the names of a tree are not sorted or not unique")


def _is_valid(ref: TreeRef) -> bool:
    return (
        len(ref.digest) == DIGEST_BYTES
        and 0 <= ref.flagged <= ref.nodes < MAX_COUNT
        and 0 <= ref.total_bytes <= MAX_FILE_BYTES
        and (ref.xattrs is None or 0 <= ref.xattrs <= ref.nodes)
    )


def subtree_count(node: Node) -> int:
    """Return the number of nodes in an entry's subtree, including itself."""
    return 1 if node.tree is None else 1 + node.tree.nodes


def subtree_summary(nodes: list[Node]) -> tuple[int, int, int]:
    """Return the totals over entries: nodes, bytes of regular files, changed files."""
    count = len(nodes)
    size = flagged = 0
    for node in nodes:
        tree = node.tree
        if tree is not None:
            count += tree.nodes
            size += tree.total_bytes
            flagged += tree.flagged
        elif node.kind == _FILE:
            size += node.size
            if node.state == _CHANGED:
                flagged += 1
    return count, min(size, MAX_FILE_BYTES), flagged


def xattr_count(nodes: list[Node]) -> int | None:
    """Return the number of nodes with extended attributes among and below entries; None if unknown."""
    count = 0
    for node in nodes:
        if node.extra is not None and node.extra.xattrs:
            count += 1
        if node.tree is not None:
            if node.tree.xattrs is None:
                return None
            count += node.tree.xattrs
    return count


def sum_of_counts(counts: Iterable[int | None]) -> int | None:
    """Return the sum of counts, None where one of them is unknown."""
    total = 0
    for count in counts:
        if count is None:
            return None
        total += count
    return total


def captured_digest(node: Node) -> Digest | None:
    """Return the plain BLAKE3 of a regular file's captured bytes; None for other types."""
    if node.kind != NodeType.FILE:
        return None
    if node.captured is not None:
        return Digest(node.captured)
    return Digest(node.content[8:40]) if node.content else EMPTY_DIGEST


def capture_of(node: Node) -> Capture | None:
    """Return the evidence of a file's capture, or None where the capture was simply stable."""
    return node.extra.capture if node.extra is not None else None


def source_inode(node: Node) -> tuple[int, int] | None:
    """Return device and inode of an entry that may have other names, or None for an entry with one name."""
    if node.nlink > 1 and node.kind != _DIRECTORY and node.extra is not None:
        return node.extra.device, node.inode
    return None


HardLinkKey = tuple[int, int, int, int, bytes]


def hard_link_key(node: Node) -> HardLinkKey | None:
    """Return a key that all names of one stored file share, or None for an entry with one name.

    Besides device and inode these are the type, the device number and the content: a file that changed
    between the visits of two of its names is two files in the snapshot, and an inode may have served two
    files during one backup.
    """
    inode = source_inode(node)
    if inode is None:
        return None
    rdev = node.extra.rdev if node.extra is not None else 0
    return *inode, node.kind, rdev, captured_digest(node) or node.content


def replace(record: R, **changes: Any) -> R:
    """Return a copy of a record with some fields changed."""
    return msgspec.structs.replace(record, **changes)
