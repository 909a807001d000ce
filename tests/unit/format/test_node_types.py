"""The table of node types."""

from __future__ import annotations

import stat

from casfs.format.node_types import MODE_BITS, NODE_TYPES, TYPES_BY_LETTER, TYPES_BY_MODE_BITS
from casfs.format.tree import NodeType


def test_every_node_type_has_names_and_none_shares_them() -> None:
    assert set(NODE_TYPES) == set(NodeType)
    assert len({names.word for names in NODE_TYPES.values()}) == len(NodeType)
    assert set(TYPES_BY_LETTER.values()) == set(TYPES_BY_MODE_BITS.values()) == set(NodeType)
    assert {TYPES_BY_MODE_BITS[bits]: bits for bits in MODE_BITS.values()} == MODE_BITS


def test_the_letters_are_those_that_ls_prints_but_for_regular_files() -> None:
    printed = {
        node_type: stat.filemode(names.mode_bits)[0] for node_type, names in NODE_TYPES.items()
    }
    assert printed.pop(NodeType.FILE) == "-"
    assert printed == {
        node_type: names.letter
        for node_type, names in NODE_TYPES.items()
        if node_type != NodeType.FILE
    }
