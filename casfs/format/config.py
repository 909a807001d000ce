"""The repository's configuration: a small text file (FORMAT.md, "Configuration").

The first line contains the format version, so that every version of casfs can name it. The last line is the
BLAKE3 of all bytes before it. It is written once, and once more by an upgrade, which changes the two lines.
"""

from __future__ import annotations

import os
import re

import msgspec

from casfs.digest import digest_of
from casfs.errors import FormatError, IntegrityError, NotFoundError
from casfs.format.versions import DEFAULT_FORMAT, NEWEST_FORMAT, OLDEST_FORMAT
from casfs.json_document import InvalidJsonError, parse_json

CONFIG_NAME = "config"
MAX_CONFIG_BYTES = 1 << 20
CIPHER = "aes-256-gcm"
"""The only cipher for packs and snapshots."""

PLAIN_CHUNKER = "fastcdc-2020"
KEYED_CHUNKER = "fastcdc-2020-keyed"
"""The chunkers; the keyed one is that of encrypted repositories that were created with format 2."""

_MAX_CHUNK_BYTES = 16 * 1024 * 1024

_FIRST_LINE = re.compile(rb"casfs repository, format (\d{1,9})\n")
_ID = re.compile(r"[0-9a-f]{64}")
_LAST_LINE = re.compile(rb"blake3 ([0-9a-f]{64})\n\Z")


class ChunkerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of FastCDC 2020, sizes in bytes; they never change during a repository's life."""

    algorithm: str = PLAIN_CHUNKER
    min_bytes: int = 256 * 1024
    avg_bytes: int = 1024 * 1024
    max_bytes: int = 4 * 1024 * 1024
    normalization: int = 1
    seed: int = 0


class EncryptionConfig(msgspec.Struct, frozen=True):
    """A repository's encryption: the ids of the session that was created with it and of its own domain."""

    cipher: str = ""
    session: str = ""
    domain: str = ""


class RepositoryConfig(msgspec.Struct, frozen=True):
    """The settings fixed when the repository was created.

    `tree_seed` seeds the split points of large directories. In an encrypted repository that seed and the
    chunker's seed are secret, and both fields are 0. `format` is the number in the first line and no field of
    the JSON object.
    """

    id: str
    created: str
    chunker: ChunkerConfig = ChunkerConfig()
    tree_seed: int = 0
    encryption: EncryptionConfig | None = None
    format: int = OLDEST_FORMAT

    @property
    def separates_metadata(self) -> bool:
        """Whether a writer stores trees and content lists in packs of their own."""
        return self.format >= 2

    @property
    def has_deltas(self) -> bool:
        """Whether a writer publishes index deltas."""
        return self.format >= 2

    @property
    def signs_snapshots(self) -> bool:
        """Whether machines sign their snapshots: in an encrypted repository of format 2."""
        return self.encryption is not None and self.format >= 2

    @property
    def counts_xattrs(self) -> bool:
        """Whether a writer counts the entries with extended attributes in the references to trees."""
        return self.format >= 2


def new_config(created: str, format_: int = DEFAULT_FORMAT) -> RepositoryConfig:
    """Return the configuration of a new repository with a random id."""
    return RepositoryConfig(id=os.urandom(32).hex(), created=created, format=format_)


def encode_config(config: RepositoryConfig) -> bytes:
    """Return the bytes of the configuration file."""
    fields = msgspec.structs.asdict(config)
    del fields["format"]
    body = msgspec.json.format(msgspec.json.encode(fields), indent=2)
    return _framed(config.format, body + b"\n")


def with_format(data: bytes, format_: int) -> bytes:
    """Return the bytes of an intact configuration file with another format number.

    Only the first line and the digest in the last line differ.
    """
    first, last = _FIRST_LINE.match(data), _LAST_LINE.search(data)
    assert first is not None and last is not None
    return _framed(format_, data[first.end() : last.start()])


def _framed(format_: int, body: bytes) -> bytes:
    text = b"casfs repository, format %d\n%s" % (format_, body)
    return text + b"blake3 %s\n" % digest_of(text).hex().encode()


def decode_config(data: bytes, place: str) -> RepositoryConfig:
    """Parse the bytes of the configuration file; errors name `place`.

    Raise NotFoundError when the file belongs to another program, FormatError for another format version, and
    IntegrityError for a damaged file.
    """
    first = _FIRST_LINE.match(data)
    if first is None:
        raise NotFoundError(
            f"{place} is not a casfs repository, or the first line of its file `config` is damaged"
        )
    version = int(first.group(1))
    if not OLDEST_FORMAT <= version <= NEWEST_FORMAT:
        raise FormatError(
            f"{place} has repository format {version}; this casfs reads formats {OLDEST_FORMAT} to "
            f"{NEWEST_FORMAT}: use a newer casfs"
        )
    last = _LAST_LINE.search(data)
    if last is None or digest_of(data[: last.start()]).hex().encode() != last.group(1):
        raise IntegrityError(
            f"the configuration {place} is damaged: digest mismatch; restore it from a copy"
        )
    try:
        config = parse_json(data[first.end() : last.start()], RepositoryConfig)
    except InvalidJsonError as error:
        raise IntegrityError(f"the configuration {place} is damaged: {error}") from error
    if config.encryption is not None and not _is_supported(config.encryption):
        raise FormatError(
            f"{place} uses an encryption that this casfs does not support; use a newer casfs"
        )
    if not _ID.fullmatch(config.id):
        raise IntegrityError(
            f"the configuration {place} is damaged: its id is not 64 hexadecimal digits"
        )
    is_keyed = config.chunker.algorithm == KEYED_CHUNKER
    if not _is_usable(config.chunker) or (is_keyed and config.encryption is None):
        raise FormatError(
            f"{place} uses a chunker that this casfs does not support; use a newer casfs"
        )
    return msgspec.structs.replace(config, format=version)


def _is_supported(encryption: EncryptionConfig) -> bool:
    ids = (encryption.session, encryption.domain)
    return encryption.cipher == CIPHER and all(map(_ID.fullmatch, ids))


def _is_usable(chunker: ChunkerConfig) -> bool:
    return (
        chunker.algorithm in (PLAIN_CHUNKER, KEYED_CHUNKER)
        and 64 <= chunker.min_bytes <= chunker.avg_bytes <= chunker.max_bytes <= _MAX_CHUNK_BYTES
        and 0 <= chunker.normalization <= 3
        and 0 <= chunker.seed < 1 << 63
    )
