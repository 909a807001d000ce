"""The repository's configuration: a small text file that is written once (FORMAT.md, "Configuration").

The first line tells the format, so that any version can say what it found; the last line is the
BLAKE3 of all bytes before it.
"""

from __future__ import annotations

import re
import secrets

import msgspec

from casfs.digest import digest_of
from casfs.errors import FormatError, IntegrityError, NotFoundError

FORMAT_VERSION = 1
CONFIG_NAME = "config"
MAX_CONFIG_BYTES = 1 << 20
CIPHER = "aes-256-gcm"
"""How packs and snapshots are encrypted, and the only way that there is so far."""

_MAX_CHUNK_BYTES = 16 * 1024 * 1024

_FIRST_LINE = re.compile(rb"casfs repository, format (\d{1,9})\n")
_ID = re.compile(r"[0-9a-f]{64}")
_LAST_LINE = re.compile(rb"blake3 ([0-9a-f]{64})\n\Z")


class ChunkerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of FastCDC 2020, sizes in bytes; they never change in a repository's life."""

    algorithm: str = "fastcdc-2020"
    min_bytes: int = 256 * 1024
    avg_bytes: int = 1024 * 1024
    max_bytes: int = 4 * 1024 * 1024
    normalization: int = 1
    seed: int = 0


class EncryptionConfig(msgspec.Struct, frozen=True):
    """How a repository is encrypted: the session that was made with it, and its own domain, both by id."""

    cipher: str = ""
    session: str = ""
    domain: str = ""


class RepositoryConfig(msgspec.Struct, frozen=True):
    """What was decided when the repository was made.

    `tree_seed` seeds the places where big directories are split; where the repository is encrypted, that
    and the chunker's seed are secret, and 0 stands here.
    """

    id: str
    created: str
    chunker: ChunkerConfig = ChunkerConfig()
    tree_seed: int = 0
    encryption: EncryptionConfig | None = None


def new_config(created: str) -> RepositoryConfig:
    """Return the configuration of a new repository with a random id."""
    return RepositoryConfig(id=secrets.token_hex(32), created=created)


def encode_config(config: RepositoryConfig) -> bytes:
    """Return the file's bytes."""
    body = msgspec.json.format(msgspec.json.encode(config), indent=2)
    text = b"casfs repository, format %d\n%s\n" % (FORMAT_VERSION, body)
    return text + b"blake3 %s\n" % digest_of(text).hex().encode()


def decode_config(data: bytes, place: str) -> RepositoryConfig:
    """Parse the file's bytes; `place` is named in errors.

    Raises NotFoundError where another program's file stands, FormatError for a format of another
    version and IntegrityError for a damaged file.
    """
    first = _FIRST_LINE.match(data)
    if first is None:
        raise NotFoundError(
            f"{place} is not a casfs repository, or the first line of its file `config` is damaged"
        )
    version = int(first.group(1))
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{place} has repository format {version}; this casfs reads format {FORMAT_VERSION}: "
            "use a newer casfs"
        )
    last = _LAST_LINE.search(data)
    if last is None or digest_of(data[: last.start()]).hex().encode() != last.group(1):
        raise IntegrityError(
            f"the configuration {place} is damaged: its digest does not fit; restore it from a copy"
        )
    try:
        config = msgspec.json.decode(data[first.end() : last.start()], type=RepositoryConfig)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityError(f"the configuration {place} is damaged: {error}") from error
    if config.encryption is not None and not _is_known(config.encryption):
        raise FormatError(
            f"{place} is encrypted in a way that this casfs does not know: use a newer casfs"
        )
    if not _ID.fullmatch(config.id):
        raise IntegrityError(f"the configuration {place} is damaged: its id is none")
    if not _is_usable(config.chunker):
        raise FormatError(f"{place} has a chunker that this casfs does not know: use a newer casfs")
    return config


def _is_known(encryption: EncryptionConfig) -> bool:
    ids = (encryption.session, encryption.domain)
    return encryption.cipher == CIPHER and all(map(_ID.fullmatch, ids))


def _is_usable(chunker: ChunkerConfig) -> bool:
    return (
        chunker.algorithm == "fastcdc-2020"
        and 64 <= chunker.min_bytes <= chunker.avg_bytes <= chunker.max_bytes <= _MAX_CHUNK_BYTES
        and 0 <= chunker.normalization <= 3
        and 0 <= chunker.seed < 1 << 63
    )
