"""Trees and nodes: what the format allows comes back, and what breaks a rule is an error."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from casfs.digest import EMPTY_DIGEST, Digest, digest_of
from casfs.errors import TreeError
from casfs.format.tree import (
    MAX_FILE_BYTES,
    Branch,
    Capture,
    CaptureState,
    ChangeReason,
    Leaf,
    Node,
    NodeExtra,
    NodeType,
    PieceRef,
    TreeRef,
    captured_digest,
    check_entry,
    check_node,
    decode_piece,
    encode_leaf,
    encode_node,
    encode_piece,
    hard_link_key,
    replace,
    source_inode,
    subtree_count,
    subtree_summary,
)
from tests.support.builders import entry, file, flagged

REF = TreeRef(b"\x07" * 32, 5, 100, 1)
EVERY_KIND = [
    file(b"empty"),
    file(b"file", b"content", captured=b"\x01" * 32),
    entry(b"directory", NodeType.DIRECTORY, tree=REF),
    entry(b"symlink", NodeType.SYMLINK, content=b"../target", size=9),
    entry(b"fifo", NodeType.FIFO),
    entry(b"socket", NodeType.SOCKET),
    entry(b"character", NodeType.CHARACTER_DEVICE, extra=NodeExtra(rdev=0x103)),
    entry(b"block", NodeType.BLOCK_DEVICE, extra=NodeExtra(rdev=(1 << 64) - 1)),
    flagged(file(b"flagged", b"x")),
    entry(b"\xff\n\x01", mode=0o7777, uid=4_294_967_294, gid=4_294_967_294),
    entry(b"past", mtime_ns=-(1 << 63), ctime_ns=-1),
    entry(b"future", mtime_ns=(1 << 64) - 1, inode=(1 << 64) - 1, nlink=(1 << 32) - 1),
    entry(b"n" * 255, extra=NodeExtra(((b"user.a", b""), (b"user.b", b"\0v")), 0, 7)),
]


def as_builtins(nodes: list[Any]) -> bytes:
    """Return a leaf of entries that are given as lists, so that they may break any rule."""
    return msgspec.msgpack.encode([0, nodes])


def leaf(*nodes: Node) -> bytes:
    return encode_piece(Leaf(list(nodes)))


class TestTreeEncoding:
    def test_a_leaf_with_every_kind_of_entry_is_decoded_as_it_was_encoded(self) -> None:
        nodes = sorted(EVERY_KIND, key=lambda node: node.name)
        piece = decode_piece(leaf(*nodes))
        assert isinstance(piece, Leaf)
        assert piece.nodes == nodes

    def test_a_branch_is_decoded_as_it_was_encoded(self) -> None:
        branch = Branch([PieceRef(b"a", REF), PieceRef(b"b\xff", replace(REF, nodes=0, flagged=0))])
        assert decode_piece(encode_piece(branch)) == branch

    def test_an_empty_directory_is_an_empty_leaf(self) -> None:
        assert decode_piece(leaf()) == Leaf([])

    @pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 300, 65_535, 65_536])
    def test_a_leaf_encoded_in_parts_has_the_same_bytes(self, count: int) -> None:
        nodes = [file(b"%06d" % number) for number in range(count)]
        assert encode_leaf(list(map(encode_node, nodes))) == leaf(*nodes)

    def test_an_encoded_node_is_arrays_in_the_order_of_the_format(self) -> None:
        capture = Capture(ChangeReason.REWRITTEN, 3, b"\x0b" * 32)
        extra = NodeExtra(((b"user.x", b"v"),), 4, 5, capture)
        node = Node(
            b"name",
            1,
            0o644,
            10,
            11,
            12,
            13,
            14,
            15,
            16,
            2,
            True,
            b"",
            1,
            b"\x0a" * 32,
            None,
            extra,
        )
        assert msgspec.msgpack.decode(leaf(node)) == [
            0,
            [
                [
                    *(b"name", 1, 0o644, 10, 11, 12, 13, 14, 15, 16, 2, True, b"", 1),
                    *(b"\x0a" * 32, None),
                    [[[b"user.x", b"v"]], 4, 5, [3, 3, b"\x0b" * 32]],
                ]
            ],
        ]
        branch = Branch([PieceRef(b"a", REF)])
        assert msgspec.msgpack.decode(encode_piece(branch)) == [
            1,
            [[b"a", [b"\x07" * 32, 5, 100, 1]]],
        ]


class TestTreeCompatibility:
    def test_a_node_with_missing_fields_at_the_end_has_their_defaults(self) -> None:
        piece = decode_piece(as_builtins([[b"f", 1, 0o644, 0, 0, 1, 2, 3, 1]]))
        assert isinstance(piece, Leaf)
        assert piece.nodes == [Node(b"f", 1, 0o644, 0, 0, 1, 2, 3, 1)]
        assert piece.nodes[0].captured is None
        assert piece.nodes[0].state == CaptureState.STABLE

    def test_a_node_with_fields_of_a_later_version_is_read(self) -> None:
        whole = [b"f", 1, 0o644, 0, 0, 1, 2, 3, 1, 0, 0, False, b"", 0, None, None]
        extra = [[], 0, 0, [1, 2, None, "later"], "later"]
        piece = decode_piece(as_builtins([[*whole, extra, "later", 7]]))
        assert isinstance(piece, Leaf)
        assert piece.nodes[0].extra == NodeExtra((), 0, 0, Capture(1, 2))
        branch = msgspec.msgpack.encode([1, [[b"a", [b"\x07" * 32, 5, 100, 1, None, "later"], 9]]])
        assert decode_piece(branch) == Branch([PieceRef(b"a", REF)])

    def test_a_tree_piece_of_an_unknown_form_is_refused(self) -> None:
        with pytest.raises(TreeError):
            decode_piece(msgspec.msgpack.encode([2, []]))


class TestHostileName:
    @pytest.mark.parametrize(
        "name",
        [b"", b".", b"..", b"a/b", b"/", b"a\0b", b"\0", b"n" * 4097, b"../../etc/passwd"],
    )
    def test_a_hostile_name_is_refused_wherever_it_is_in_a_leaf(self, name: bytes) -> None:
        for others in ([], [file(b"\x01")], [file(b"\x01"), file(b"zzz")]):
            nodes = sorted([*others, file(name)], key=lambda node: node.name)
            with pytest.raises(TreeError):
                decode_piece(leaf(*nodes))

    @pytest.mark.parametrize("name", [b"...", b".a", b"..a", b"\\", b"n" * 255, b" ", b"\xff"])
    def test_an_unusual_but_valid_name_is_accepted(self, name: bytes) -> None:
        assert decode_piece(leaf(file(name))) == Leaf([file(name)])

    def test_names_in_wrong_order_are_refused(self) -> None:
        with pytest.raises(TreeError, match="not sorted"):
            decode_piece(leaf(file(b"b"), file(b"a")))

    def test_a_duplicate_name_is_refused(self) -> None:
        with pytest.raises(TreeError, match="not unique"):
            decode_piece(leaf(file(b"a"), entry(b"a", NodeType.SYMLINK, content=b"/etc")))

    def test_names_of_pieces_must_be_sorted_and_unique(self) -> None:
        for names in ([b"b", b"a"], [b"a", b"a"]):
            with pytest.raises(TreeError, match="not sorted"):
                decode_piece(encode_piece(Branch([PieceRef(name, REF) for name in names])))


class TestHostileNode:
    @pytest.mark.parametrize(
        "node",
        [
            pytest.param(file(b"f", mode=0o10000), id="mode with the kind in it"),
            pytest.param(file(b"f", mode=-1), id="mode below zero"),
            pytest.param(file(b"f", uid=-1), id="owner below zero"),
            pytest.param(file(b"f", gid=-1), id="group below zero"),
            pytest.param(file(b"f", uid=(1 << 32) - 1), id="owner that means none"),
            pytest.param(file(b"f", gid=1 << 63), id="group beyond any"),
            pytest.param(file(b"f", inode=-1), id="inode below zero"),
            pytest.param(file(b"f", nlink=-1), id="names below zero"),
            pytest.param(file(b"f", nlink=1 << 32), id="names beyond any"),
            pytest.param(entry(b"f", size=-1), id="size below zero"),
            pytest.param(entry(b"f", size=1 << 63), id="size beyond any"),
            pytest.param(file(b"f", state=3), id="unknown state"),
            pytest.param(file(b"f", state=-1), id="state below zero"),
            pytest.param(file(b"f", levels=9), id="levels beyond the bound"),
            pytest.param(file(b"f", levels=-1), id="levels below zero"),
            pytest.param(entry(b"f", content=b"x" * 39), id="content of a broken record"),
            pytest.param(file(b"f", captured=b"short"), id="digest that is none"),
            pytest.param(file(b"f", tree=REF), id="file with a tree"),
            pytest.param(
                entry(b"f", NodeType.SYMLINK, tree=REF, content=b"x"), id="link with a tree"
            ),
            pytest.param(entry(b"f", NodeType.SYMLINK), id="link to nothing"),
            pytest.param(entry(b"f", NodeType.SYMLINK, content=b"a\0b"), id="link with NUL"),
            pytest.param(entry(b"f", NodeType.DIRECTORY), id="directory without a tree"),
            pytest.param(file(b"f", extra=NodeExtra(rdev=-1)), id="device below zero"),
            pytest.param(file(b"f", extra=NodeExtra(device=-1)), id="file system below zero"),
            pytest.param(file(b"f", extra=NodeExtra(((b"", b""),))), id="xattr without a name"),
            pytest.param(file(b"f", extra=NodeExtra(((b"user.\0", b""),))), id="xattr with NUL"),
            pytest.param(file(b"f", extra=NodeExtra(capture=Capture(99, 1))), id="unknown reason"),
            pytest.param(
                file(b"f", extra=NodeExtra(capture=Capture(-1, 1))), id="reason below zero"
            ),
            pytest.param(
                file(b"f", extra=NodeExtra(capture=Capture(1, -1))), id="attempts below zero"
            ),
            pytest.param(
                file(b"f", extra=NodeExtra(capture=Capture(1, 1, b"x"))), id="odd observed"
            ),
        ],
    )
    def test_a_node_with_impossible_fields_is_refused(self, node: Node) -> None:
        with pytest.raises(TreeError, match="'f' of a tree breaks the format's rules"):
            decode_piece(leaf(node))
        with pytest.raises(TreeError):
            check_node(node)

    @pytest.mark.parametrize("kind", [-1, 0, 8, 255, 1 << 40])
    def test_a_node_of_an_unknown_kind_is_refused(self, kind: int) -> None:
        with pytest.raises(TreeError):
            decode_piece(as_builtins([[b"f", kind, 0o644, 0, 0, 1, 2, 3, 1]]))

    @pytest.mark.parametrize(
        "ref",
        [
            TreeRef(b"short", 0, 0, 0),
            TreeRef(b"\x07" * 33, 0, 0, 0),
            replace(REF, nodes=-1, flagged=0),
            replace(REF, nodes=1 << 48),
            replace(REF, total_bytes=-1),
            replace(REF, total_bytes=1 << 63),
            replace(REF, flagged=-1),
            replace(REF, flagged=6),
        ],
    )
    def test_a_node_with_an_impossible_tree_reference_is_refused(self, ref: TreeRef) -> None:
        with pytest.raises(TreeError):
            decode_piece(leaf(entry(b"d", NodeType.DIRECTORY, tree=ref)))
        with pytest.raises(TreeError):
            decode_piece(encode_piece(Branch([PieceRef(b"a", ref)])))

    def test_a_branch_without_pieces_is_refused(self) -> None:
        with pytest.raises(TreeError, match="no pieces"):
            decode_piece(encode_piece(Branch([])))


class TestHostileTreeBytes:
    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\xc1",
            b"\x90",
            b"\x92\x00",
            b"\x91" * 100_000,
            b"\x92\x00\xdd\xff\xff\xff\xff",
            b"\x92\x00\x91\xdc\xff\xff",
            b"\x92\x00\x91\x91\xc6\xff\xff\xff\xff",
            leaf(file(b"a")) + b"\0",
            leaf(file(b"a"))[:-1],
            msgspec.msgpack.encode({"nodes": []}),
            msgspec.msgpack.encode([0, [["text", 1, 0, 0, 0, 0, 0, 0, 1]]]),
            msgspec.msgpack.encode([0, [[b"f", 1.5, 0, 0, 0, 0, 0, 0, 1]]]),
        ],
    )
    def test_tree_bytes_that_do_not_parse_are_refused(self, data: bytes) -> None:
        with pytest.raises(TreeError):
            decode_piece(data)


class TestSubtreeSummary:
    def test_a_subtree_summary_counts_every_entry_and_the_bytes_of_files_only(self) -> None:
        nodes = [
            file(b"a", b"12345"),
            entry(b"b", NodeType.SYMLINK, content=b"target", size=6),
            entry(b"c", NodeType.DIRECTORY, tree=REF, size=4096),
            flagged(file(b"d", b"123")),
            replace(file(b"e", b"1"), state=CaptureState.APPENDED),
        ]
        assert subtree_summary(nodes) == (5 + 5, 5 + 100 + 3 + 1, 1 + 1)
        assert subtree_summary([]) == (0, 0, 0)
        assert [subtree_count(node) for node in nodes] == [1, 1, 6, 1, 1]


class TestCapturedDigest:
    def test_the_captured_digest_covers_all_bytes_of_the_file(self) -> None:
        whole = Digest(b"\x0c" * 32)
        assert captured_digest(file(b"f", b"one chunk")) == digest_of(b"one chunk")
        assert captured_digest(file(b"f")) == EMPTY_DIGEST
        assert captured_digest(file(b"f", b"many", captured=whole)) == whole

    def test_the_captured_digest_of_an_entry_that_is_no_file_is_none(self) -> None:
        assert captured_digest(entry(b"d", NodeType.DIRECTORY, tree=REF)) is None
        assert captured_digest(entry(b"l", NodeType.SYMLINK, content=b"x" * 40)) is None


class TestWriterChecks:
    @pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"a\0b", b"n" * 4097])
    def test_a_name_that_no_reader_accepts_is_refused_before_it_is_written(
        self, name: bytes
    ) -> None:
        with pytest.raises(TreeError, match="name"):
            check_entry(file(name))
        with pytest.raises(TreeError):
            decode_piece(encode_piece(Leaf([file(name)])))

    @pytest.mark.parametrize("length", [255, 256, 765, 4096])
    def test_a_name_of_up_to_4096_bytes_is_written_and_read(self, length: int) -> None:
        node = file(b"n" * length)
        check_entry(node)
        assert decode_piece(encode_piece(Leaf([node]))) == Leaf([node])

    def test_a_symlink_with_an_empty_target_is_refused_before_it_is_written(self) -> None:
        with pytest.raises(TreeError, match="empty target"):
            check_entry(entry(b"l", NodeType.SYMLINK))

    def test_sizes_that_add_up_to_more_than_a_summary_holds_are_counted_as_the_largest(
        self,
    ) -> None:
        sparse = [entry(name, size=MAX_FILE_BYTES) for name in (b"a", b"b", b"c")]
        assert subtree_summary(sparse) == (3, MAX_FILE_BYTES, 0)
        directory = entry(
            b"d", NodeType.DIRECTORY, tree=TreeRef(bytes(32), *subtree_summary(sparse))
        )
        check_entry(directory)
        assert subtree_summary([directory, directory])[1] == MAX_FILE_BYTES


class TestHardLinkKey:
    def test_the_source_inode_is_the_device_and_the_inode(self) -> None:
        node = file(b"f", nlink=2, inode=9, extra=NodeExtra(device=3))
        assert source_inode(node) == (3, 9)
        assert source_inode(replace(node, kind=NodeType.FIFO)) == (3, 9)
        assert source_inode(replace(node, nlink=1)) is None

    def test_two_names_share_a_hard_link_key_only_if_all_that_is_stored_is_the_same(self) -> None:
        node = file(b"f", b"one", nlink=2, inode=9, extra=NodeExtra(device=3))
        key = hard_link_key(node)
        assert key is not None and hard_link_key(replace(node, name=b"g", mtime_ns=1)) == key
        others = [
            replace(node, inode=8),
            replace(node, extra=NodeExtra(device=4)),
            replace(node, content=file(b"f", b"two").content),
            replace(node, captured=bytes(32)),
            replace(node, kind=NodeType.SYMLINK),
            replace(node, extra=NodeExtra(device=3, rdev=1)),
        ]
        assert len({key, *map(hard_link_key, others)}) == 1 + len(others)

    def test_a_single_name_or_a_directory_has_no_hard_link_key(self) -> None:
        extra = NodeExtra(device=3)
        assert hard_link_key(file(b"f", inode=9, extra=extra)) is None
        assert hard_link_key(file(b"f", inode=9, nlink=2)) is None
        directory = entry(b"d", NodeType.DIRECTORY, nlink=5, tree=REF, extra=extra)
        assert hard_link_key(directory) is None
