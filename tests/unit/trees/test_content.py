"""Content lists: every byte of a file is found, and one changed chunk rewrites one piece a level."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace

import pytest

from casfs.digest import Digest, digest_of
from casfs.errors import BlobError, TreeError
from casfs.format.codec import MAX_PLAIN_BYTES, BlobKind
from casfs.format.tree import MAX_FILE_BYTES
from casfs.trees.content import (
    EXTENT,
    FORMAT_SPLIT,
    HOLE,
    MAX_INLINE_RECORDS,
    ContentReader,
    ContentSplit,
    ContentWriter,
    Extent,
    check_chunk_length,
    parse_records,
)
from tests.support.stores import MemoryBlobs

MANY = 100_000
Records = Sequence[tuple[int, bytes]]


SMALL = ContentSplit(inline_records=2, min_records=2, max_records=4)
"""Lists so small that a few hundred records have lists of lists."""


def write(
    memory: MemoryBlobs, records: Records, split: ContentSplit = FORMAT_SPLIT
) -> tuple[bytes, int]:
    writer = ContentWriter(memory.put, digest_of, split=split)
    for length, digest in records:
        writer.add(length, digest)
    return writer.finish()


def reader_of(
    memory: MemoryBlobs, records: Records, split: ContentSplit = FORMAT_SPLIT
) -> ContentReader:
    return ContentReader(*write(memory, records, split), memory.read)


def extents_of(records: Records) -> list[Extent]:
    """Return the expected extents, computed by the simplest means."""
    begin, found = 0, []
    for length, digest in records:
        found.append(Extent(begin, length, None if digest == HOLE else Digest(digest)))
        begin += length
    return found


def random_records(count: int, seed: int = 0) -> list[tuple[int, bytes]]:
    numbers = random.Random(seed)
    return [
        (numbers.randint(1, 4 << 20), HOLE if numbers.random() < 0.01 else numbers.randbytes(32))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def many() -> list[tuple[int, bytes]]:
    """The chunks of a file of some 200 GB."""
    return random_records(MANY)


@pytest.fixture
def memory() -> MemoryBlobs:
    return MemoryBlobs()


class TestShortContentList:
    @pytest.mark.parametrize("count", [0, 1, 2, MAX_INLINE_RECORDS])
    def test_a_short_content_list_is_stored_in_the_node(
        self, memory: MemoryBlobs, count: int
    ) -> None:
        records = random_records(count)
        content, levels = write(memory, records)
        assert levels == 0
        assert content == b"".join(EXTENT.pack(*record) for record in records)
        assert memory.blobs == {}
        assert list(ContentReader(content, 0, memory.read).extents()) == extents_of(records)

    def test_a_content_list_one_record_longer_becomes_a_blob(self, memory: MemoryBlobs) -> None:
        records = random_records(MAX_INLINE_RECORDS + 1)
        content, levels = write(memory, records)
        assert (len(content), levels) == (EXTENT.size, 1)
        assert memory.kinds == {BlobKind.CONTENT: 1}
        assert list(memory.blobs.values()) == [b"".join(EXTENT.pack(*r) for r in records)]
        assert EXTENT.unpack(content)[0] == sum(length for length, _ in records)


class TestLongContentList:
    def test_a_long_content_list_is_read_as_it_was_written(
        self, memory: MemoryBlobs, many: Records
    ) -> None:
        content, levels = write(memory, many)
        assert levels == 2
        assert len(content) <= MAX_INLINE_RECORDS * EXTENT.size
        assert list(ContentReader(content, levels, memory.read).extents()) == extents_of(many)

    def test_pieces_of_a_content_list_are_within_the_bounds(
        self, memory: MemoryBlobs, many: Records
    ) -> None:
        content, _ = write(memory, many)
        upper = [memory.read(Digest(digest)) for _, digest in parse_records(content)]
        lower = [
            len(memory.read(Digest(digest))) // EXTENT.size
            for piece in upper
            for _, digest in parse_records(piece)
        ]
        assert sum(lower) == MANY
        assert all(256 <= count <= 8192 for count in lower[:-1])
        assert 900 < MANY / len(lower) < 1800

    @pytest.mark.parametrize("position", [0, 1, MANY // 2, MANY - 1])
    def test_one_changed_chunk_rewrites_one_piece_a_level(
        self, memory: MemoryBlobs, many: Records, position: int
    ) -> None:
        write(memory, many)
        before = len(memory.blobs)
        changed = list(many)
        changed[position] = (1234, b"\x07" * 32)
        content, levels = write(memory, changed)
        assert levels == 2
        assert len(memory.blobs) - before == 2
        reader = ContentReader(content, levels, memory.read)
        assert list(reader.extents()) == extents_of(changed)

    def test_added_or_removed_chunks_rewrite_few_pieces(
        self, memory: MemoryBlobs, many: Records
    ) -> None:
        write(memory, many)
        for changed in (
            [*many[:40_000], (5, b"\x08" * 32), *many[40_000:]],
            [*many[:40_000], *many[40_003:]],
            [*many, (5, b"\x09" * 32)],
        ):
            before = len(memory.blobs)
            write(memory, changed)
            assert len(memory.blobs) - before == 2

    def test_a_content_list_of_one_repeated_chunk_is_split(self, memory: MemoryBlobs) -> None:
        records = [(4 << 20, b"\x01" * 32)] * 20_000
        assert list(reader_of(memory, records).extents()) == extents_of(records)
        assert max(map(len, memory.blobs.values())) == 8192 * EXTENT.size

    def test_a_content_list_of_holes_is_split(self, memory: MemoryBlobs) -> None:
        records = [(4096, HOLE), (4096, b"\x01" * 31 + b"\x02")] * 10_000
        assert list(reader_of(memory, records).extents()) == extents_of(records)

    def test_writing_a_content_list_needs_memory_for_one_piece_a_level(self, many: Records) -> None:
        sizes: list[int] = []
        tracemalloc.start()
        try:
            writer = ContentWriter(lambda kind, digest, data: sizes.append(len(data)), digest_of)
            for length, digest in many:
                writer.add(length, digest)
            writer.finish()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert sum(sizes) > MANY * EXTENT.size
        assert peak < 2_000_000


class TestContentListLevels:
    """Lists of lists of lists, which take petabytes unless pieces are made small."""

    @pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 8, 9, 33, 64, 65, 300])
    def test_a_content_list_of_any_number_of_levels_is_read_from_any_offset(
        self, memory: MemoryBlobs, count: int
    ) -> None:
        records = random_records(count, seed=count)
        reader, extents = reader_of(memory, records, SMALL), extents_of(records)
        assert list(reader.extents()) == extents
        end = sum(length for length, _ in records)
        offsets = {0, 1, end - 1} | {extent.begin for extent in extents}
        for offset in sorted(offset for offset in offsets if 0 <= offset < end):
            first = next(reader.extents(offset))
            assert first.begin <= offset < first.begin + first.length
            assert list(reader.extents(offset)) == extents[extents.index(first) :]
        assert list(reader.extents(end)) == []
        assert list(reader.extents(end + 5)) == []

    def test_reading_from_an_offset_reads_only_the_lists_that_lead_there(
        self, memory: MemoryBlobs
    ) -> None:
        records = random_records(1000)
        reader = reader_of(memory, records, SMALL)
        memory.reads.clear()
        middle = extents_of(records)[500]
        assert next(reader.extents(middle.begin + 1)) == middle
        assert len(memory.reads) <= 8

    def test_a_content_list_yields_its_blobs_with_lists_before_their_content(
        self, memory: MemoryBlobs
    ) -> None:
        records = random_records(300)
        content, levels = write(memory, records, SMALL)
        reported = list(ContentReader(content, levels, memory.read).blobs())
        chunks = [digest for digest in reported if digest not in memory.blobs]
        assert chunks == [digest for _, digest in records if digest != HOLE]
        assert {digest for digest in reported if digest in memory.blobs} == set(memory.blobs)
        assert reported.index(parse_records(content)[0][1]) == 0  # type: ignore[arg-type]

    def test_a_content_list_beyond_the_level_bound_is_refused(self, memory: MemoryBlobs) -> None:
        split = replace(SMALL, max_levels=3)
        assert write(memory, [(1, b"\x01" * 32)] * 4**3, split)[1] == 3
        with pytest.raises(TreeError, match="more chunks than the format can list"):
            write(memory, [(1, b"\x01" * 32)] * 4**5, split)


class TestHostileContentList:
    def list_blob(self, memory: MemoryBlobs, *records: tuple[int, bytes]) -> bytes:
        return memory.keep(b"".join(EXTENT.pack(*record) for record in records))

    def test_a_wrong_length_of_a_content_list_is_refused(self, memory: MemoryBlobs) -> None:
        digest = self.list_blob(memory, (10, b"\x01" * 32), (20, b"\x02" * 32))
        for reported in (29, 31, 1 << 40):
            reader = ContentReader(EXTENT.pack(reported, digest), 1, memory.read)
            with pytest.raises(TreeError, match="another length than recorded"):
                list(reader.extents())

    @pytest.mark.parametrize("size", [1, 39, 41, 79])
    def test_a_broken_record_is_refused(self, memory: MemoryBlobs, size: int) -> None:
        with pytest.raises(TreeError, match="invalid size"):
            parse_records(bytes(size))
        digest = memory.keep(b"\x01" * size)
        with pytest.raises(TreeError):
            list(ContentReader(EXTENT.pack(5, digest), 1, memory.read).extents())
        with pytest.raises(TreeError):
            list(ContentReader(EXTENT.pack(5, digest), 1, memory.read).blobs())

    def test_an_empty_extent_is_refused(self) -> None:
        with pytest.raises(TreeError, match="empty extent"):
            parse_records(EXTENT.pack(5, b"\x01" * 32) + EXTENT.pack(0, b"\x01" * 32))

    def test_an_impossible_file_size_is_refused(self) -> None:
        half = EXTENT.pack(MAX_FILE_BYTES // 2 + 1, b"\x01" * 32)
        assert len(parse_records(half)) == 1
        with pytest.raises(TreeError, match="invalid file size"):
            parse_records(half * 2)
        with pytest.raises(TreeError, match="invalid file size"):
            parse_records(EXTENT.pack((1 << 64) - 1, HOLE))

    def test_an_empty_content_list_is_refused(self, memory: MemoryBlobs) -> None:
        reader = ContentReader(EXTENT.pack(5, memory.keep(b"")), 1, memory.read)
        with pytest.raises(TreeError):
            list(reader.extents())

    def test_a_hole_in_place_of_a_content_list_is_refused(self, memory: MemoryBlobs) -> None:
        reader = ContentReader(EXTENT.pack(5, HOLE), 1, memory.read)
        with pytest.raises(BlobError):
            list(reader.extents())

    def test_a_wrong_number_of_levels_is_an_error_and_gives_no_wrong_bytes(
        self, memory: MemoryBlobs
    ) -> None:
        chunk = memory.keep(b"the bytes of a chunk")
        with pytest.raises(TreeError):
            list(ContentReader(EXTENT.pack(20, chunk), 1, memory.read).extents())

    def test_a_chunk_larger_than_any_blob_is_refused(self) -> None:
        check_chunk_length(Extent(0, MAX_PLAIN_BYTES, digest_of(b"")))
        check_chunk_length(Extent(0, 1 << 60, None))
        with pytest.raises(TreeError, match="invalid chunk size"):
            check_chunk_length(Extent(0, MAX_PLAIN_BYTES + 1, digest_of(b"")))


class TestLostContentList:
    """A lost list costs only the bytes that it lists, where the caller asks for the rest."""

    def test_a_lost_content_list_becomes_one_lost_extent(
        self, memory: MemoryBlobs, many: Records
    ) -> None:
        content, levels = write(memory, many)
        records = parse_records(content)
        (_, top), whole = records[0], extents_of(many)
        lower = parse_records(memory.read(Digest(top)))
        length, lost = lower[3]
        begin = sum(size for size, _ in lower[:3])
        memory.blobs[Digest(lost)] = b"\x01" * 39
        reader = ContentReader(content, levels, memory.read)
        with pytest.raises(TreeError):
            list(reader.extents())
        found = list(reader.extents(lost_lists=True))
        assert [extent for extent in found if extent.lost] == [
            Extent(begin, length, Digest(lost), lost=True)
        ]
        intact = [e for e in whole if e.begin + e.length <= begin or e.begin >= begin + length]
        assert [extent for extent in found if not extent.lost] == intact

    def test_a_lost_top_list_becomes_one_lost_extent_of_the_whole_file(
        self, memory: MemoryBlobs
    ) -> None:
        records = random_records(100)
        content, levels = write(memory, records)
        memory.blobs.clear()
        (extent,) = ContentReader(content, levels, memory.read).extents(lost_lists=True)
        assert extent.lost
        assert (extent.begin, extent.length) == (0, sum(length for length, _ in records))
