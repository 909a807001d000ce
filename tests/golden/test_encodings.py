"""The bytes of format 1: what is written today must be what was written at first, and be read.

Where a compressor has a say only reading is fixed: another zstd may well make other frames.
"""

from __future__ import annotations

from casfs.digest import Digest, PackId, SnapshotId, digest_of
from casfs.format.codec import BlobCodec, BlobKind, Codec
from casfs.format.config import RepositoryConfig, decode_config, encode_config
from casfs.format.pack import (
    BLOB_HEADER as PACK_RECORD,
)
from casfs.format.pack import (
    TRAILER,
    PackEntry,
    encode_end,
    encode_header,
    encode_record_header,
    parse_directory,
    parse_trailer,
)
from casfs.format.snapshot import Snapshot, SnapshotStats, decode_snapshot
from casfs.format.tree import (
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
    decode_piece,
    encode_piece,
)
from casfs.trees.content import EXTENT, HOLE, ContentWriter
from casfs.trees.writer import TreeWriter

TIMES = (1_600_000_000_123_456_789, -1)

NODES = [
    Node(
        *(b"chunks", NodeType.FILE, 0o644, 1000, 100, *TIMES, 77, 2, 9, CaptureState.CHANGED, True),
        EXTENT.pack(5, b"\x01" * 32) + EXTENT.pack(4, HOLE),
        0,
        b"\x02" * 32,
        None,
        NodeExtra(
            ((b"user.a", b"\0v"),), 0, 2049, Capture(ChangeReason.REWRITTEN, 3, b"\x03" * 32)
        ),
    ),
    Node(
        *(b"dir\xff", NodeType.DIRECTORY, 0o1777, 0, 0, *TIMES, 78, 3),
        tree=TreeRef(b"\x04" * 32, 5, 300, 1),
    ),
    Node(b"link", NodeType.SYMLINK, 0o777, 0, 0, *TIMES, 79, 1, 6, content=b"target"),
    Node(
        b"null", NodeType.CHARACTER_DEVICE, 0o666, 0, 0, *TIMES, 80, 1, extra=NodeExtra((), 0x103)
    ),
]
LEAF = bytes.fromhex(
    "920094dc0011c4066368756e6b7301cd01a4cd03e864cf16345785dffbcd15ff4d020902c3c45005000000000000"
    "00010101010101010101010101010101010101010101010101010101010101010104000000000000000000000000"
    "00000000000000000000000000000000000000000000000000000000c42002020202020202020202020202020202"
    "02020202020202020202020202020202c0949192c406757365722e61c402007600cd0801930303c4200303030303"
    "030303030303030303030303030303030303030303030303030303dc0011c404646972ff02cd03ff0000cf163457"
    "85dffbcd15ff4e030000c2c40000c094c42004040404040404040404040404040404040404040404040404040404"
    "0404040405cd012c01c0dc0011c4046c696e6b03cd01ff0000cf16345785dffbcd15ff4f010600c2c40674617267"
    "657400c0c0c0dc0011c4046e756c6c06cd01b60000cf16345785dffbcd15ff50010000c2c40000c0c09490cd0103"
    "00c0"
)
PIECES = [
    PieceRef(b"a", TreeRef(b"\x05" * 32, 1024, 0, 0)),
    PieceRef(b"m\xff", TreeRef(b"\x06" * 32, 3000, 1 << 40, 7)),
]
BRANCH = bytes.fromhex(
    "92019292c4016194c4200505050505050505050505050505050505050505050505050505050505050505cd040000"
    "0092c4026dff94c4200606060606060606060606060606060606060606060606060606060606060606cd0bb8cf00"
    "0001000000000007"
)
BLOBS = (
    (BlobKind.DATA, b"first blob"),
    (BlobKind.TREE, b"\x92\x00\x90"),
    (BlobKind.CONTENT, b"\7" * 40),
)
PACK = bytes.fromhex(
    "434153465350414b0100100000000000"
    "63424c42010000000a0000000a000000666972737420626c6f62"
    "63424c42020000000300000003000000920090"
    "63424c420300000028000000280000000707070707070707070707070707070707070707070707070707070707"
    "0707070707070707070707"
    "63424c42ff0000008400000084000000"
    "a1cf845f7036f4d87527ab629e8e7996227a0f43d44e0b5b806f7b6c1f0839d00a0000000a00000001000000"
    "6913a9951a0d082126c088623b50d588044e3950297cbd30214add4cc175ac4e030000000300000002000000"
    "0291d5e81a685daf9e709d0216e68e40abf45d9dc66909fb7498c88408b4a360280000002800000003000000"
    "85000000000000008400000003000000"
    "543b371a860fd482ad89712f8b6ce329180a6bce58eef27f5d7c1c08b3ebb471"
    "00000000000000004341534653454e44"
)
PACK_NAME = "cfdb657fb23457bbe032c97aa48b5b186564de2b81aad46621d62c9ea07ee3b2"
CONFIG = b"""\
casfs repository, format 1
{
  "id": "abababababababababababababababababababababababababababababababab",
  "created": "2026-01-02T03:04:05Z",
  "chunker": {
    "algorithm": "fastcdc-2020",
    "min_bytes": 262144,
    "avg_bytes": 1048576,
    "max_bytes": 4194304,
    "normalization": 1,
    "seed": 0
  },
  "tree_seed": 0,
  "encryption": null
}
blake3 22141f8aa24bd0243c16bb79833100ff4161eaeaf6a2a59a894f6884417c099d
"""
SNAPSHOT_ID = "95727e4429e459959402d321ea0f5f5bb43ea1147a4eb86875baadc4953d7d78"
SNAPSHOT = bytes.fromhex(
    "43415346534e4150010001005301000028b52ffd605300950800e6103e35706bd201185cf833446b3f42f8baf2d6"
    "b666269d5b40d303c145d444da63efd6a84da4c94d36dbe9bf52b07ab0bb3f4900b4b52405340030002e008c35cf"
    "4bf317248454501088584e7b81cdd11e910026db84f66f1abf243212088174382c200c88fe0f2914f916708e9eb3"
    "6a2002ecaacfc5556b56cad1782b17e9d68ed672aba39b08a6d8acd6e61219ceda22c3966bcd881a48b60c5fed68"
    "b6978bba010c9d6fa4dc735b2586f1b79674572531cfb9eed573735e5867575be1fb48bc115ab2076ed79c552807"
    "94ca842d01ffff7b286cf093b35ae6bcadb31974dec65093842ed28c3335233535acf44c98d8722364d0df5e0ca5"
    "0b080035b3a069dfc526bf944cc35ce6a775a20c030dd003"
)


