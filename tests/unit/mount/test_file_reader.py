"""From an offset in a file to verified bytes: chunks, holes, damage, and one decode for many readers."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest
from casfs_mount.background import BackgroundPool
from casfs_mount.chunk_cache import ChunkCache
from casfs_mount.damage_log import UnreadableError
from casfs_mount.event_loop_guard import EventLoopGuard, WouldBlock
from casfs_mount.file_reader import FileReader

from casfs.digest import Digest, digest_of
from casfs.errors import BlobError, CasfsError, StorageError
from casfs.format.codec import MAX_PLAIN_BYTES, BlobKind
from casfs.format.tree import Node, replace
from casfs.trees.content import HOLE, ContentWriter
from tests.support.builders import entry


class ReadCase:
    """Blobs in memory that count how often each is read, and can fail or be held back."""

    def __init__(self) -> None:
        self.blobs: dict[bytes, bytes] = {}
        self.reads: Counter[bytes] = Counter()
        self.failing: dict[bytes, CasfsError] = {}
        self.gate: threading.Event | None = None
        self.guard = EventLoopGuard()

    def put(self, kind: BlobKind, digest: Digest, data: bytes) -> None:
        self.blobs[digest] = data

    def read(self, digest: Digest) -> bytes:
        self.guard.require_may_block()
        self.reads[digest] += 1
        if self.gate is not None:
            assert self.gate.wait(30)
        if digest in self.failing:
            raise self.failing[digest]
        return self.blobs[digest]

    def file(self, *parts: bytes | int) -> tuple[Node, bytes]:
        """Return the node and the content of a file of chunks and, for numbers, holes."""
        writer = ContentWriter(self.put, digest_of)
        whole = []
        for part in parts:
            if isinstance(part, int):
                writer.add(part, HOLE)
                whole.append(bytes(part))
            else:
                self.put(BlobKind.DATA, digest_of(part), part)
                writer.add(len(part), digest_of(part))
                whole.append(part)
        content, levels = writer.finish()
        data = b"".join(whole)
        return entry(b"file", size=len(data), content=content, levels=levels), data

    def cache(
        self, limit_bytes: int = 1 << 20, clock: Callable[[], float] = time.monotonic
    ) -> ChunkCache:
        return ChunkCache(self.read, self.guard, BackgroundPool(), limit_bytes, clock=clock)

    def reader(self, node: Node, cache: ChunkCache | None = None) -> FileReader:
        self.damage: list[tuple[int, int, CasfsError]] = []
        return FileReader(node, cache or self.cache(), lambda *found: self.damage.append(found))


def chunks(count: int, size: int, seed: int = 5) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(size + rng.randrange(size)) for _ in range(count)]


class TestFileReader:
    def test_a_read_of_any_range_returns_the_bytes_of_the_file(self) -> None:
        case = ReadCase()
        node, whole = case.file(b"first", 1000, *chunks(5, 300), 7, b"x" * 50, 5000)
        reader = case.reader(node)
        rng = random.Random(1)
        for _ in range(500):
            offset = rng.randrange(len(whole) + 10)
            size = rng.choice([1, 10, 600, len(whole) * 2])
            assert b"".join(reader.read(offset, size)) == whole[offset : offset + size]

    def test_a_read_through_nested_content_lists_is_correct(self) -> None:
        case = ReadCase()
        node, whole = case.file(*chunks(3000, 4))
        assert node.levels >= 1
        reader = case.reader(node)
        rng = random.Random(2)
        for _ in range(300):
            offset = rng.randrange(len(whole))
            assert b"".join(reader.read(offset, 40)) == whole[offset : offset + 40]
        assert b"".join(reader.read(0, len(whole))) == whole

    def test_a_read_inside_one_chunk_copies_nothing(self) -> None:
        case = ReadCase()
        (data,) = chunks(1, 1000)
        node, _ = case.file(data)
        cache = case.cache()
        (found,) = case.reader(node, cache).read(10, 20)
        assert found.obj is case.blobs[digest_of(data)]

    def test_a_read_of_a_huge_hole_needs_memory_for_the_answer_only(self) -> None:
        case = ReadCase()
        node, _ = case.file(b"island")
        writer = ContentWriter(case.put, digest_of)
        writer.add(6, digest_of(b"island"))
        writer.add(1 << 50, HOLE)
        content, levels = writer.finish()
        huge = replace(node, size=(1 << 50) + 6, content=content, levels=levels)
        reader = case.reader(huge)
        assert b"".join(reader.read(1 << 49, 3 << 20)) == bytes(3 << 20)
        assert b"".join(reader.read(3, 6)) == b"and\0\0\0"
        assert b"".join(reader.read((1 << 50) + 5, 100)) == b"\0"

    def test_a_read_at_or_behind_the_end_returns_nothing(self) -> None:
        case = ReadCase()
        node, whole = case.file(b"abc")
        empty, _ = case.file()
        assert b"".join(case.reader(node).read(len(whole), 5)) == b""
        assert b"".join(case.reader(node).read(1 << 60, 5)) == b""
        assert b"".join(case.reader(empty).read(0, 5)) == b""

    def test_a_sequential_read_has_the_next_chunks_decoded_ahead(self) -> None:
        case = ReadCase()
        data = chunks(20, 60_000)
        node, whole = case.file(*data)
        cache = case.cache(64 << 20)
        reader = case.reader(node, cache)
        reader.read(0, 4096)
        assert case.reads.total() == 1, "a first read alone is no sequence"
        reader.read(4096, 4096)
        deadline = threading.Event()
        for _ in range(1000):
            if cache.holds(digest_of(data[1])) and cache.holds(digest_of(data[2])):
                break
            deadline.wait(0.01)
        else:
            pytest.fail("nothing was decoded ahead")
        assert b"".join(reader.read(0, len(whole))) == whole
        assert set(case.reads.values()) == {1}

    def test_a_random_read_decodes_nothing_ahead(self) -> None:
        case = ReadCase()
        data = chunks(30, 600_000)
        node, _ = case.file(*data)
        reader = case.reader(node, case.cache(64 << 20))
        for i in (20, 28, 7):
            reader.read(sum(map(len, data[:i])), 4096)
        assert case.reads.total() == 3

    def test_a_read_of_a_whole_file_at_once_takes_no_room_in_the_cache(self) -> None:
        case = ReadCase()
        node, whole = case.file(b"small")
        cache = case.cache()
        assert b"".join(case.reader(node, cache).read(0, 4096)) == whole
        assert cache.cached_bytes == 0
        assert b"".join(case.reader(node, cache).read(0, 3)) == b"sma"
        assert cache.cached_bytes > 0

    def test_a_small_file_of_one_chunk_is_at_hand_as_a_whole(self) -> None:
        case = ReadCase()
        node, whole = case.file(b"small")
        cache = case.cache()
        assert case.reader(node, cache).whole(5) == whole
        assert cache.cached_bytes == 0
        assert case.reader(node, cache).whole(4) is None, "it is larger than asked for"

    def test_a_file_of_several_chunks_or_with_a_hole_is_not_at_hand_as_a_whole(self) -> None:
        case = ReadCase()
        for parts in ((b"two", b"chunks"), (b"hole", 4096), (4096,)):
            node, _ = case.file(*parts)
            assert case.reader(node).whole(1 << 20) is None
        assert case.reads.total() == 0


class TestDamagedFile:
    def test_a_damaged_file_is_not_at_hand_and_the_read_reports_the_damage(self) -> None:
        case = ReadCase()
        node, _ = case.file(b"content")
        bad = digest_of(b"content")
        case.failing[bad] = BlobError(bad, "digest mismatch", b"p" * 32)
        reader = case.reader(node)
        assert reader.whole(1 << 20) is None
        assert case.damage == []
        with pytest.raises(UnreadableError):
            reader.read(0, 7)
        assert len(case.damage) == 1

    def test_a_file_with_another_length_than_recorded_is_not_at_hand(self) -> None:
        case = ReadCase()
        node, _ = case.file(b"content")
        case.blobs[digest_of(b"content")] = b"other length"
        assert case.reader(node).whole(1 << 20) is None

    def test_a_damaged_chunk_fails_its_own_range_only(self) -> None:
        case = ReadCase()
        data = chunks(3, 1000)
        node, whole = case.file(*data)
        bad = digest_of(data[1])
        case.failing[bad] = BlobError(bad, "digest mismatch", b"p" * 32)
        reader = case.reader(node)
        begin, end = len(data[0]), len(data[0]) + len(data[1])
        assert b"".join(reader.read(0, begin)) == whole[:begin]
        assert b"".join(reader.read(end, len(whole))) == whole[end:]
        for offset, size in ((begin, 1), (begin - 1, 2), (end - 1, 5), (0, len(whole))):
            with pytest.raises(UnreadableError):
                reader.read(offset, size)
        assert {(found[0], found[1]) for found in case.damage} == {(begin, len(data[1]))}

    def test_a_damaged_chunk_is_not_decoded_again_for_every_page(self) -> None:
        case = ReadCase()
        (data,) = chunks(1, 100_000)
        node, _ = case.file(data)
        bad = digest_of(data)
        case.failing[bad] = BlobError(bad, "its pack is missing")
        reader = case.reader(node)
        for page in range(20):
            with pytest.raises(UnreadableError):
                reader.read(page * 4096, 4096)
        assert case.reads[bad] == 1

    def test_a_disk_error_ends_when_the_disk_recovers(self) -> None:
        case = ReadCase()
        node, whole = case.file(b"content")
        bad = digest_of(b"content")
        now = 100.0
        case.failing[bad] = StorageError("read", "pack", OSError(5, "Input/output error"))
        reader = case.reader(node, case.cache(clock=lambda: now))
        with pytest.raises(UnreadableError):
            reader.read(0, 10)
        case.failing.clear()
        now += 60
        assert b"".join(reader.read(0, 10)) == whole

    def test_a_damaged_content_list_is_an_error(self) -> None:
        case = ReadCase()
        node, _ = case.file(*chunks(3000, 4))
        top = node.content[8:40]
        case.failing[top] = BlobError(Digest(top), "it is missing: no pack holds it")
        with pytest.raises(UnreadableError):
            case.reader(node).read(0, 10)

    @pytest.mark.parametrize("recorded", [3, 5])
    def test_a_wrong_recorded_length_is_an_error(self, recorded: int) -> None:
        case = ReadCase()
        case.put(BlobKind.DATA, digest_of(b"four"), b"four")
        writer = ContentWriter(case.put, digest_of)
        writer.add(recorded, digest_of(b"four"))
        node = entry(b"f", size=recorded, content=writer.finish()[0])
        with pytest.raises(UnreadableError, match="recorded"):
            case.reader(node).read(0, 10)

    def test_a_size_that_the_chunks_do_not_have_is_an_error(self) -> None:
        case = ReadCase()
        node, _ = case.file(b"some bytes")
        with pytest.raises(UnreadableError, match="do not add up to its recorded size"):
            case.reader(replace(node, size=1 << 40)).read(0, 10)

    def test_an_impossible_chunk_size_is_refused_unread(self) -> None:
        case = ReadCase()
        writer = ContentWriter(case.put, digest_of)
        writer.add(MAX_PLAIN_BYTES + 1, digest_of(b"x"))
        node = entry(b"f", size=MAX_PLAIN_BYTES + 1, content=writer.finish()[0])
        with pytest.raises(UnreadableError, match="larger than the format allows"):
            case.reader(node).read(0, 10)
        assert case.reads.total() == 0


class TestEventLoopThread:
    def test_the_event_loop_gets_a_chunk_after_a_worker_has_decoded_it(self) -> None:
        case = ReadCase()
        node, whole = case.file(*chunks(3, 1000))
        cache = case.cache()
        reader = case.reader(node, cache)
        case.guard.bind()
        with pytest.raises(WouldBlock):
            reader.read(0, 10)
        assert case.damage == []
        small, _ = case.file(b"small")
        assert case.reader(small, cache).whole(1 << 20) is None
        other = threading.Thread(target=lambda: reader.read(0, len(whole)))
        other.start()
        other.join()
        assert b"".join(reader.read(0, len(whole))) == whole

    def test_the_event_loop_does_not_wait_for_a_thread_that_is_decoding(self) -> None:
        case = ReadCase()
        node, _ = case.file(b"slow")
        cache = case.cache()
        case.gate = threading.Event()
        other = threading.Thread(target=lambda: cache.get(digest_of(b"slow")))
        other.start()
        while not case.reads:
            pass
        case.guard.bind()
        with pytest.raises(WouldBlock):
            case.reader(node, cache).read(0, 4)
        case.gate.set()
        other.join()
        assert b"".join(case.reader(node, cache).read(0, 4)) == b"slow"
        assert case.reads.total() == 1


class TestChunkCache:
    def test_the_chunk_cache_decodes_a_chunk_once_for_many_readers(self) -> None:
        case = ReadCase()
        (data,) = chunks(1, 1000)
        case.put(BlobKind.DATA, digest_of(data), data)
        cache = case.cache()
        case.gate = threading.Event()
        found: list[bytes] = []
        threads = [
            threading.Thread(target=lambda: found.append(cache.get(digest_of(data))))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        while not case.reads:
            pass
        case.gate.set()
        for thread in threads:
            thread.join()
        assert found == [data] * 8
        assert case.reads.total() == 1

    def test_the_chunk_cache_reports_a_failure_to_every_reader(self) -> None:
        case = ReadCase()
        bad = digest_of(b"bad")
        case.failing[bad] = BlobError(bad, "decompression failed")
        cache = case.cache()
        case.gate = threading.Event()
        reported: list[str] = []

        def ask() -> None:
            try:
                cache.get(bad)
            except BlobError as error:
                reported.append(error.reason)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        while not case.reads:
            pass
        case.gate.set()
        for thread in threads:
            thread.join()
        assert reported == ["decompression failed"] * 4

    def test_the_chunk_cache_stays_in_its_bounds_and_keeps_what_is_used(self) -> None:
        case = ReadCase()
        data = chunks(50, 10_000)
        for chunk in data:
            case.put(BlobKind.DATA, digest_of(chunk), chunk)
        cache = case.cache(100_000)
        for chunk in data:
            cache.get(digest_of(chunk))
            cache.get(digest_of(data[0]))
            assert cache.cached_bytes <= 100_000
        assert case.reads[digest_of(data[0])] == 1

    def test_the_chunk_cache_serves_a_chunk_larger_than_itself(self) -> None:
        case = ReadCase()
        node, whole = case.file(*chunks(4, 10_000))
        assert b"".join(case.reader(node, case.cache(100)).read(0, 1 << 20)) == whole


def test_a_failing_background_task_does_not_end_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    background = BackgroundPool()
    done = threading.Event()

    def fail() -> None:
        raise StorageError("read", "pack", OSError(5, "Input/output error"))

    for _ in range(4):
        background.submit(fail)
    assert background.submit(done.set)
    assert done.wait(30)
    assert background.close(30)
    assert not background.submit(done.set)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
