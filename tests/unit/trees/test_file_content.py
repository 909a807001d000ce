"""A file that is one chunk: the digest of the chunk is that of the file, and is computed once."""

from __future__ import annotations

from typing import Any

import pytest

from casfs.digest import Digest, digest_of
from casfs.format.codec import MAX_PLAIN_BYTES
from casfs.trees.content import EXTENT, HOLE
from casfs.trees.file_content import read_only_chunk
from tests.support.builders import entry, file

DATA = b"the only chunk"
ONLY = EXTENT.pack(len(DATA), digest_of(DATA))


def refuse(digest: Digest) -> bytes:
    raise AssertionError(f"{digest.hex()} was read")


def test_the_only_chunk_of_a_file_is_its_content() -> None:
    assert read_only_chunk(file(b"f", DATA), {digest_of(DATA): DATA}.__getitem__) == DATA


@pytest.mark.parametrize(
    "fields",
    [
        {"captured": digest_of(b"other")},
        {"levels": 1},
        {"content": ONLY * 2},
        {"content": b""},
        {"content": EXTENT.pack(len(DATA), HOLE)},
        {"size": len(DATA) + 1},
        {
            "size": MAX_PLAIN_BYTES + 1,
            "content": EXTENT.pack(MAX_PLAIN_BYTES + 1, digest_of(DATA)),
        },
    ],
    ids=["captured", "levels", "chunks", "empty", "hole", "size", "too large"],
)
def test_a_file_that_is_more_than_one_chunk_is_not_read(fields: dict[str, Any]) -> None:
    known: dict[str, Any] = {"size": len(DATA), "content": ONLY}
    assert read_only_chunk(entry(b"f", **(known | fields)), refuse) is None


def test_a_chunk_of_another_length_than_recorded_is_not_the_content() -> None:
    assert read_only_chunk(file(b"f", DATA), lambda _: DATA[:-1]) is None
