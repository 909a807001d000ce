"""Snapshots: a root node with metadata, in one small file named by the digest of its bytes.

See FORMAT.md, "Snapshots". The file has its own header and is compressed like a blob. A retagged snapshot is
a new snapshot that names the one it replaces. In an encrypted repository of format 2 it is signed.
"""

from __future__ import annotations

import math
import os
import struct
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from casfs.digest import SnapshotId, digest_of, short_id
from casfs.errors import BlobError, TreeError, UsageError
from casfs.format.codec import ENCRYPTED, MAX_PLAIN_BYTES, BlobCodec
from casfs.format.key_derivation import SALT_BYTES, SessionId, Sessions, WriteSession
from casfs.format.tree import Node, NodeType, check_node, storable_node

if TYPE_CHECKING:
    # An unencrypted repository does not need this import.
    from casfs.format.signature import Author, Signers, SigningKey

MAGIC = b"CASFSNAP"
HEADER = struct.Struct("<8sHBBI")
assert HEADER.size == 16
_ENVELOPE = struct.Struct("<32s32sqQQ")
assert _ENVELOPE.size == 88
_INNER = struct.Struct("<B3xI")
assert _INNER.size == 8
SNAPSHOT_VERSION = 1
SIGNED_VERSION = 2
"""The version of a snapshot with signatures, which is always encrypted."""

MAX_SNAPSHOT_BYTES = 32 * 1024 * 1024


class Envelope(NamedTuple):
    """The unencrypted header of an encrypted snapshot: its session, its time, and sizes in bytes.

    The sizes of a signed snapshot are rounded up (`padded_size`).
    """

    session: SessionId
    salt: bytes
    time_ns: int
    total_bytes: int
    new_stored_bytes: int


class SnapshotStats(msgspec.Struct, frozen=True):
    """Totals of a backup; sizes in bytes, `seconds` of wall time."""

    files: int = 0
    directories: int = 0
    others: int = 0
    unchanged: int = 0
    unreadable: int = 0
    vanished: int = 0
    silently_changed: int = 0
    new_blobs: int = 0
    new_plain_bytes: int = 0
    new_stored_bytes: int = 0
    seconds: float = 0.0


class Snapshot(msgspec.Struct, frozen=True):
    """A published snapshot.

    `time_ns` is nanoseconds since 1970. `paths` are the sources that it holds, as bytes. `users` and
    `groups` are the owners' names at the time of the backup, sorted by number. `directory` is the
    absolute directory that relative paths refer to; snapshots without any, and older ones, do not have
    it.
    """

    root: Node
    time_ns: int
    host: str
    user: str
    paths: tuple[bytes, ...]
    tags: tuple[str, ...] = ()
    users: tuple[tuple[int, str], ...] = ()
    groups: tuple[tuple[int, str], ...] = ()
    parent: bytes | None = None
    replaces: bytes | None = None
    program: str = ""
    stats: SnapshotStats = SnapshotStats()
    directory: bytes | msgspec.UnsetType = msgspec.UNSET


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Snapshot)


def encode_snapshot(
    snapshot: Snapshot,
    codec: BlobCodec,
    session: WriteSession | None = None,
    key: SigningKey | None = None,
    author: Author | None = None,
) -> tuple[SnapshotId, bytes]:
    """Return the snapshot's id and the bytes of its file, encrypted in `session` if given.

    With `key` it is signed: by its owner as the publisher, and by `author`, by default its owner too. Raise
    UsageError for a snapshot that readers would refuse: too many paths, text that is not Unicode, a time
    beyond 64 bits, or an invalid root.
    """
    _require_valid(snapshot)
    plain = _encode(snapshot, MAX_PLAIN_BYTES)
    ((kind, payload),) = codec.encode_many([plain])
    if session is None:
        data = HEADER.pack(MAGIC, SNAPSHOT_VERSION, kind, 0, len(plain)) + bytes(payload)
        return SnapshotId(digest_of(data)), data
    inner = _INNER.pack(kind, len(plain)) + bytes(payload)
    header, salt = _encrypted_header(snapshot, session, is_signed=key is not None)
    if key is not None:
        author = author or key.author_of(session.repository, plain)
        inner = key.encode_block(author, session.repository, header + inner) + inner
    from casfs.format.cipher import encrypt_snapshot

    data = header + encrypt_snapshot(session, salt, inner, header)
    return SnapshotId(digest_of(data)), data


