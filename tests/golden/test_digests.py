"""Digests are plain BLAKE3-256: the vectors that its authors published, and what `b3sum` prints."""

from __future__ import annotations

import pytest

from casfs.digest import EMPTY_DIGEST, SHOWN_HEX_DIGITS, digest_of, short_id
from casfs.format.codec import BlobCodec

# From the published test vectors: the input is the bytes 0 to 250, again and again.
PUBLISHED = {
    0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    1: "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
    1023: "10108970eeda3eb932baac1428c7a2163b0e924c9a9e25b35bba72b28f70bd11",
    1024: "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7",
    1025: "d00278ae47eb27b34faecf67b4fe263f82d5412916c1ffd97c8cb7fb814b8444",
    2048: "e776b6028c7cd22a4d0ba182a8bf62205d2ef576467e838ed6f2529b85fba24a",
    31744: "62b6960e1a44bcc1eb1a611a8d6235b6b4b78f32e7abc4fb4c6cdcce94895c47",
    102400: "bc3e3d41a1146b069abffad3c0d44860cf664390afce4d9661f7902e7943e085",
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_blake3_vectors_are_reproduced(size: int) -> None:
    data = (bytes(range(251)) * (size // 251 + 1))[:size]
    assert digest_of(data).hex() == PUBLISHED[size]
    assert BlobCodec(3).digest(data) == digest_of(data)


def test_the_digest_of_nothing_is_the_constant_that_empty_files_have() -> None:
    assert EMPTY_DIGEST.hex() == PUBLISHED[0]


def test_the_digest_of_a_word_is_that_of_other_blake3_tools() -> None:
    abc = "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
    assert digest_of(b"abc").hex() == abc
    assert short_id(digest_of(b"abc")) == abc[:SHOWN_HEX_DIGITS] == "6437b3ac3846"
