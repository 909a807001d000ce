"""An entry of a snapshot in listings: as one line of text, or as the fields of a JSON object.

In a line the name comes last, after everything that casfs itself prints, so that no name can imitate
casfs's own columns.
"""

from __future__ import annotations

import os
import stat

from casfs.cli.output import JsonValue, format_time, json_path
from casfs.display import escape_path, format_size
from casfs.format.node_types import NODE_TYPES
from casfs.format.snapshot import Snapshot
from casfs.format.tree import (
    CaptureState,
    ChangeReason,
    Node,
    NodeType,
    captured_digest,
    subtree_count,
)

_STATES = {
    CaptureState.STABLE: "stable",
    CaptureState.APPENDED: "appended",
    CaptureState.CHANGED: "changed",
}
_MAX_OWNER_WIDTH = 16
_HUMAN_SIZE_WIDTH = len("1023.9 MiB")


class NodeLines:
    """Format the entries below one directory like `ls -l`; columns align without reading ahead.

    The size of a directory is that of all files below it. A column marks the files that another process
    wrote to during the capture: `changed` or `appended`.
    With `human_sizes` sizes have units.
    """

    def __init__(self, snapshot: Snapshot, top: Node, human_sizes: bool = False) -> None:
        self._format_size = format_size if human_sizes else str
        self._users = {number: _format_text(name) for number, name in snapshot.users}
        self._groups = {number: _format_text(name) for number, name in snapshot.groups}
        self._user_width = _width(self._users)
        self._group_width = _width(self._groups)
        self._size_width = _HUMAN_SIZE_WIDTH if human_sizes else len(str(total_bytes(top)))

    def line(self, name: bytes, node: Node) -> str:
        """Return the line of an entry with this name or path."""
        user = self._users.get(node.uid) or str(node.uid)
        group = self._groups.get(node.gid) or str(node.gid)
        shown_name = escape_path(name)
        if node.kind == NodeType.SYMLINK:
            shown_name += f" -> {escape_path(node.content)}"
        return (
            f"{stat.filemode(NODE_TYPES[NodeType(node.kind)].mode_bits | node.mode)} "
            f"{user:<{self._user_width}} {group:<{self._group_width}} "
            f"{self._size(node):>{self._size_width}} {format_time(node.mtime_ns)} "
            f"{format_state(node):<8} {shown_name}"
        )

    def _size(self, node: Node) -> str:
        if node.kind in (NodeType.CHARACTER_DEVICE, NodeType.BLOCK_DEVICE):
            rdev = node.extra.rdev if node.extra is not None else 0
            try:
                return f"{os.major(rdev)}, {os.minor(rdev)}"
            except (OverflowError, ValueError):
                return str(rdev)
        return self._format_size(total_bytes(node))


def format_state(node: Node) -> str:
    """Return the state of a file that was written to during its capture, "" for a stable one."""
    if node.kind != NodeType.FILE or node.state == CaptureState.STABLE:
        return ""
    return _STATES[CaptureState(node.state)]


def format_reason(node: Node) -> str:
    """Return why a file was not captured as stable, in a word or two."""
    capture = node.extra.capture if node.extra is not None else None
    if capture is None:
        return "unknown"
    try:
        return ChangeReason(capture.reason).name.lower().replace("_", " ")
    except ValueError:
        return str(capture.reason)


def total_bytes(node: Node) -> int:
    """Return the size of a file, or of all files below a directory."""
    return node.size if node.tree is None else node.tree.total_bytes


class NodeFields:
    """Format the entries of one snapshot as the fields of a JSON object."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._users = dict(snapshot.users)
        self._groups = dict(snapshot.groups)

    def fields(self, path: bytes, node: Node) -> dict[str, JsonValue]:
        """Return the fields of an entry, with its path."""
        return json_path(path) | self.attributes(node)

    def attributes(self, node: Node) -> dict[str, JsonValue]:
        """Return the fields of an entry, without its path."""
        fields: dict[str, JsonValue] = {
            "kind": NODE_TYPES[NodeType(node.kind)].word,
            "mode": node.mode,
            "uid": node.uid,
            "gid": node.gid,
            "user": self._users.get(node.uid),
            "group": self._groups.get(node.gid),
            "size": node.size,
            "mtime_ns": node.mtime_ns,
            "ctime_ns": node.ctime_ns,
            "inode": node.inode,
            "nlink": node.nlink,
        }
        if node.kind == NodeType.FILE:
            captured = captured_digest(node)
            fields["state"] = _STATES[CaptureState(node.state)]
            fields["captured"] = captured.hex() if captured is not None else None
        elif node.kind == NodeType.SYMLINK:
            fields |= json_path(node.content, "link_target")
        elif node.tree is not None:
            fields["entries"] = subtree_count(node) - 1
            fields["total_bytes"] = node.tree.total_bytes
            fields["flagged"] = node.tree.flagged
        if node.extra is not None:
            fields |= _extra_fields(node)
        return fields


def _extra_fields(node: Node) -> dict[str, JsonValue]:
    extra = node.extra
    assert extra is not None
    fields: dict[str, JsonValue] = {}
    if node.kind in (NodeType.CHARACTER_DEVICE, NodeType.BLOCK_DEVICE):
        fields["rdev"] = extra.rdev
    if extra.xattrs:
        fields["xattrs"] = [name.decode("utf-8", "surrogateescape") for name, _ in extra.xattrs]
    if extra.capture is not None:
        observed = extra.capture.observed
        fields["reason"] = format_reason(node)
        fields["attempts"] = extra.capture.attempts
        fields["observed"] = observed.hex() if observed is not None else None
    return fields


def _format_text(text: str) -> str:
    return escape_path(text.encode("utf-8", "surrogateescape"))


def _width(names: dict[int, str]) -> int:
    return min(max((len(name) for name in names.values()), default=4), _MAX_OWNER_WIDTH)