def padded_size(size: int) -> int:
    """Return a size rounded up so that it reveals little: by at most 12 %, less for larger sizes.

    This is Padmé: Nikitin et al., "Reducing Metadata Leakage from Encrypted Files and Communication with
    PURBs", Proceedings on Privacy Enhancing Technologies 2019(4), algorithm 1.
    """
    if size < 2:
        return size
    exponent = size.bit_length() - 1
    zero_bits = exponent - exponent.bit_length()
    mask = (1 << zero_bits) - 1
    return (size + mask) & ~mask


def _require_valid(snapshot: Snapshot) -> None:
    try:
        check_node(snapshot.root)
    except TreeError as error:
        raise UsageError(f"the snapshot cannot be stored: its root is invalid ({error})") from error
    if snapshot.root.kind != NodeType.DIRECTORY:
        raise UsageError("the snapshot cannot be stored: its root is not a directory")
    if not -(1 << 63) <= snapshot.time_ns < 1 << 63:
        raise UsageError("the snapshot cannot be stored: its time does not fit into 64 bits")


def require_encodable(snapshot: Snapshot, room_bytes: int) -> None:
    """Raise UsageError if the snapshot plus `room_bytes` would exceed the size limit."""
    _encode(snapshot, MAX_PLAIN_BYTES - room_bytes)


def _encode(snapshot: Snapshot, max_bytes: int) -> bytes:
    try:
        root = storable_node(snapshot.root)
        plain = _encoder.encode(msgspec.structs.replace(snapshot, root=root))
    except UnicodeEncodeError as error:
        raise UsageError(f"the host, user or tag {error.object!r} is not UTF-8") from error
    if len(plain) > max_bytes:
        raise UsageError(
            f"the snapshot's paths and other metadata take {len(plain)} bytes; the limit is "
            f"{max_bytes}; name fewer paths"
        )
    return plain


def read_envelope(snapshot_id: SnapshotId, data: bytes) -> Envelope | None:
    """Return an encrypted snapshot's unencrypted header, None for a snapshot that is not encrypted.

    Raise TreeError when the data do not match the id.
    """
    kind, _ = _read_header(snapshot_id, data)
    if kind != ENCRYPTED:
        return None
    if len(data) < HEADER.size + _ENVELOPE.size:
        raise TreeError(f"snapshot {short_id(snapshot_id)} is damaged: too short")
    session, salt, *rest = _ENVELOPE.unpack_from(data, HEADER.size)
    return Envelope(SessionId(session), salt, *rest)


def decode_snapshot(
    snapshot_id: SnapshotId, data: bytes, codec: BlobCodec, sessions: Sessions | None = None
) -> Snapshot:
    """Parse a snapshot's file; raise TreeError when it does not match its id or breaks the format's rules.

    In an encrypted repository `sessions` provides the keys; its errors are passed on.
    """
    return decode_signed_snapshot(snapshot_id, data, codec, sessions)[0]


