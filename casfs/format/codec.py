"""Blobs: kinds, codecs, and the conversion between plaintext and stored payload.

A plaintext is returned only after it was decoded under a size limit and its digest recomputed, except by
`decompress`. Each compressor and decompressor belongs to one thread; `BlobCodec` keeps one per thread.
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
"""The largest blob. A larger recorded size is refused before anything is allocated."""

_SMALLEST_COMPRESSIBLE = 64
"""Shorter plaintexts stay raw, because the zstd frame and block headers outweigh the savings."""


_PARALLEL_BYTES = 1024 * 1024
"""For less plaintext a second thread costs more than it saves."""


class BlobKind(IntEnum):
    """The purpose of a blob. Prune, check and encryption treat the kinds differently."""

    DATA = 1
    TREE = 2
    CONTENT = 3


class Codec(IntEnum):
    """The encoding of a payload."""

    RAW = 0
    ZSTD = 1


_RAW, _ZSTD = int(Codec.RAW), int(Codec.ZSTD)

ENCRYPTED = 16
"""Added to the codec of an encrypted payload.

The record header of such a payload contains only this value.
"""

TAG_BYTES = 16
"""The bytes that AES-GCM adds to a plaintext."""


class Encoded(NamedTuple):
    """A payload as stored in a pack at `offset`, with the fields of its directory entry."""

    digest: Digest
    offset: int
    codec: int
    payload: bytes
    plain_bytes: int


class BlobCodec:
    """Compresses and decompresses payloads at one zstd level. Threads may share it.

    In an encrypted repository `digest_key` keys the digests that `digest` computes.
    """

    def __init__(self, level: int, digest_key: bytes | None = None) -> None:
        self._level = level
        self._digest_key = digest_key
        self._local = threading.local()

    def digest(self, plain: bytes | bytearray | memoryview) -> Digest:
        """Return the digest that names a blob with this plaintext."""
        return keyed_digest(plain, self._digest_key)

    def encode_many(self, plains: list[bytes]) -> list[tuple[Codec, bytes]]:
        """Compress a batch in one call, in order; a payload that does not shrink stays raw.

        The interpreter lock is released once for the batch instead of once for each blob.
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
        """Return the verified plaintext; `key` is the digest's key.

        Raise BlobError when the payload does not decode to exactly `plain_bytes` bytes with that digest.
        """
        plain = self._plain(digest, codec, payload, plain_bytes)
        if keyed_digest(plain, key) != digest:
            raise BlobError(digest, "digest mismatch")
        return plain

    def decode_many(self, wanted: Sequence[Encoded], threads: int = 1) -> list[bytes | None]:
        """Return the verified plaintexts of unkeyed blobs, None for each that `decode` would refuse.

        The interpreter lock is released once for the batch instead of once for each blob. `threads` is the
        number of threads that may decompress a large batch.
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
        except zstandard.ZstdError:  # the error does not identify the damaged frame
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
        """Return the digest of a payload's plaintext; raise BlobError when the payload does not decode."""
        return keyed_digest(self.decompress(codec, payload, plain_bytes), key)

    def decompress(self, codec: int, payload: bytes, plain_bytes: int) -> bytes:
        """Return the plaintext of a payload that the caller verifies in another way; raise BlobError."""
        return self._plain(Digest(b""), codec, payload, plain_bytes)

    def _plain(self, digest: Digest, codec: int, payload: bytes, plain_bytes: int) -> bytes:
        if plain_bytes > MAX_PLAIN_BYTES:
            raise BlobError(digest, f"its recorded size of {plain_bytes} bytes is above the limit")
        if codec == Codec.RAW:
            plain = payload
        elif codec == Codec.ZSTD:
            plain = self._decompress(digest, payload, plain_bytes)
        else:
            raise BlobError(digest, f"unknown codec {codec}; use a newer casfs")
        if len(plain) != plain_bytes:
            raise BlobError(
                digest, f"it has {len(plain)} bytes instead of the recorded {plain_bytes}"
            )
        return plain

    def _decompress(self, digest: Digest, payload: bytes, plain_bytes: int) -> bytes:
        try:
            frame = zstandard.get_frame_parameters(payload)
            if frame.content_size != plain_bytes:
                raise BlobError(digest, "its zstd frame has another size than recorded")
            if plain_bytes == 0:
                # The decompressor would ignore bytes after an empty frame.
                raise BlobError(digest, "its zstd frame is empty")
            plain: bytes = self._decompressor().decompress(
                payload, max_output_size=plain_bytes, allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            raise BlobError(digest, f"decompression failed ({error})") from error
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
    """Return whether a payload is exactly one frame with the recorded size, which is within the limit."""
    try:
        frame_bytes: int = zstandard.frame_content_size(payload)
        end = zstandard.frame_header_size(payload)
    except zstandard.ZstdError:
        return False
    if frame_bytes != plain_bytes or not 0 < plain_bytes <= MAX_PLAIN_BYTES:
        return False
    # The batch decompressor would ignore trailing bytes; RFC 8878, 3.1.1.2 defines where blocks end.
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
