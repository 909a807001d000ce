"""Blobs: kinds, codecs, and the conversion between plaintext and stored payload.

A plaintext is returned only after it was decoded under a size limit and its digest recomputed, except by
`decompress`. Each compressor and decompressor belongs to one thread; `BlobCodec` keeps one per thread.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import zstandard

from casfs.digest import Digest, keyed_digest
from casfs.errors import BlobError
from casfs.format.group import MAX_GROUP_BYTES, Group

MAX_PLAIN_BYTES = 16 * 1024 * 1024
"""The largest blob. A larger recorded size is refused before anything is allocated."""

_SMALLEST_COMPRESSIBLE = 64
"""Shorter plaintexts stay raw, because the zstd frame and block headers outweigh the savings."""


_SAMPLED_BYTES = 128 * 1024
_SAMPLES = 16
_SAMPLE_BYTES = 1024
_SAMPLE_LEVEL = 1
_INCOMPRESSIBLE_SHARE = 0.98
"""Of a plaintext of at least so many bytes, samples of so many bytes are compressed at this level. If more
than this share of them is left, the plaintext is stored raw."""

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
    GROUP = 2
    """A zstd frame of several blobs (`casfs.format.group`)."""


_RAW, _ZSTD, _GROUP = int(Codec.RAW), int(Codec.ZSTD), int(Codec.GROUP)

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
    position: int = 0


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

    def looks_incompressible(self, plain: bytes) -> bool:
        """Return whether samples of a plaintext do not compress; False for a short one."""
        if len(plain) < _SAMPLED_BYTES:
            return False
        step = len(plain) // _SAMPLES
        begins = range(0, step * _SAMPLES, step)
        sample = b"".join([plain[begin : begin + _SAMPLE_BYTES] for begin in begins])
        return len(self._sampler().compress(sample)) > _INCOMPRESSIBLE_SHARE * len(sample)

    def open_group(
        self,
        digest: Digest,
        payload: bytes,
        plain_bytes: int | None = None,
        key: bytes | None = None,
    ) -> Group:
        """Return the group in a payload, whose plaintext has `plain_bytes` bytes if that is recorded.

        `key` is that of the digests of its blobs. Raise BlobError for `digest`.
        """
        try:
            size: int = zstandard.get_frame_parameters(payload).content_size
        except zstandard.ZstdError as error:
            raise BlobError(digest, f"decompression failed ({error})") from error
        if size > MAX_GROUP_BYTES or plain_bytes not in (None, size):
            raise BlobError(digest, "its group has another size than recorded, or is too large")
        try:
            return Group(self._decompress(digest, payload, size), key)
        except BlobError as error:
            raise BlobError(digest, error.reason) from error

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
        plains: list[bytes | None] = []
        for part in _parts(wanted):
            decoded = self._decompress_many(part.frames, threads)
            groups: dict[int, Group] = {}
            for one, number in part.blobs:
                plain = one.payload if one.codec == _RAW else decoded.get(number)
                if one.codec == _GROUP:
                    plains.append(_grouped_blob(one, number, plain, groups))
                elif plain is None or len(plain) != one.plain_bytes:
                    plains.append(None)
                else:
                    plains.append(plain if keyed_digest(plain, None) == one.digest else None)
        return plains

    def _decompress_many(self, frames: list[tuple[bytes, int]], threads: int) -> dict[int, bytes]:
        """Return what frames decode to, by their position; a frame that does not decode is left out.

        `frames` are the payloads and the sizes of their plaintexts in bytes.
        """
        if not frames:
            return {}
        plain_bytes = [size for _, size in frames]
        if sum(plain_bytes) < _PARALLEL_BYTES:
            threads = 1
        try:
            found = self._decompressor().multi_decompress_to_buffer(
                [payload for payload, _ in frames],
                decompressed_sizes=struct.pack(f"={len(frames)}Q", *plain_bytes),
                threads=threads,
            )
        except zstandard.ZstdError:  # the error does not identify the damaged frame
            plains = {}
            for number, (payload, size) in enumerate(frames):
                with suppress(BlobError):
                    plains[number] = self._decompress(Digest(b""), payload, size)
            return plains
        return {number: found[number].tobytes() for number in range(len(frames))}

    def digest_payload(
        self, codec: int, payload: bytes, plain_bytes: int, key: bytes | None = None
    ) -> list[tuple[Digest, int]]:
        """Return the digest and the size in bytes of each blob in a payload.

        `plain_bytes` is the size of its plaintext. Raise BlobError when the payload does not decode.
        """
        if codec == Codec.GROUP:
            return self.open_group(Digest(b""), payload, plain_bytes, key).digests()
        return [(keyed_digest(self.decompress(codec, payload, plain_bytes), key), plain_bytes)]

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

    def _sampler(self) -> zstandard.ZstdCompressor:
        sampler: zstandard.ZstdCompressor | None = getattr(self._local, "sampler", None)
        if sampler is None:
            sampler = self._local.sampler = zstandard.ZstdCompressor(level=_SAMPLE_LEVEL)
        return sampler

    def _decompressor(self) -> zstandard.ZstdDecompressor:
        decompressor: zstandard.ZstdDecompressor | None = getattr(self._local, "decompressor", None)
        if decompressor is None:
            decompressor = zstandard.ZstdDecompressor()
            self._local.decompressor = decompressor
        return decompressor


@dataclass(slots=True)
class _Part:
    """Payloads that are decoded together.

    `frames` are the distinct frames, each with the size of its plaintext in bytes, and `blobs` the payloads,
    each with the number of its frame, -1 if it has none. The blobs of a group have one frame.
    """

    frames: list[tuple[bytes, int]] = field(default_factory=list)
    blobs: list[tuple[Encoded, int]] = field(default_factory=list)


def _parts(wanted: Sequence[Encoded]) -> Iterator[_Part]:
    """Yield payloads in parts whose decoded frames have a bounded size.

    A group may be much larger than the blobs that are wanted of it. A payload that is not one frame of the
    recorded size has no frame.
    """
    part, plain_bytes = _Part(), 0
    groups: dict[int, int] = {}
    for one in wanted:
        number = groups.get(one.offset, -1) if one.codec == _GROUP else -1
        if number < 0 and one.codec in (_ZSTD, _GROUP):
            size = _single_frame_bytes(one.payload)
            is_right = size <= MAX_GROUP_BYTES if one.codec == _GROUP else size == one.plain_bytes
            if is_right and 0 < size <= MAX_PLAIN_BYTES:
                if plain_bytes + size > MAX_PLAIN_BYTES:
                    yield part
                    part, plain_bytes, groups = _Part(), 0, {}
                number = len(part.frames)
                part.frames.append((one.payload, size))
                plain_bytes += size
                if one.codec == _GROUP:
                    groups[one.offset] = number
        part.blobs.append((one, number))
    yield part


def _grouped_blob(
    one: Encoded, number: int, plain: bytes | None, groups: dict[int, Group]
) -> bytes | None:
    """Return the verified plaintext of a blob in the group with a plaintext, None if either is damaged."""
    if plain is None:
        return None
    try:
        if number not in groups:
            groups[number] = Group(plain)
        return groups[number].blob(one.digest, one.position, one.plain_bytes)
    except BlobError:
        return None


def _single_frame_bytes(payload: bytes) -> int:
    """Return the plaintext size that a payload of exactly one frame records; -1 for any other payload."""
    try:
        frame_bytes: int = zstandard.frame_content_size(payload)
        end = zstandard.frame_header_size(payload)
    except zstandard.ZstdError:
        return -1
    # The batch decompressor would ignore trailing bytes; RFC 8878, 3.1.1.2 defines where blocks end.
    is_last = False
    while not is_last:
        header = int.from_bytes(payload[end : end + 3], "little")
        if end + 3 > len(payload):
            return -1
        is_last = bool(header & 1)
        is_repeated_byte = header & 6 == 2
        end += 3 + (1 if is_repeated_byte else header >> 3)
    has_checksum = payload[4] & 4
    return frame_bytes if end + (4 if has_checksum else 0) == len(payload) else -1
