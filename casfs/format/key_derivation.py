"""Sessions and domains: the secrets that encrypt a repository, and every key that is derived from them.

A session is one writer's run: a fresh secret from which the keys of its packs and snapshots are derived. A
domain is the secret that keys the digests of blobs and seeds the cuts, so that a writer finds again what
it stored before; it opens nothing. Whoever unwraps a session has both (FORMAT.md, "Encryption").

Values are immutable and may be shared between threads.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType, Protocol

from blake3 import blake3

SessionId = NewType("SessionId", bytes)
DomainId = NewType("DomainId", bytes)

SECRET_BYTES = 32
SALT_BYTES = 32
MAX_DOMAINS = 1 << 16


class KeyContext:
    """The contexts of BLAKE3's key derivation, one for each use; they are part of the format."""

    SESSION_ID = "casfs 2026-11-23 session id"
    DOMAIN_ID = "casfs 2026-11-23 domain id"
    PACK_KEY = "casfs 2026-11-23 pack key"
    SNAPSHOT_KEY = "casfs 2026-11-23 snapshot key"
    DIGEST_KEY = "casfs 2026-11-23 digest key"
    CHUNKER_SEED = "casfs 2026-11-23 chunker seed"
    TREE_SEED = "casfs 2026-11-23 tree seed"
    MEMORY_KEY = "casfs 2026-11-23 memory of files"


def derive(purpose: str, *parts: bytes, size: int = 32) -> bytes:
    """Return `size` bytes derived from secrets of fixed lengths, as BLAKE3's `derive_key` does."""
    return blake3(b"".join(parts), derive_key_context=purpose).digest(length=size)


@dataclass(frozen=True)
class DedupDomain:
    """What makes digests and cuts in one repository (its id in bytes) differ from those of others."""

    repository: bytes
    secret: bytes

    @classmethod
    def new(cls, repository: bytes) -> DedupDomain:
        """Return a domain that nobody had before."""
        return cls(repository, secrets.token_bytes(SECRET_BYTES))

    def __repr__(self) -> str:
        return f"Domain({self.id.hex()[:12]})"

    @functools.cached_property
    def id(self) -> DomainId:
        """The name of the domain, which tells nothing of its secret."""
        return DomainId(derive(KeyContext.DOMAIN_ID, self.secret, self.repository))

    @functools.cached_property
    def digest_key(self) -> bytes:
        """The key of the digests of blobs."""
        return derive(KeyContext.DIGEST_KEY, self.secret)

    @property
    def chunker_seed(self) -> int:
        """The seed of the chunker: 63 bits, since the library takes no more."""
        return int.from_bytes(derive(KeyContext.CHUNKER_SEED, self.secret, size=8), "little") >> 1

    @property
    def tree_seed(self) -> int:
        """The seed of the places where big directories are split, 32 bits."""
        return int.from_bytes(derive(KeyContext.TREE_SEED, self.secret, size=4), "little")

    @property
    def memory_key(self) -> bytes:
        """The key of what a machine that cannot read remembers of unchanged files."""
        return derive(KeyContext.MEMORY_KEY, self.secret)


@dataclass(frozen=True)
class WriteSession:
    """A session's secrets; the first of the `domains` is its writer's own.

    The id commits to the repository and to every secret, so that nothing else can be passed off as it.
    """

    repository: bytes
    secret: bytes
    domains: tuple[DedupDomain, ...]

    @classmethod
    def new(cls, domains: Sequence[DedupDomain]) -> WriteSession:
        """Return a session with a fresh secret."""
        return cls(domains[0].repository, secrets.token_bytes(SECRET_BYTES), tuple(domains))

    def __repr__(self) -> str:
        return f"Session({self.id.hex()[:12]})"

    @functools.cached_property
    def id(self) -> SessionId:
        """The name of the session."""
        parts = [self.secret, self.repository, *(domain.secret for domain in self.domains)]
        return SessionId(derive(KeyContext.SESSION_ID, *parts))

    def pack_key(self, salt: bytes) -> bytes:
        """Return the key of the one pack that has this salt."""
        return derive(KeyContext.PACK_KEY, self.secret, salt)

    def snapshot_key(self, salt: bytes) -> bytes:
        """Return the key of the one snapshot that has this salt."""
        return derive(KeyContext.SNAPSHOT_KEY, self.secret, salt)

    def domain_of(self, digest: bytes, plain: bytes) -> int:
        """Return the place of the domain in which a blob has its digest; the first if it has none."""
        for place, domain in enumerate(self.domains if len(self.domains) > 1 else ()):
            if blake3(plain, key=domain.digest_key).digest() == digest:
                return place
        return 0


class Sessions(Protocol):
    """What a store needs of whoever has the keys."""

    def session(self, session_id: SessionId) -> WriteSession:
        """Return a session's secrets; raise KeyMissingError, or SessionError where it is damaged."""
