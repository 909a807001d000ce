"""Blobs: kinds, codecs, and the way between plaintext and the stored payload.

A payload is believed only after it was decoded under a cap and its digest recomputed. The compressor
and decompressor objects belong to one thread each; `BlobCodec` keeps them apart.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from enum import IntEnum
from typing import NamedTuple

import zstandard

from casfs.digest import Digest, keyed_digest
from casfs.errors import BlobError

MAX_PLAIN_BYTES = 16 * 1024 * 1024
"""No blob is larger; a recorded size above it is refused before anything is allocated."""

_SMALLEST_COMPRESSIBLE = 64
"""Shorter plaintexts stay raw: a zstd frame's header and block header eat what little there is."""


_PARALLEL_BYTES = 1024 * 1024
"""For less plaintext a thread of its own is not worth its making."""


class BlobKind(IntEnum):
    """What a blob is for; prune, check and encryption treat the kinds apart."""

    DATA = 1
    TREE = 2
    CONTENT = 3


class Codec(IntEnum):
    """How a payload was made of the plaintext."""

    RAW = 0
    ZSTD = 1


_RAW, _ZSTD = int(Codec.RAW), int(Codec.ZSTD)

ENCRYPTED = 16
"""Added to the codec of a payload that is encrypted; a record of one tells nothing more."""

TAG_BYTES = 16
"""What AES-GCM adds to what it encrypts."""


class Encoded(NamedTuple):
    """A payload as it stands in a pack at `offset`, with what is recorded of it."""

    digest: Digest
    offset: int
    codec: int
    payload: bytes
    plain_bytes: int


