"""The keyring: the write sessions of one repository, and their dedup domains.

Each session is decrypted once, unless others with very many domains took its place meanwhile: everyone who
can add objects can add such sessions. Threads may share the keyring: if two decrypt the same session at
once, both get equal secrets.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator

from casfs.crypto.generations import Generations
from casfs.crypto.identities import Identities
from casfs.crypto.recipients import RecipientList
from casfs.crypto.session_files import SESSIONS, read_session, session_ids, write_session
from casfs.digest import SnapshotId
from casfs.errors import CasfsError, KeyMissingError, RefusedError, SessionError, TrustError
from casfs.format.config import RepositoryConfig
from casfs.format.key_derivation import MAX_DOMAINS, DedupDomain, SessionId, WriteSession
from casfs.storage.base import Storage

log = logging.getLogger(__name__)

_MAX_KEPT_DOMAINS = 2 * MAX_DOMAINS
"""How many domains the sessions in memory may have together, at about 200 bytes each."""


class Keyring:
    """The keys of an encrypted repository that `identities` decrypt.

    A writer gives the `recipients` to which its sessions are encrypted. Without `generations` the
    repository's own domain is the one that the configuration names.
    """

    def __init__(
        self,
        storage: Storage,
        config: RepositoryConfig,
        identities: Identities,
        recipients: RecipientList | None = None,
        generations: Generations | None = None,
    ) -> None:
        if config.encryption is None:
            raise ValueError("the repository is not encrypted")
        self.repository = bytes.fromhex(config.id)
        self.generations = generations or Generations(storage, config)
        self._first = SessionId(bytes.fromhex(config.encryption.session))
        self._storage = storage
        self._identities = identities
        self._recipients = recipients
        self._configured_chunker = config.chunker
        self._session_chunker = config.chunker if config.format >= 2 else None
        self._own: dict[SessionId, WriteSession] = {}
        self._open: dict[SessionId, WriteSession] = {}
        self._kept_domains = 0
        self._lock = threading.Lock()
        self._failed: dict[SessionId, CasfsError] = {}

    @property
    def can_read(self) -> bool:
        """Whether any identity is available; it may still fail to decrypt a session."""
        return bool(self._identities)

    def session(self, session_id: SessionId) -> WriteSession:
        """Return a session's secrets.

        Raise KeyMissingError and SessionError, and TrustError where its writer cut files with other
        parameters than those of the configuration, which is not encrypted and may have been changed.
        """
        found = self._own.get(session_id) or self._open.get(session_id)
        if found is not None:
            return found
        failed = self._failed.get(session_id)
        if failed is not None:
            raise failed
        try:
            session = read_session(
                self._storage,
                session_id,
                self.repository,
                self._identities.ages,
                self._identities.use_gpg,
            )
        except (KeyMissingError, SessionError) as error:
            self._failed[session_id] = error
            raise
        if session.chunker not in (None, self._configured_chunker):
            raise TrustError(
                "the chunker's parameters in the repository's configuration are not those with which its "
                "writers cut files: the file `config` was changed; restore it from a copy"
            )
        self._keep(session)
        return session

    def _keep(self, session: WriteSession) -> None:
        """Keep a session in memory, and forget the oldest ones while all have too many domains."""
        with self._lock:
            if session.id in self._open:
                return
            self._open[session.id] = session
            self._kept_domains += len(session.domains)
            while self._kept_domains > _MAX_KEPT_DOMAINS and len(self._open) > 1:
                oldest = self._open.pop(next(iter(self._open)))
                self._kept_domains -= len(oldest.domains)

    def begin(self, domains: list[DedupDomain]) -> WriteSession:
        """Return a new session whose secrets are stored durably, encrypted to the recipients."""
        if self._recipients is None:
            raise ValueError("the repository is open for reading")
        session = WriteSession.new(domains, self._session_chunker)
        write_session(self._storage, session, self._recipients.recipients)
        self._own[session.id] = session  # without an identity it could not be decrypted again
        return session

    def own_domain(self) -> DedupDomain:
        """Return the repository's own domain, the newest generation.

        Raise KeyMissingError where no decrypted session contains it, or where it cannot be verified.
        """
        for session_id in [*self._key_sessions(), *session_ids(self._storage)]:
            try:
                session = self.session(session_id)
            except (KeyMissingError, SessionError):
                continue
            if self.is_from_trusted_writer(session):
                return session.domains[0]
        raise KeyMissingError("no decrypted session contains the repository's own domain")

    def _key_sessions(self) -> list[SessionId]:
        """Return the sessions that contain the repository's own domains, the newest first."""
        return [*(one.session_id for one in reversed(self.generations.records)), self._first]

    def domains(self, first: DedupDomain) -> list[DedupDomain]:
        """Return a domain, followed by all other domains of the repository's sessions.

        Raise KeyMissingError, and RefusedError where they are more than one session can have: everyone who
        can add objects can add sessions with any domains.
        """
        found = {first.id: first}
        # A blob's domain is searched in this order: one session with very many would make that slow.
        sizes = sorted((len(session.domains), session.id) for session in self.sessions())
        for session in self.sessions(session_id for _, session_id in sizes):
            found.update((one.id, one) for one in session.domains if one.id not in found)
            if len(found) > MAX_DOMAINS:
                most, largest = sizes[-1]
                raise RefusedError(
                    "the repository's sessions have more deduplication domains than the "
                    f"{MAX_DOMAINS:,} that one session can have; {SESSIONS}/{largest.hex()} alone has "
                    f"{most:,}: remove the folders below {SESSIONS}/ that no machine of yours has written"
                )
        return list(found.values())

    def sessions(self, ids: Iterable[SessionId] | None = None) -> Iterator[WriteSession]:
        """Yield the sessions with these ids, by default all; log the damaged ones; raise KeyMissingError."""
        for session_id in session_ids(self._storage) if ids is None else ids:
            try:
                yield self.session(session_id)
            except SessionError as error:
                log.warning("%s", error)

    def damaged(self) -> list[SessionError]:
        """Return an error for each damaged session, including a missing one that the configuration names, or
        the list of recipients.

        Sessions that the identities do not decrypt are not checked.
        """
        found = []
        named = {*self._key_sessions()}
        for session_id in sorted({*named, *session_ids(self._storage)}):
            try:
                self.session(session_id)
            except KeyMissingError:
                continue
            except SessionError as error:
                # A prune may have removed the session meanwhile.
                if session_id in named or session_id in session_ids(self._storage):
                    found.append(error)
        return found

    def is_from_trusted_writer(self, session: WriteSession) -> bool:
        """Return whether a session's writer had the repository's own domain, the newest generation.

        The storage never has this domain, so a session that the storage forged is not proven.
        """
        number = self._generation_of(session)
        return number is not None and number == len(self.generations.records)

    def proves(self, session: WriteSession, snapshot_id: SnapshotId) -> bool:
        """Return whether the writer of a snapshot, in a session, had the repository's own domain then.

        A former recipient has the domain of an earlier generation too: a snapshot in it is proven if it
        existed before the domain was replaced.
        """
        number = self._generation_of(session)
        if number is None or number == len(self.generations.records):
            return number is not None
        return self.generations.was_there(number, snapshot_id)

    def _generation_of(self, session: WriteSession) -> int | None:
        """Return the number of the generation in which a session's writer wrote, None if it is none."""
        self.generations.learn(session.domains)
        if not self.generations.is_verified:
            for session_id in self._key_sessions():
                try:
                    self.generations.learn(self.session(session_id).domains)
                except (KeyMissingError, SessionError):
                    continue
        return self.generations.number_of(session.domains[0])
