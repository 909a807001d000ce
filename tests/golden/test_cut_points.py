"""Cut points are part of the format: with others, nothing would deduplicate against what is stored."""

from __future__ import annotations

import hashlib

import pytest

from casfs.format.chunker import make_chunker
from casfs.format.config import KEYED_CHUNKER, ChunkerConfig


def noise(label: bytes, size: int) -> bytes:
    """Return bytes that look random and are the same on every machine and in every Python."""
    return hashlib.shake_128(label).digest(size)


def cut(data: bytes, config: ChunkerConfig, step: int, most_bytes: int | None) -> list[int]:
    """Return the lengths of the chunks, the data given in pieces of at most `step` bytes."""
    offset = 0

    def read_into(buffer: memoryview) -> int:
        nonlocal offset
        part = data[offset : offset + min(step, len(buffer))]
        buffer[: len(part)] = part
        offset += len(part)
        return len(part)

    chunks = list(make_chunker(config, KEY).cut(read_into, most_bytes))
    assert b"".join(chunks) == data
    return [len(chunk) for chunk in chunks]


DEFAULT = ChunkerConfig()
SMALL = ChunkerConfig(min_bytes=2048, avg_bytes=8192, max_bytes=32768)
SEEDED = ChunkerConfig(min_bytes=2048, avg_bytes=8192, max_bytes=32768, seed=0x1234_5678_9ABC_DEF0)
KEYED = ChunkerConfig(KEYED_CHUNKER, 2048, 8192, 32768)
KEY = bytes(range(32))

GOLDEN: dict[str, tuple[ChunkerConfig, bytes, list[int]]] = {
    "default": (
        DEFAULT,
        noise(b"casfs default", 7_000_000),
        [1538574, 1282767, 1227806, 1229945, 1042866, 331256, 346786],
    ),
    "small": (
        SMALL,
        noise(b"casfs small", 100_000),
        [8487, 15276, 9508, 9195, 14073, 10816, 4749, 9419, 11014, 7463],
    ),
    "seeded": (
        SEEDED,
        noise(b"casfs small", 100_000),
        [11034, 8542, 11546, 7646, 8728, 11647, 10764, 9970, 4193, 8855, 7075],
    ),
    "keyed": (
        KEYED,
        noise(b"casfs small", 100_000),
        [3923, 2048, 8268, 9524, 8682, 8966, 9429, 9523, 13829, 9504, 8383, 7921],
    ),
    "keyed default": (
        ChunkerConfig(KEYED_CHUNKER),
        noise(b"casfs default", 7_000_000),
        [1173612, 792994, 1345691, 724262, 955451, 1329948, 394912, 283130],
    ),
    "zeros": (DEFAULT, bytes(9_000_000), [4194304, 4194304, 611392]),
    "short": (DEFAULT, noise(b"casfs short", 262_144), [262_144]),
}


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("step", [1 << 22, 65_537])
@pytest.mark.parametrize("is_known", [True, False])
def test_golden_data_is_cut_at_its_recorded_points(name: str, step: int, is_known: bool) -> None:
    config, data, lengths = GOLDEN[name]
    assert cut(data, config, step, len(data) if is_known else None) == lengths
