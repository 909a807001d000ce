"""Node types and what other systems call them: one table for listings, find, backup, restore and mount."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from casfs.format.tree import NodeType


@dataclass(frozen=True, slots=True)
class NodeTypeNames:
    """The names of one node type.

    `word` is used in messages and JSON, `letter` by find(1), `mode_bits` by stat(2) in `st_mode`.
    """

    word: str
    letter: str
    mode_bits: int


NODE_TYPES: Mapping[NodeType, NodeTypeNames] = MappingProxyType(
    {
        NodeType.FILE: NodeTypeNames("file", "f", stat.S_IFREG),
        NodeType.DIRECTORY: NodeTypeNames("dir", "d", stat.S_IFDIR),
        NodeType.SYMLINK: NodeTypeNames("symlink", "l", stat.S_IFLNK),
        NodeType.FIFO: NodeTypeNames("fifo", "p", stat.S_IFIFO),
        NodeType.SOCKET: NodeTypeNames("socket", "s", stat.S_IFSOCK),
        NodeType.CHARACTER_DEVICE: NodeTypeNames("chardev", "c", stat.S_IFCHR),
        NodeType.BLOCK_DEVICE: NodeTypeNames("blockdev", "b", stat.S_IFBLK),
    }
)

TYPES_BY_LETTER: Mapping[str, NodeType] = MappingProxyType(
    {names.letter: node_type for node_type, names in NODE_TYPES.items()}
)

TYPES_BY_MODE_BITS: Mapping[int, NodeType] = MappingProxyType(
    {names.mode_bits: node_type for node_type, names in NODE_TYPES.items()}
)

MODE_BITS: Mapping[int, int] = MappingProxyType(
    {int(node_type): names.mode_bits for node_type, names in NODE_TYPES.items()}
)
