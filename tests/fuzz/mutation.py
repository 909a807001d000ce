"""Random changes of real inputs, the same ones for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

_NUMBERS = [
    bytes(4),
    bytes(8),
    b"\xff" * 4,
    b"\xff" * 8,
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\x00\x00\x01\x00",
    b"\x80",
]
_TEXTS = [
    b"9" * 5000,
    b"[" * 2000,
    b'{"a":' * 1500,
    b"\x91" * 2000,
    b"-1",
    b"1e999",
    b"nan",
    b"\xc2\xb2",
    b"\xd9\xa3",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"0001-01-01T00:00:00+23:59",
    b"9999-12-31T23:59:59-23:59",
    b"\r\n",
    b"\0",
    b"..",
    b"/",
    b"null",
]
"""What often breaks parsers: long numbers, deep nesting, odd digits, times at the ends of the calendar."""


def mutations(seeds: Sequence[bytes], count: int, dice: random.Random) -> Iterator[bytes]:
    """Yield `count` inputs: every seed as it is, then changed ones."""
    yield from seeds[:count]
    for _ in range(count - len(seeds)):
        data = bytearray(dice.choice(seeds))
        for _ in range(dice.choice((1, 1, 2, 4))):
            _change(data, seeds, dice)
        yield bytes(data)


def _change(data: bytearray, seeds: Sequence[bytes], dice: random.Random) -> None:
    at = dice.randrange(len(data) + 1)
    kind = dice.randrange(7)
    if kind == 0 and at < len(data):
        data[at] ^= 1 << dice.randrange(8)
    elif kind == 1 and at < len(data):
        data[at] = dice.randrange(256)
    elif kind == 2:
        data[at : at + dice.choice((1, 2, 8, 64))] = b""
    elif kind == 3:
        number = dice.choice(_NUMBERS)
        data[at : at + len(number)] = number
    elif kind == 4:
        data[at : at + dice.choice((0, 0, 1, 8))] = dice.choice(_TEXTS)
    elif kind == 5:
        other = dice.choice(seeds)
        begin = dice.randrange(len(other) + 1)
        data[at:] = other[begin:]
    else:
        piece = bytes(data[at : at + dice.choice((1, 8, 44))])
        data[at:at] = piece * dice.choice((1, 2, 30))


def blown_up(seed: bytes, size_bytes: int) -> Iterator[bytes]:
    """Yield long inputs that are like a seed: it, its lines and its middle again and again."""
    if not seed:
        return
    third = len(seed) // 3
    for head, piece, tail in (
        (b"", seed, b""),
        (seed[:third], seed[third : third + 16] or seed, seed[third:]),
        (seed[:-1], seed[-1:], b""),
        (seed, b"[", b""),
        (seed[: len(seed) // 2], b'{"":', b""),
        (b"", b"\x91", seed),
    ):
        yield head + piece * (size_bytes // len(piece)) + tail