class BlobCodec:
    """Compress and restore payloads at one zstd level; safe to share between threads.

    `digest_key` keys the digests that are made here, where the repository is encrypted.
    """

    def __init__(self, level: int, digest_key: bytes | None = None) -> None:
        self._level = level
        self._digest_key = digest_key
        self._local = threading.local()

    def digest(self, plain: bytes | bytearray | memoryview) -> Digest:
        """Return the digest that names a blob of this plaintext."""
        return keyed_digest(plain, self._digest_key)

    def encode_many(self, plains: list[bytes]) -> list[tuple[Codec, bytes]]:
        """Compress a batch in one call, order kept; a payload that would not shrink stays raw.

        The interpreter lock is released once for the batch and not once for each blob.
        """
        payloads: list[tuple[Codec, bytes]] = [(Codec.RAW, plain) for plain in plains]
        wanted = [i for i, plain in enumerate(plains) if len(plain) >= _SMALLEST_COMPRESSIBLE]
        if not wanted:
            return payloads
        result = self._compressor().multi_compress_to_buffer([plains[i] for i in wanted])
        for position, i in enumerate(wanted):
            segment = result[position]
            if len(segment) < len(plains[i]):
                payloads[i] = (Codec.ZSTD, segment.tobytes())
        return payloads

    def decode(
        self,
        digest: Digest,
        codec: int,
        payload: bytes,
        plain_bytes: int,
        key: bytes | None = None,
    ) -> bytes:
        """Return the verified plaintext; `key` is that of the digest.

        Raises BlobError when the payload does not decode to exactly `plain_bytes` bytes of that digest.
        """
        plain = self._plain(digest, codec, payload, plain_bytes)
        if keyed_digest(plain, key) != digest:
            raise BlobError(digest, "digest mismatch")
        return plain

    def decode_many(self, wanted: Sequence[Encoded], threads: int = 1) -> list[bytes | None]:
        """Return the verified plaintexts of unkeyed blobs, None for each that `decode` would refuse.

        The interpreter lock is released once for the batch and not once for each blob. `threads` is how
        many may decompress a batch that is large.
        """
        plains = self._plain_many(wanted, threads)
        return [
            plain if plain is not None and keyed_digest(plain, None) == one.digest else None
            for plain, one in zip(plains, wanted, strict=True)
        ]

    def _plain_many(self, wanted: Sequence[Encoded], threads: int) -> list[bytes | None]:
        plains: list[bytes | None] = [None] * len(wanted)
        frames: list[int] = []
        for i, one in enumerate(wanted):
            if one.codec == _ZSTD and _is_single_frame(one.payload, one.plain_bytes):
                frames.append(i)
            elif one.codec == _RAW and len(one.payload) == one.plain_bytes:
                plains[i] = one.payload
        if not frames:
            return plains
        plain_bytes = [wanted[i].plain_bytes for i in frames]
        sizes = struct.pack(f"={len(frames)}Q", *plain_bytes)
        if sum(plain_bytes) < _PARALLEL_BYTES:
            threads = 1
        try:
            found = self._decompressor().multi_decompress_to_buffer(
                [wanted[i].payload for i in frames], decompressed_sizes=sizes, threads=threads
            )
        except zstandard.ZstdError:  # which of them it is is not told
            for i in frames:
                with suppress(BlobError):
                    one = wanted[i]
                    plains[i] = self._plain(one.digest, one.codec, one.payload, one.plain_bytes)
            return plains
        for position, i in enumerate(frames):
            plains[i] = found[position].tobytes()
        return plains

    def digest_payload(
        self, codec: int, payload: bytes, plain_bytes: int, key: bytes | None = None
    ) -> Digest:
        """Return the digest of a payload that was found without one; raises BlobError."""
        return keyed_digest(self.decompress(codec, payload, plain_bytes), key)

    def decompress(self, codec: int, payload: bytes, plain_bytes: int) -> bytes:
        """Return the plaintext of a payload that something else verifies; raises BlobError."""
        return self._plain(Digest(b""), codec, payload, plain_bytes)

    def _plain(self, digest: Digest, codec: int, payload: bytes, plain_bytes: int) -> bytes:
        if plain_bytes > MAX_PLAIN_BYTES:
            raise BlobError(digest, f"its recorded size of {plain_bytes} bytes is not allowed")
        if codec == Codec.RAW:
            plain = payload
        elif codec == Codec.ZSTD:
            plain = self._decompress(digest, payload, plain_bytes)
        else:
            raise BlobError(digest, f"its codec {codec} is not known to this version")
        if len(plain) != plain_bytes:
            raise BlobError(digest, f"it holds {len(plain)} bytes where {plain_bytes} are recorded")
        return plain

    def _decompress(self, digest: Digest, payload: bytes, plain_bytes: int) -> bytes:
        try:
            frame = zstandard.get_frame_parameters(payload)
            if frame.content_size != plain_bytes:
                raise BlobError(digest, "its compressed frame tells another size")
            if plain_bytes == 0:
                # The decompressor would not look at what follows.
                raise BlobError(digest, "nothing was compressed in it")
            plain: bytes = self._decompressor().decompress(
                payload, max_output_size=plain_bytes, allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            raise BlobError(digest, f"it does not decompress ({error})") from error
        return plain

    def _compressor(self) -> zstandard.ZstdCompressor:
        compressor: zstandard.ZstdCompressor | None = getattr(self._local, "compressor", None)
        if compressor is None:
            compressor = zstandard.ZstdCompressor(level=self._level)
            self._local.compressor = compressor
        return compressor

    def _decompressor(self) -> zstandard.ZstdDecompressor:
        decompressor: zstandard.ZstdDecompressor | None = getattr(self._local, "decompressor", None)
        if decompressor is None:
            decompressor = zstandard.ZstdDecompressor()
            self._local.decompressor = decompressor
        return decompressor


def _is_single_frame(payload: bytes, plain_bytes: int) -> bool:
    """Tell whether a payload is one frame and nothing else, of the size that is recorded and allowed."""
    try:
        told: int = zstandard.frame_content_size(payload)
        end = zstandard.frame_header_size(payload)
    except zstandard.ZstdError:
        return False
    if told != plain_bytes or not 0 < plain_bytes <= MAX_PLAIN_BYTES:
        return False
    # The decompressor of batches would not look at what follows: RFC 8878, 3.1.1.2 tells where blocks end.
    is_last = False
    while not is_last:
        header = int.from_bytes(payload[end : end + 3], "little")
        if end + 3 > len(payload):
            return False
        is_last = bool(header & 1)
        is_repeated_byte = header & 6 == 2
        end += 3 + (1 if is_repeated_byte else header >> 3)
    has_checksum = payload[4] & 4
    return end + (4 if has_checksum else 0) == len(payload)
