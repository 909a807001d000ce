"""Cutting: the same bytes have the same cuts, however they arrive, and a change stays local."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import msgspec
import pytest

from casfs.format.chunker import Chunker, make_chunker
from casfs.format.config import KEYED_CHUNKER, PLAIN_CHUNKER, ChunkerConfig
from tests.support.stores import noise

SMALL = ChunkerConfig(min_bytes=1024, avg_bytes=4096, max_bytes=16384)


KEYED = msgspec.structs.replace(SMALL, algorithm=KEYED_CHUNKER)
KEY = bytes(range(32))


@pytest.fixture(params=[PLAIN_CHUNKER, KEYED_CHUNKER])
def chunker(request: pytest.FixtureRequest) -> Chunker:
    return make_chunker(msgspec.structs.replace(SMALL, algorithm=request.param), KEY)


def arriving(data: bytes, sizes: Callable[[], int]) -> Callable[[memoryview], int]:
    """Return a reader that gives the data in pieces of these sizes."""
    done = 0

    def read_into(buffer: memoryview) -> int:
        nonlocal done
        piece = data[done : done + min(len(buffer), sizes())]
        buffer[: len(piece)] = piece
        done += len(piece)
        return len(piece)

    return read_into


def cut(chunker: Chunker, data: bytes) -> list[bytes]:
    return list(chunker.cut(arriving(data, lambda: 1 << 20)))


def test_the_chunks_are_the_data_in_order(chunker: Chunker) -> None:
    for size in (0, 1, 1023, 1024, 1025, 16384, 16385, 1_000_000):
        data = noise("chunks", size)
        assert b"".join(cut(chunker, data)) == data


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_is_cut_where_its_bytes_would_be_however_they_arrive(
    chunker: Chunker, seed: int
) -> None:
    data = noise("stream", 600_000)
    sizes = random.Random(seed)
    stream = arriving(data, lambda: sizes.choice([1, 7, 500, 4096, 100_000]))
    assert list(chunker.cut(stream)) == cut(chunker, data)


@pytest.mark.parametrize("size", [0, 1, 262_143, 262_144, 262_145, 6_000_000, 9_000_000])
@pytest.mark.parametrize("more", [0, 1, 1_000_000])
@pytest.mark.parametrize("algorithm", [PLAIN_CHUNKER, KEYED_CHUNKER])
def test_a_bound_on_the_stream_changes_no_cut(size: int, more: int, algorithm: str) -> None:
    chunker = make_chunker(ChunkerConfig(algorithm=algorithm), KEY)
    data = noise("both ways", size)
    bounded = chunker.cut(arriving(data, lambda: 70_000), size + more)
    assert list(bounded) == cut(chunker, data)


def test_nothing_is_read_beyond_the_bound(chunker: Chunker) -> None:
    data = noise("beyond", 10_000)
    assert b"".join(chunker.cut(arriving(data, lambda: 1 << 20), 7000)) == data[:7000]


def test_chunks_are_within_the_bounds(chunker: Chunker) -> None:
    for data in (noise("bounds", 500_000), bytes(500_000), b"ab" * 250_000):
        sizes = [len(chunk) for chunk in cut(chunker, data)]
        assert all(SMALL.min_bytes <= size <= SMALL.max_bytes for size in sizes[:-1])
        assert sizes[-1] <= SMALL.max_bytes


@pytest.mark.parametrize("algorithm", [PLAIN_CHUNKER, KEYED_CHUNKER])
def test_a_file_of_at_most_the_minimum_is_one_chunk(algorithm: str) -> None:
    chunker = make_chunker(ChunkerConfig(algorithm=algorithm), KEY)
    assert chunker.min_bytes == 262_144
    for size in (1, 262_143, 262_144):
        assert [len(chunk) for chunk in cut(chunker, noise("one", size))] == [size]


def test_an_insertion_changes_the_chunks_around_it_and_no_others(chunker: Chunker) -> None:
    data = noise("insertion", 1_000_000)
    before = cut(chunker, data)
    changed = cut(chunker, data[:500_000] + b"!" + data[500_000:])
    assert 0 < len(set(changed) - set(before)) <= 4


def test_another_seed_cuts_elsewhere() -> None:
    data = noise("seed", 500_000)
    first = set(cut(Chunker(SMALL), data))
    other = ChunkerConfig(min_bytes=1024, avg_bytes=4096, max_bytes=16384, seed=1)
    assert len(first & set(cut(Chunker(other), data))) <= 1


def test_a_chunk_may_be_kept_while_the_next_is_cut(chunker: Chunker) -> None:
    data = noise("kept", 300_000)
    kept = list(chunker.cut(arriving(data, lambda: 1000)))
    assert all(type(chunk) is bytes for chunk in kept)
    assert b"".join(kept) == data


def test_an_error_of_the_reader_comes_through(chunker: Chunker) -> None:
    def fail(buffer: memoryview) -> int:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        list(chunker.cut(fail))


def test_another_key_cuts_elsewhere() -> None:
    data = noise("keys", 1_000_000)
    first = set(cut(make_chunker(KEYED, KEY), data))
    second = set(cut(make_chunker(KEYED, bytes(32)), data))
    assert len(first & second) <= len(first) // 10


def test_the_secret_seed_has_no_effect_on_keyed_cuts() -> None:
    """The cut points of a known file reveal the seed, and so nothing may depend on it."""
    data = noise("seed", 300_000)
    seeded = msgspec.structs.replace(KEYED, seed=0x1234_5678_9ABC_DEF0)
    assert cut(make_chunker(seeded, KEY), data) == cut(make_chunker(KEYED, KEY), data)


def test_every_keyed_cut_is_one_of_the_ends_that_can_be_computed_without_the_key() -> None:
    """So the cut points of a known file reveal only how the key chose among its ends."""
    data = noise("ends", 500_000)
    pieces = cut(make_chunker(ChunkerConfig(min_bytes=128, avg_bytes=512, max_bytes=1024)), data)
    ends = set(itertools.accumulate(map(len, pieces)))
    cuts = list(itertools.accumulate(map(len, cut(make_chunker(KEYED, KEY), data))))
    assert set(cuts) <= ends
    assert len(cuts) < len(ends) // 4


@pytest.mark.parametrize("algorithm", [PLAIN_CHUNKER, KEYED_CHUNKER])
def test_the_mean_size_is_a_quarter_above_the_nominal_average(algorithm: str) -> None:
    config = ChunkerConfig(algorithm, 2048, 8192, 32768)
    data = noise("mean", 4_000_000)
    mean = len(data) / len(cut(make_chunker(config, KEY), data))
    assert 1.1 < mean / config.avg_bytes < 1.4


def test_a_keyed_chunker_needs_its_key() -> None:
    with pytest.raises(ValueError, match="needs its key"):
        make_chunker(KEYED)


def test_chunks_are_within_the_most_where_all_bounds_are_equal() -> None:
    config = ChunkerConfig(KEYED_CHUNKER, 4096, 4096, 4096)
    sizes = [len(chunk) for chunk in cut(make_chunker(config, KEY), noise("equal", 200_000))]
    assert max(sizes) <= 4096
