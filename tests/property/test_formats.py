"""Every format: what is written comes back, and whatever else is read is the project's own error.

A dict or a list is the oracle of what comes back. Hostile input is of three kinds: any bytes, real
bytes with some changed, and real structures with some part of them replaced by another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from casfs.digest import Digest, PackId, SnapshotId, digest_of
from casfs.errors import (
    CasfsError,
    DeltaError,
    IntegrityError,
    PackError,
    TreeError,
    UsageError,
)
from casfs.format.codec import MAX_PLAIN_BYTES, BlobCodec, BlobKind
from casfs.format.config import RepositoryConfig, decode_config, encode_config
from casfs.format.delta import DeltaBuilder, DeltaName, DeltaPack, decode_delta
from casfs.format.pack import BLOB_HEADER as PACK_RECORD
from casfs.format.pack import (
    ENTRY,
    HEADER,
    MAX_PACK_BLOBS,
    RECORD_MAGIC,
    TRAILER,
    PackEntry,
    PackRef,
    encode_record_header,
    parse_directory,
    parse_header,
    parse_trailer,
    scan_records,
)
from casfs.format.snapshot import HEADER as SNAPSHOT_HEADER
from casfs.format.snapshot import MAGIC, Snapshot, SnapshotStats, decode_snapshot, encode_snapshot
from casfs.format.tree import (
    MAX_NAME_BYTES,
    Branch,
    Capture,
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
    encode_piece,
    hard_link_key,
    subtree_summary,
)
from casfs.trees.content import (
    EXTENT,
    HOLE,
    ContentReader,
    ContentSplit,
    ContentWriter,
    Extent,
    parse_records,
)
from casfs.trees.reader import TreeReader
from casfs.trees.writer import TreeSplit, TreeWriter
from tests.support.encryption import SESSION, OneSession
from tests.support.stores import MemoryBlobs, make_pack

CODEC = BlobCodec(3)
PACK = PackId(bytes(32))
CHEAP = settings(max_examples=4 * settings().max_examples)

NAMES = st.one_of(
    st.binary(min_size=1, max_size=6),
    st.sampled_from([b"a", b"aa", b"b", b"\xff", b"x" * 255, b"x" * 765]),
).filter(lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b".."))
DIGESTS = st.binary(min_size=32, max_size=32)
COUNTS = st.integers(0, 1 << 40)
TIMES_NS = st.integers(-(1 << 63), (1 << 64) - 1)
OWNERS = st.integers(0, (1 << 32) - 2)


@st.composite
def captures(draw: st.DrawFn) -> Capture:
    return Capture(draw(st.integers(0, 5)), draw(st.integers(1, 9)), draw(st.none() | DIGESTS))


@st.composite
def extras(draw: st.DrawFn) -> NodeExtra:
    names = st.binary(min_size=1, max_size=9).filter(lambda name: b"\0" not in name)
    values = draw(st.dictionaries(names, st.binary(max_size=9), max_size=3))
    numbers = st.integers(0, (1 << 64) - 1)
    return NodeExtra(
        tuple(sorted(values.items())), draw(numbers), draw(numbers), draw(st.none() | captures())
    )


@st.composite
def tree_refs(draw: st.DrawFn) -> TreeRef:
    nodes = draw(COUNTS)
    return TreeRef(draw(DIGESTS), nodes, draw(COUNTS), draw(st.integers(0, nodes)))


@st.composite
def nodes(draw: st.DrawFn, name: st.SearchStrategy[bytes] = NAMES) -> Node:
    """Any entry that the format allows."""
    kind = draw(st.sampled_from(list(NodeType)))
    fields: dict[str, Any] = {}
    if kind == NodeType.FILE:
        records = draw(st.lists(st.tuples(COUNTS.map(lambda n: n + 1), DIGESTS), max_size=4))
        fields["content"] = b"".join(EXTENT.pack(*record) for record in records)
        fields["size"] = sum(length for length, _ in records)
        fields["levels"] = draw(st.integers(0, 8))
        fields["state"] = draw(st.integers(0, 2))
        fields["racy"] = draw(st.booleans())
        fields["captured"] = draw(st.none() | DIGESTS)
    elif kind == NodeType.DIRECTORY:
        fields["tree"] = draw(tree_refs())
    elif kind == NodeType.SYMLINK:
        target = st.binary(min_size=1, max_size=20).filter(lambda target: b"\0" not in target)
        fields["content"] = draw(target)
        fields["size"] = len(fields["content"])
    return Node(
        draw(name),
        kind,
        draw(st.integers(0, 0o7777)),
        draw(OWNERS),
        draw(OWNERS),
        draw(TIMES_NS),
        draw(TIMES_NS),
        draw(st.integers(0, (1 << 64) - 1)),
        draw(st.integers(0, (1 << 32) - 1)),
        extra=draw(st.none() | extras()),
        **fields,
    )


@st.composite
def directories(draw: st.DrawFn, max_size: int = 60) -> dict[bytes, Node]:
    names = draw(st.sets(NAMES, max_size=max_size))
    kinds = draw(st.lists(nodes(), min_size=1, max_size=5))
    return {
        name: msgspec.structs.replace(kinds[number % len(kinds)], name=name)
        for number, name in enumerate(sorted(names))
    }


SMALL_TREES = TreeSplit(min_entries=2, max_entries=5, mask=1)
SMALL_LISTS = ContentSplit(inline_records=2, min_records=2, max_records=5, mask=1)
"""Pieces so small that a few entries have several levels of them."""


def wild_nodes() -> st.SearchStrategy[Node]:
    """Entries whose fields are what a source, or a mistake, may give: valid or not."""
    numbers = st.sampled_from([-1, 0, 1, (1 << 32) - 2, (1 << 32) - 1, (1 << 63) - 1])
    names = st.binary(max_size=5) | st.sampled_from([b".", b"..", b"x" * 4096, b"x" * 4097])
    contents = st.binary(max_size=2) | st.sampled_from([b"c" * 40, b"c" * 41, b"\0"])
    xattrs = st.lists(st.tuples(st.binary(max_size=2), st.binary(max_size=2)), max_size=2)
    extra = st.builds(
        NodeExtra,
        xattrs.map(tuple),
        numbers,
        numbers,
        st.none()
        | st.builds(
            Capture, st.integers(-1, 8), st.integers(-1, 2), st.none() | st.binary(max_size=1)
        ),
    )
    return st.builds(
        Node,
        names,
        st.integers(-1, 8),
        st.integers(-1, 0o10000),
        *[numbers] * 6,
        size=numbers,
        state=st.integers(-1, 3),
        content=contents,
        levels=st.integers(-1, 9),
        captured=st.none() | st.binary(min_size=31, max_size=32),
        tree=st.none() | st.builds(TreeRef, DIGESTS | st.just(b""), numbers, numbers, numbers),
        extra=st.none() | extra,
    )


class TestRulesOfWritersAndReaders:
    @CHEAP
    @given(nodes(NAMES | st.integers(1, 4096).map(lambda length: b"n" * length)) | wild_nodes())
    def test_a_writer_accepts_an_entry_exactly_if_a_reader_does(self, node: Node) -> None:
        try:
            check_entry(node)
        except TreeError:
            with pytest.raises(TreeError):
                decode_piece(encode_piece(Leaf([node])))
        else:
            assert decode_piece(encode_piece(Leaf([node]))) == Leaf([node])

    @settings(deadline=None, max_examples=max(settings().max_examples // 10, 3))
    @given(
        st.integers(1, 12_000),
        st.sampled_from([1, 255, 1024, 4096]),
        st.sampled_from([1, 4095]),
        st.integers(0, (1 << 32) - 1),
    )
    def test_no_directory_has_a_piece_that_is_larger_than_a_blob_may_be(
        self, count: int, name_bytes: int, target_bytes: int, seed: int
    ) -> None:
        target = b"t" * target_bytes
        memory = MemoryBlobs()
        writer = TreeWriter(memory.put, digest_of, seed)
        node = Node(b"", NodeType.SYMLINK, 0o777, 0, 0, 0, 0, 1, 1, target_bytes, content=target)
        for number in range(count):
            name = b"%06d" % number + b"n" * (name_bytes - 6)
            writer.add(msgspec.structs.replace(node, name=name))
        ref = writer.finish()
        assert max(map(len, memory.blobs.values())) <= MAX_PLAIN_BYTES
        assert sum(1 for _ in TreeReader(memory.read).nodes(ref)) == count == ref.nodes

    @given(
        st.text(max_size=4) | st.just("\ud800"),
        st.lists(st.binary(max_size=4), max_size=3),
        st.lists(st.text(max_size=3) | st.just("\udcff"), max_size=2),
        st.sampled_from([0, -1, (1 << 63) - 1, -(1 << 63), 1 << 63, 1 << 64]),
        wild_nodes() | nodes(st.just(b"")),
    )
    def test_a_snapshot_is_refused_before_it_is_written_or_read_as_it_was(
        self, host: str, paths: list[bytes], tags: list[str], time_ns: int, root: Node
    ) -> None:
        snapshot = Snapshot(root, time_ns, host, host, tuple(paths), tuple(tags))
        try:
            snapshot_id, data = encode_snapshot(snapshot, CODEC)
        except UsageError:
            return
        assert decode_snapshot(snapshot_id, data, CODEC) == snapshot


class TestTreeRoundTrip:
    @given(nodes())
    def test_any_entry_is_valid_and_decoded_as_it_was_encoded(self, node: Node) -> None:
        check_node(node)
        assert decode_piece(encode_piece(Leaf([node]))) == Leaf([node])

    @given(directories(), st.integers(0, (1 << 32) - 1), st.binary(max_size=4))
    def test_any_directory_is_read_as_it_was_written(
        self, directory: dict[bytes, Node], seed: int, other: bytes
    ) -> None:
        memory = MemoryBlobs()
        writer = TreeWriter(memory.put, digest_of, seed, split=SMALL_TREES)
        for name in sorted(directory):
            writer.add(directory[name])
        ref = writer.finish()
        reader = TreeReader(memory.read)
        assert {node.name: node for node in reader.nodes(ref)} == directory
        assert [node.name for node in reader.nodes(ref)] == sorted(directory)
        for name in [*directory, other]:
            assert reader.lookup(ref, name) == directory.get(name)
            after = [node.name for node in reader.nodes(ref, name)]
            assert after == [known for known in sorted(directory) if known > name]
        assert (ref.nodes, ref.total_bytes, ref.flagged) == subtree_summary(
            list(directory.values())
        )


class TestContentListRoundTrip:
    RECORDS = st.lists(
        st.tuples(st.integers(1, 1 << 30), st.one_of(DIGESTS, st.just(HOLE))), max_size=80
    )

    @given(RECORDS, st.integers(0, 1 << 36))
    def test_any_content_list_is_read_as_it_was_written(
        self, records: list[tuple[int, bytes]], offset: int
    ) -> None:
        memory = MemoryBlobs()
        writer = ContentWriter(memory.put, digest_of, split=SMALL_LISTS)
        for length, digest in records:
            writer.add(length, digest)
        content, levels = writer.finish()
        reader = ContentReader(content, levels, memory.read)
        found = list(reader.extents())
        assert [(e.length, e.digest or HOLE) for e in found] == records
        assert [e.begin for e in found] == [
            sum(length for length, _ in records[:number]) for number in range(len(records))
        ]
        assert list(reader.extents(offset)) == [e for e in found if e.begin + e.length > offset]
        chunks = [digest for _, digest in records if digest != HOLE]
        assert [d for d in reader.blobs() if d not in memory.blobs] == [
            digest for digest in chunks if digest not in memory.blobs
        ]


class TestPackRoundTrip:
    PLAINS = st.lists(
        st.one_of(
            st.binary(max_size=60), st.just(RECORD_MAGIC * 5), st.just(HEADER.pack(b"", 0, 0, 0))
        ),
        max_size=12,
    )

    @staticmethod
    def parse(data: bytes) -> list[PackEntry]:
        parse_header(PACK, data)
        offset, size, _, digest = parse_trailer(PACK, data[-TRAILER.size :], len(data))
        return parse_directory(
            PACK, data[offset : offset + size], digest, offset - PACK_RECORD.size
        )

    @given(st.lists(st.tuples(PLAINS, st.booleans()), max_size=4), st.booleans())
    def test_any_delta_is_read_as_it_was_written(
        self, contents: list[tuple[list[bytes], bool]], is_encrypted: bool
    ) -> None:
        builder = DeltaBuilder()
        packs: dict[PackId, DeltaPack] = {}
        for plains, is_metadata in contents:
            data, entries = make_pack(plains)
            pack = DeltaPack(PackRef(PackId(digest_of(data)), is_metadata), len(data), entries)
            if pack.pack.id not in packs:
                packs[pack.pack.id] = pack
                builder.add(pack)
        name, data = builder.encode(1, SESSION if is_encrypted else None)
        delta = decode_delta(name, data, OneSession() if is_encrypted else None)
        assert list(delta.packs()) == list(packs.values())

    @given(PLAINS)
    def test_any_pack_is_read_as_it_was_written(self, plains: list[bytes]) -> None:
        data, entries = make_pack(plains)
        assert self.parse(data) == entries
        assert [data[e.offset : e.offset + e.stored_bytes] for e in entries] == plains
        walked = [data[at : at + size] for at, _, _, size, _ in scan_records(data, HEADER.size)]
        assert walked[: len(plains)] == plains

    @given(PLAINS, st.data())
    def test_a_damaged_pack_yields_every_blob_outside_the_damage(
        self, plains: list[bytes], data: st.DataObject
    ) -> None:
        whole, entries = make_pack(plains)
        begin = data.draw(st.integers(0, len(whole) - 1))
        end = data.draw(st.integers(begin + 1, min(begin + 40, len(whole))))
        junk = data.draw(st.binary(min_size=end - begin, max_size=end - begin))
        damaged = whole[:begin] + junk + whole[end:]
        found = {
            digest_of(damaged[at : at + size])
            for at, _, _, size, _ in scan_records(damaged, HEADER.size)
        }
        for entry in entries:
            hit = (
                entry.offset - PACK_RECORD.size < end and begin < entry.offset + entry.stored_bytes
            )
            assert hit or entry.digest in found


@st.composite
def changed(draw: st.DrawFn, data: bytes) -> bytes:
    """Return bytes with a few places changed, cut out, doubled or put in."""
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(result)))
        length = draw(st.integers(0, 8))
        kind = draw(st.sampled_from(["flip", "cut", "double", "insert", "truncate"]))
        if kind == "flip" and at < len(result):
            result[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del result[at : at + length]
        elif kind == "double":
            result[at:at] = result[at : at + length]
        elif kind == "insert":
            result[at:at] = draw(st.binary(max_size=8))
        else:
            del result[at:]
    return bytes(result)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.sampled_from(
        [-1, 0, 1, 255, 256, 0o7777, 0o10000, (1 << 32) - 1, 1 << 32, 1 << 48, 1 << 63]
    ),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=40),
    st.sampled_from([b"", b".", b"..", b"/", b"a/b", b"\0", bytes(32), bytes(40)]),
    st.lists(st.integers(0, 9), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(0, 9), max_size=2),
)


@st.composite
def replaced(draw: st.DrawFn, value: Any) -> Any:
    """Return a structure with some part of it, at any depth, replaced by something else."""
    if isinstance(value, list | tuple) and value and draw(st.integers(0, 9)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(replaced(value[at])), *value[at + 1 :]]
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        return value | {key: draw(replaced(value[key]))}
    return draw(VALUES)


def refuse_or(read: Callable[[], object], *allowed: type[CasfsError]) -> object | None:
    """Return the parsed value, or None where one of the allowed errors refuses it."""
    try:
        return read()
    except allowed:
        return None


def use_piece(data: bytes) -> None:
    """Read a tree blob, and use what was accepted as restore, check and the mount do."""
    piece = refuse_or(lambda: decode_piece(data), TreeError)
    if isinstance(piece, Branch):
        assert [part.first for part in piece.pieces] == sorted({p.first for p in piece.pieces})
    if not isinstance(piece, Leaf):
        return
    names = [node.name for node in piece.nodes]
    assert names == sorted(set(names))
    for node in piece.nodes:
        assert 0 < len(node.name) <= MAX_NAME_BYTES
        assert not {b"/"[0], 0} & set(node.name) and node.name not in (b".", b"..")
        assert 0 <= node.uid < (1 << 32) - 1 and 0 <= node.gid < (1 << 32) - 1
        captured_digest(node)
        hard_link_key(node)
        if node.kind == NodeType.FILE:
            use_content(node.content, node.levels)
    assert encode_piece(piece)
    assert len(subtree_summary(piece.nodes)) == 3


def use_content(content: bytes, levels: int) -> None:
    read = MemoryBlobs().read
    for lost_lists in (False, True):
        refuse_or(partial(_all_extents, content, levels, read, lost_lists), IntegrityError)
    refuse_or(lambda: list(ContentReader(content, levels, read).blobs()), IntegrityError)


def _all_extents(
    content: bytes, levels: int, read: Callable[[Digest], bytes], lost_lists: bool
) -> list[Extent]:
    return list(ContentReader(content, levels, read).extents(0, lost_lists))


def use_pack(data: bytes) -> None:
    refuse_or(lambda: TestPackRoundTrip.parse(data), PackError)
    for at, kind, codec, stored, plain in scan_records(data, min(len(data), HEADER.size)):
        assert at + stored <= len(data)
        assert kind in set(BlobKind)
        assert plain <= MAX_PLAIN_BYTES
        payload = data[at : at + stored]
        refuse_or(partial(CODEC.digest_payload, codec, payload, plain), IntegrityError)


def use_delta(data: bytes) -> None:
    name = DeltaName(7, digest_of(data))
    found = refuse_or(lambda: list(decode_delta(name, data).packs()), DeltaError)
    for pack in found if isinstance(found, list) else ():
        assert len(pack.entries) <= MAX_PACK_BLOBS
        for entry in pack.entries:
            assert HEADER.size < entry.offset <= pack.pack_bytes - entry.stored_bytes
            assert entry.plain_bytes <= MAX_PLAIN_BYTES and entry.kind in set(BlobKind)


def use_snapshot(data: bytes) -> None:
    name = SnapshotId(digest_of(data))
    snapshot = refuse_or(lambda: decode_snapshot(name, data, CODEC), TreeError)
    if snapshot is not None:
        assert isinstance(snapshot, Snapshot)
        assert snapshot.root.tree is not None
        check_node(snapshot.root)


def use_config(data: bytes) -> None:
    config = refuse_or(lambda: decode_config(data, "here"), CasfsError)
    if config is not None:
        assert isinstance(config, RepositoryConfig)
        assert config.encryption is None
        assert 0 < config.chunker.max_bytes <= MAX_PLAIN_BYTES


def use_payload(data: bytes) -> None:
    for codec in (0, 1, 2):
        for plain_bytes in (0, len(data), 1 << 20, MAX_PLAIN_BYTES + 1):
            plain = refuse_or(partial(CODEC.decompress, codec, data, plain_bytes), IntegrityError)
            assert plain is None or (isinstance(plain, bytes) and len(plain) == plain_bytes)


def fitted_config(body: bytes) -> bytes:
    """Return a configuration with this body, its digest right."""
    text = b"casfs repository, format 1\n" + body + b"\n"
    return text + b"blake3 %s\n" % digest_of(text).hex().encode()


def fitted_pack(data: bytes, directory: bytes) -> bytes:
    """Return a pack with another directory, whose trailer fits it."""
    head = encode_record_header(255, 0, len(directory) & 0xFFFFFFFF, len(directory))
    trailer = TRAILER.pack(
        len(data) + len(head),
        len(directory),
        len(directory) // ENTRY.size,
        digest_of(directory),
        0,
        b"CASFSEND",
    )
    return data + head + directory + trailer


def real_delta() -> bytes:
    builder = DeltaBuilder()
    for label in (b"one", b"two"):
        data, entries = make_pack([label, label * 5])
        builder.add(DeltaPack(PackRef(PackId(digest_of(data)), False), len(data), entries))
    builder.removed.append(PACK)
    builder.replaced.append(DeltaName(5, bytes(32)))
    return builder.encode(7)[1]


REAL_NODES = [
    Node(b"dir", 2, 0o755, 0, 0, 1, 2, 3, 4, tree=TreeRef(b"\x04" * 32, 5, 300, 1)),
    Node(
        *(b"file", 1, 0o644, 1000, 100, 1, 2, 77, 2, 9, 2, True),
        EXTENT.pack(5, b"\x01" * 32) + EXTENT.pack(4, HOLE),
        0,
        b"\x02" * 32,
        None,
        NodeExtra(((b"user.a", b"v"),), 0, 2049, Capture(3, 3, b"\x03" * 32)),
    ),
    Node(b"link", 3, 0o777, 0, 0, 1, 2, 79, 1, 6, content=b"target"),
]
REAL_LEAF = encode_piece(Leaf(REAL_NODES))
REAL_BRANCH = encode_piece(
    Branch([PieceRef(name, TreeRef(b"\x05" * 32, 1024, 7, 0)) for name in (b"a", b"m")])
)
REAL_SNAPSHOT = Snapshot(
    root=Node(b"", 2, 0o755, 0, 0, 1, 2, 2, 3, tree=TreeRef(b"\x08" * 32, 1, 2, 0)),
    time_ns=1,
    host="host",
    user="me",
    paths=(b"/p",),
    tags=("t",),
    users=((0, "root"),),
    parent=b"\x01" * 32,
    stats=SnapshotStats(files=1),
)
REAL_CONFIG = RepositoryConfig(id="ab" * 32, created="now")
REAL_PACK, REAL_ENTRIES = make_pack([b"first", b"second" * 9, b""])
REAL_DELTA = real_delta()
REAL_FRAME = CODEC.encode_many([b"words and words and words " * 20])[0][1]


class TestRandomBytes:
    @CHEAP
    @given(st.binary(max_size=200))
    @example(b"\x92\x00\xdd\xff\xff\xff\xff")
    @example(b"\x91" * 5000)
    def test_every_parser_refuses_random_bytes(self, data: bytes) -> None:
        use_piece(data)
        use_pack(data)
        use_snapshot(data)
        use_delta(data)
        use_config(data)
        use_payload(data)
        use_content(data, 3)
        refuse_or(lambda: parse_records(data), TreeError)
        refuse_or(lambda: parse_header(PACK, data), PackError)
        refuse_or(lambda: parse_trailer(PACK, data[:64], len(data)), PackError)
        refuse_or(lambda: parse_directory(PACK, data, digest_of(data), 500), PackError)

    @CHEAP
    @given(st.binary(max_size=200))
    def test_every_parser_refuses_random_bytes_after_a_valid_beginning(self, data: bytes) -> None:
        use_piece(b"\x92\x00\x91\xdc\x00\x11" + data)
        use_piece(b"\x92\x01\x91\x92" + data)
        use_pack(REAL_PACK[: HEADER.size] + data + REAL_PACK[HEADER.size :])
        use_pack(REAL_PACK[: HEADER.size + PACK_RECORD.size] + data)
        for codec in (0, 1):
            use_snapshot(SNAPSHOT_HEADER.pack(MAGIC, 1, codec, 0, len(data)) + data)
        use_config(fitted_config(data))
        use_config(b"casfs repository, format 1\n" + data)
        use_payload(REAL_FRAME[:6] + data)
        for kept in (24, 48, 88, 176):
            use_delta(REAL_DELTA[:kept] + data)


class TestChangedBytes:
    @CHEAP
    @given(st.data())
    def test_changed_bytes_are_refused_or_parse_to_valid_values(self, data: st.DataObject) -> None:
        use_piece(data.draw(changed(REAL_LEAF)))
        use_piece(data.draw(changed(REAL_BRANCH)))
        use_pack(data.draw(changed(REAL_PACK)))
        use_payload(data.draw(changed(REAL_FRAME)))
        _, snapshot = encode_snapshot(REAL_SNAPSHOT, CODEC)
        use_snapshot(data.draw(changed(snapshot)))
        use_delta(data.draw(changed(REAL_DELTA)))
        use_config(data.draw(changed(encode_config(REAL_CONFIG))))

    @CHEAP
    @given(st.data())
    def test_changed_bytes_under_matching_digests_are_refused_or_valid(
        self, data: st.DataObject
    ) -> None:
        directory = b"".join(
            ENTRY.pack(e.digest, e.stored_bytes, e.plain_bytes, e.kind, e.codec, 0)
            for e in REAL_ENTRIES
        )
        blobs = REAL_PACK[: REAL_ENTRIES[-1].offset]
        use_pack(fitted_pack(blobs, data.draw(changed(directory))))
        body = msgspec.json.encode(REAL_CONFIG)
        use_config(fitted_config(data.draw(changed(body))))

    @given(st.data())
    def test_a_changed_payload_never_decodes_to_another_blob(self, data: st.DataObject) -> None:
        plain = b"words and words and words " * 20
        payload = data.draw(changed(REAL_FRAME))
        try:
            found = CODEC.decode(Digest(digest_of(plain)), 1, payload, len(plain))
        except IntegrityError:
            return
        assert found == plain


class TestReplacedFields:
    @CHEAP
    @given(st.data())
    def test_replaced_fields_of_a_tree_are_refused_or_valid(self, data: st.DataObject) -> None:
        for real in (REAL_LEAF, REAL_BRANCH):
            use_piece(msgspec.msgpack.encode(data.draw(replaced(msgspec.msgpack.decode(real)))))

    @CHEAP
    @given(st.data())
    def test_replaced_fields_of_a_snapshot_are_refused_or_valid(self, data: st.DataObject) -> None:
        known = msgspec.msgpack.decode(msgspec.msgpack.encode(REAL_SNAPSHOT))
        plain = msgspec.msgpack.encode(data.draw(replaced(known)))
        use_snapshot(SNAPSHOT_HEADER.pack(MAGIC, 1, 0, 0, len(plain)) + plain)

    @CHEAP
    @given(st.data())
    def test_replaced_fields_of_a_configuration_are_refused_or_valid(
        self, data: st.DataObject
    ) -> None:
        known = data.draw(replaced(msgspec.to_builtins(REAL_CONFIG)))
        use_config(fitted_config(msgspec.json.encode(known)))


def test_every_parser_accepts_a_valid_example() -> None:
    assert decode_piece(REAL_LEAF) == Leaf(REAL_NODES)
    assert isinstance(decode_piece(REAL_BRANCH), Branch)
    assert TestPackRoundTrip.parse(REAL_PACK) == REAL_ENTRIES
    name, data = encode_snapshot(REAL_SNAPSHOT, CODEC)
    assert decode_snapshot(name, data, CODEC) == REAL_SNAPSHOT
    delta = decode_delta(DeltaName(7, digest_of(REAL_DELTA)), REAL_DELTA)
    assert [len(pack.entries) for pack in delta.packs()] == [2, 2]
    assert decode_config(fitted_config(msgspec.json.encode(REAL_CONFIG)), "") == REAL_CONFIG
    with pytest.raises(IntegrityError):
        decode_piece(REAL_LEAF + b"\0")
