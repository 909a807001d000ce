"""Write sessions and dedup domains: the secrets of an encrypted repository, and all keys derived from them.

A write session is one writer's run: a fresh secret from which the keys of its packs and snapshots are
derived. A dedup domain is the secret that keys blob digests and seeds the chunker and the directory splits,
so that a writer recognizes blobs that it stored before; it decrypts nothing. A process that decrypts a
session gets both (FORMAT.md, "Encryption").

Values are immutable; threads may share them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType, Protocol

from blake3 import blake3

from casfs.digest import short_id
from casfs.format.config import ChunkerConfig

SessionId = NewType("SessionId", bytes)
DomainId = NewType("DomainId", bytes)

SECRET_BYTES = 32
SALT_BYTES = 32
MAX_DOMAINS = 1 << 16


class KeyContext:
    """The contexts of BLAKE3's key derivation, one for each purpose; they are part of the format."""

    SESSION_ID = "casfs 2026-11-23 session id"
    DOMAIN_ID = "casfs 2026-11-23 domain id"
    PACK_KEY = "casfs 2026-11-23 pack key"
    SNAPSHOT_KEY = "casfs 2026-11-23 snapshot key"
    DELTA_KEY = "casfs 2026-11-23 delta key"
    DIGEST_KEY = "casfs 2026-11-23 digest key"
    CHUNKER_SEED = "casfs 2026-11-23 chunker seed"
    CHUNKER_KEY = "casfs 2026-11-23 chunker key"
    TREE_SEED = "casfs 2026-11-23 tree seed"
    LOCK_POLICY_KEY = "casfs 2026-11-23 lock policy key"
    GENERATION_KEY = "casfs 2026-11-23 generation key"
    FILE_CACHE_KEY = "casfs 2026-11-23 memory of files"


def derive(purpose: str, *parts: bytes, size: int = 32) -> bytes:
    """Return `size` bytes derived by BLAKE3's `derive_key` from secrets of fixed lengths."""
    return blake3(b"".join(parts), derive_key_context=purpose).digest(length=size)


@dataclass(frozen=True)
class DedupDomain:
    """The secret that makes the digests and cuts of a repository (its id in bytes) differ from all others."""

    repository: bytes
    secret: bytes

    @classmethod
    def new(cls, repository: bytes) -> DedupDomain:
        """Return a domain with a new random secret."""
        return cls(repository, os.urandom(SECRET_BYTES))

    def __repr__(self) -> str:
        return f"Domain({short_id(self.id)})"

    @functools.cached_property
    def id(self) -> DomainId:
        """The domain's id, which does not reveal its secret."""
        return DomainId(derive(KeyContext.DOMAIN_ID, self.secret, self.repository))

    @functools.cached_property
    def digest_key(self) -> bytes:
        """The key of blob digests."""
        return derive(KeyContext.DIGEST_KEY, self.secret)

    @property
    def chunker_seed(self) -> int:
        """The chunker's seed: 63 bits, the most that pyfastcdc accepts."""
        return int.from_bytes(derive(KeyContext.CHUNKER_SEED, self.secret, size=8), "little") >> 1

    @functools.cached_property
    def chunker_key(self) -> bytes:
        """The key of the keyed chunker."""
        return derive(KeyContext.CHUNKER_KEY, self.secret)

    @property
    def tree_seed(self) -> int:
        """The seed of the split points of large directories, 32 bits."""
        return int.from_bytes(derive(KeyContext.TREE_SEED, self.secret, size=4), "little")

    @property
    def lock_policy_key(self) -> bytes:
        """The key of the codes of lock policies."""
        return derive(KeyContext.LOCK_POLICY_KEY, self.secret)

    @property
    def generation_key(self) -> bytes:
        """The key of the code in the record of the domain that replaces this one."""
        return derive(KeyContext.GENERATION_KEY, self.secret)

    @property
    def file_cache_key(self) -> bytes:
        """The key of the files cache of a machine that cannot read the repository."""
        return derive(KeyContext.FILE_CACHE_KEY, self.secret)


@dataclass(frozen=True)
class WriteSession:
    """A session's secrets; the first of the `domains` is its writer's own.

    The id commits to the repository and to every secret, so that no other session can have the same id.
    `chunker` are the parameters with which its writer cuts files; sessions of format 1 do not have them.
    """

    repository: bytes
    secret: bytes
    domains: tuple[DedupDomain, ...]
    chunker: ChunkerConfig | None = None

    @classmethod
    def new(
        cls, domains: Sequence[DedupDomain], chunker: ChunkerConfig | None = None
    ) -> WriteSession:
        """Return a session with a new random secret."""
        secret = os.urandom(SECRET_BYTES)
        return cls(domains[0].repository, secret, tuple(domains), chunker)

    def __repr__(self) -> str:
        return f"Session({short_id(self.id)})"

    @functools.cached_property
    def id(self) -> SessionId:
        """The session's id."""
        parts = [self.secret, self.repository, *(domain.secret for domain in self.domains)]
        return SessionId(derive(KeyContext.SESSION_ID, *parts))

    def pack_key(self, salt: bytes) -> bytes:
        """Return the key of the pack with this salt."""
        return derive(KeyContext.PACK_KEY, self.secret, salt)

    def snapshot_key(self, salt: bytes) -> bytes:
        """Return the key of the snapshot with this salt."""
        return derive(KeyContext.SNAPSHOT_KEY, self.secret, salt)

    def delta_key(self, salt: bytes) -> bytes:
        """Return the key of the index delta with this salt."""
        return derive(KeyContext.DELTA_KEY, self.secret, salt)

    def domain_of(self, digest: bytes, plain: bytes) -> int:
        """Return the index of the domain that keys a blob's digest; 0 if no domain matches."""
        for place, domain in enumerate(self.domains if len(self.domains) > 1 else ()):
            if blake3(plain, key=domain.digest_key).digest() == digest:
                return place
        return 0


class Sessions(Protocol):
    """Access to decrypted sessions, as the blob store needs it."""

    def session(self, session_id: SessionId) -> WriteSession:
        """Return a session's secrets; raise KeyMissingError, or SessionError when its file is damaged."""