def decode_signed_snapshot(
    snapshot_id: SnapshotId, data: bytes, codec: BlobCodec, sessions: Sessions | None = None
) -> tuple[Snapshot, Signers | None]:
    """Parse a snapshot's file as `decode_snapshot`; return it with who signed it, None for no signature.

    Also raise TreeError where a signature does not match.
    """
    label = short_id(snapshot_id)
    kind, plain_bytes = _read_header(snapshot_id, data)
    payload = data[HEADER.size :]
    if (kind == ENCRYPTED) != (sessions is not None):
        is_not = "" if kind == ENCRYPTED else " not"
        raise TreeError(f"snapshot {label} is{is_not} encrypted, unlike its repository")
    signers = None
    try:
        if sessions is None:
            plain = codec.decompress(kind, payload, plain_bytes)
        else:
            plain, signers = _decrypted(snapshot_id, data, codec, sessions)
        snapshot = _decoder.decode(plain)
    except BlobError as error:
        raise TreeError(f"snapshot {label} is damaged: {error.reason}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise TreeError(f"snapshot {label} cannot be parsed: {error}") from error
    check_node(snapshot.root)
    if snapshot.root.kind != NodeType.DIRECTORY:
        raise TreeError(f"snapshot {label} is invalid: its root is not a directory")
    if not math.isfinite(snapshot.stats.seconds):
        raise TreeError(f"snapshot {label} is invalid: its duration is not a finite number")
    return snapshot, signers


def _read_header(snapshot_id: SnapshotId, data: bytes) -> tuple[int, int]:
    label = short_id(snapshot_id)
    if bytes(digest_of(data)) != snapshot_id:
        raise TreeError(f"snapshot {label} is damaged: digest mismatch")
    if len(data) < HEADER.size:
        raise TreeError(f"snapshot {label} is damaged: too short")
    magic, version, kind, _, plain_bytes = HEADER.unpack_from(data)
    is_known = version == SNAPSHOT_VERSION or (version == SIGNED_VERSION and kind == ENCRYPTED)
    if magic != MAGIC or not is_known or plain_bytes > MAX_PLAIN_BYTES:
        raise TreeError(f"snapshot {label} has an unsupported format; use a newer casfs")
    return kind, plain_bytes


def _encrypted_header(
    snapshot: Snapshot, session: WriteSession, is_signed: bool
) -> tuple[bytes, bytes]:
    """Return all bytes before an encrypted snapshot's payload, and their salt."""
    salt = os.urandom(SALT_BYTES)
    tree = snapshot.root.tree
    sizes = (tree.total_bytes if tree is not None else 0, snapshot.stats.new_stored_bytes)
    version = SNAPSHOT_VERSION
    if is_signed:
        version, sizes = SIGNED_VERSION, (padded_size(sizes[0]), padded_size(sizes[1]))
    header = HEADER.pack(MAGIC, version, ENCRYPTED, 0, 0)
    return header + _ENVELOPE.pack(session.id, salt, snapshot.time_ns, *sizes), salt


def _decrypted(
    snapshot_id: SnapshotId, data: bytes, codec: BlobCodec, sessions: Sessions
) -> tuple[bytes, Signers | None]:
    """Return an encrypted snapshot's msgpack map and who signed it; raise BlobError."""
    from casfs.format.cipher import decrypt_snapshot

    envelope = read_envelope(snapshot_id, data)
    assert envelope is not None
    end = HEADER.size + _ENVELOPE.size
    session = sessions.session(envelope.session)
    inner = decrypt_snapshot(session, envelope.salt, data[end:], data[:end])
    if HEADER.unpack_from(data)[1] != SIGNED_VERSION:
        return _decompressed(inner, codec), None
    from casfs.format.signature import BLOCK_BYTES, verify_block

    block, inner = inner[:BLOCK_BYTES], inner[BLOCK_BYTES:]
    plain = _decompressed(inner, codec)
    return plain, verify_block(block, session.repository, data[:end] + inner, plain)


def _decompressed(inner: bytes, codec: BlobCodec) -> bytes:
    if len(inner) < _INNER.size:
        raise BlobError(b"", "its decrypted payload is too short")
    kind, plain_bytes = _INNER.unpack_from(inner)
    return bytes(codec.decompress(kind, inner[_INNER.size :], plain_bytes))