class Puts:
    """What was put, in order."""

    def __init__(self) -> None:
        self.blobs: list[bytes] = []

    def __call__(self, kind: BlobKind, digest: Digest, data: bytes) -> None:
        self.blobs.append(data)


def test_a_tree_keeps_its_golden_bytes() -> None:
    assert encode_piece(Leaf(NODES)) == LEAF
    assert decode_piece(LEAF) == Leaf(NODES)
    assert digest_of(LEAF).hex().startswith("452a53f22b5d4d64cb31416be1ffe43d")
    assert encode_piece(Branch(PIECES)) == BRANCH
    assert decode_piece(BRANCH) == Branch(PIECES)


def test_a_pack_keeps_its_golden_bytes() -> None:
    data = bytearray(encode_header())
    entries = []
    for kind, plain in BLOBS:
        data += encode_record_header(kind, Codec.RAW, len(plain), len(plain))
        digest = digest_of(plain)
        entries.append(PackEntry(digest, len(data), len(plain), len(plain), kind, Codec.RAW))
        data += plain
    data += encode_end(entries, len(data))
    assert bytes(data) == PACK
    name = PackId(digest_of(data))
    assert name.hex() == PACK_NAME
    offset, size, _, digest = parse_trailer(name, PACK[-TRAILER.size :], len(PACK))
    directory = PACK[offset : offset + size]
    assert parse_directory(name, directory, digest, offset - PACK_RECORD.size) == entries


def test_a_configuration_keeps_its_golden_bytes() -> None:
    config = RepositoryConfig(id="ab" * 32, created="2026-01-02T03:04:05Z")
    assert encode_config(config) == CONFIG
    assert decode_config(CONFIG, "") == config


def test_a_snapshot_of_the_first_version_is_read() -> None:
    snapshot = decode_snapshot(SnapshotId(bytes.fromhex(SNAPSHOT_ID)), SNAPSHOT, BlobCodec(3))
    assert snapshot == Snapshot(
        root=Node(
            *(b"", NodeType.DIRECTORY, 0o755, 0, 0, *TIMES, 2, 3),
            tree=TreeRef(b"\x08" * 32, 1, 2, 0),
        ),
        time_ns=1_700_000_000_000_000_000,
        host="host",
        user="me",
        paths=(b"/p\xff",),
        tags=("t",),
        users=((0, "root"),),
        program="casfs 0.1.0",
        stats=SnapshotStats(files=1, seconds=0.5),
    )


def test_a_payload_of_the_first_version_is_read() -> None:
    payload = bytes.fromhex("28b52ffd602c006d000030636173667320010023514b11")
    plain = b"casfs " * 50
    assert BlobCodec(3).decode(digest_of(plain), Codec.ZSTD, payload, 300) == plain


def test_a_directory_keeps_its_golden_split_points() -> None:
    for seed, sizes, top in (
        (0, [1670, 1433, 1559, 7354, 2281, 1480, 7671, 2495, 4057], "6f98cdb8e4fc9cbf"),
        (12345, [1139, 2515, 8192, 3182, 7943, 1505, 3503, 1860, 161], "de4f1d7476ecf984"),
    ):
        puts = Puts()
        writer = TreeWriter(puts, digest_of, seed)
        for number in range(30_000):
            writer.add(Node(b"%05d" % number, NodeType.FILE, 0o644, 0, 0, 0, 0, number, 1))
        ref = writer.finish()
        leaves = [decode_piece(data) for data in puts.blobs[:-1]]
        assert [len(leaf.nodes) for leaf in leaves if isinstance(leaf, Leaf)] == sizes
        assert ref.digest.hex().startswith(top)


def test_a_content_list_keeps_its_golden_cut_points() -> None:
    puts = Puts()
    writer = ContentWriter(puts, digest_of)
    for number in range(20_000):
        writer.add(number + 1, digest_of(b"%d" % number))
    records, levels = writer.finish()
    assert [len(data) // EXTENT.size for data in puts.blobs] == [
        *(279, 1216, 723, 380, 281, 397, 287, 4421, 2825, 449),
        *(332, 1072, 422, 2514, 2087, 385, 269, 760, 901),
    ]
    assert levels == 1
    assert digest_of(records).hex().startswith("4aa14cda0bf07273f73d51e646582936")
