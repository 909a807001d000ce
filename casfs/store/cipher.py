"""Cached pack ciphers: one AEAD key for each recently read pack. Threads may share the cache."""

from __future__ import annotations

from casfs.digest import PackId
from casfs.format.cipher import PackCipher
from casfs.format.key_derivation import SessionId, Sessions
from casfs.format.pack import SESSION_HEADER, parse_session
from casfs.storage.base import Storage

_MOST_CIPHERS = 4096


class PackCiphers:
    """The ciphers of the packs of an encrypted repository, derived on first use.

    Without `can_read` this process has no identity, so `sessions` decrypts none but its own session.
    """

    def __init__(self, storage: Storage, sessions: Sessions, can_read: bool = True) -> None:
        self.sessions = sessions
        self.can_read = can_read
        self._storage = storage
        self._known: dict[str, PackCipher] = {}

    def is_cached(self, name: str) -> bool:
        """Return whether `for_pack` would return without a read."""
        return name in self._known

    def for_pack(self, pack: PackId, name: str) -> PackCipher:
        """Return the cipher of a pack that is stored under `name`.

        Raise PackError for a pack that is not encrypted, KeyMissingError and SessionError for a session that
        cannot be decrypted, NotFoundError and StorageError.
        """
        cipher = self._known.get(name)
        if cipher is None:
            session_id, salt = parse_session(pack, self._storage.read(name, 0, SESSION_HEADER))
            cipher = PackCipher(self.sessions.session(SessionId(session_id)), salt)
            if len(self._known) >= _MOST_CIPHERS:
                self._known.clear()
            self._known[name] = cipher
        return cipher
