"""The vault: the keys with which one process reads or writes one encrypted repository.

A writer has a domain, and one session that begins with the first thing that it stores. A reader has what its
identities open. A backup needs no identity at all: it writes, and cannot read.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from casfs.crypto.identities import Identities, add_gpg, add_passphrase
from casfs.crypto.keyring import Keyring
from casfs.crypto.recipients import (
    Recipient,
    RecipientKind,
    encode_recipients,
    merged,
    read_recipients,
    write_recipients,
)
from casfs.crypto.session_files import list_session_files, write_session
from casfs.crypto.trust_state import (
    WriterState,
    load_state,
    pin,
    save_state,
    verify_pin,
)
from casfs.digest import SnapshotId, digest_of, short_id
from casfs.errors import (
    KeyMissingError,
    NotFoundError,
    StorageError,
    TrustError,
    UsageError,
)
from casfs.format.config import CIPHER, EncryptionConfig, RepositoryConfig
from casfs.format.key_derivation import DedupDomain, WriteSession
from casfs.storage.base import Storage

log = logging.getLogger(__name__)


class KeyManager:
    """Keys to read with, and for a writer its domain and its session; safe to share between threads."""

    def __init__(
        self,
        keyring: Keyring,
        domain: DedupDomain | None = None,
        state: WriterState | None = None,
        all_domains: bool = False,
    ) -> None:
        self.keyring = keyring
        self.domain = domain
        self._state = state
        self._all_domains = all_domains
        self._session: WriteSession | None = None
        self._lock = threading.Lock()

    @classmethod
    def for_reading(
        cls, storage: Storage, config: RepositoryConfig, identities: Identities
    ) -> KeyManager:
        """Return a vault that opens what the identities open."""
        return cls(Keyring(storage, config, identities))

    @classmethod
    def for_writing(
        cls,
        root: Path,
        storage: Storage,
        config: RepositoryConfig,
        identities: Identities,
        all_domains: bool = False,
    ) -> KeyManager:
        """Return a vault that also writes, in the domain that this machine has or is given now.

        With `all_domains` blobs of every domain can be stored, which needs identities. Raises
        TrustError where the repository or its recipients are not those that this machine knows.
        """
        keyring = Keyring(storage, config, identities)
        state = verify_trusted(root, storage, config)
        domain = state.own_domain() if state is not None else None
        if (domain is None or domain.id != keyring.domain_id) and keyring.can_read:
            domain = _repository_domain(keyring) or domain
        if domain is None:
            domain = DedupDomain.new(keyring.repository)
            log.warning(
                "this machine has not stored anything in this repository before, and was given no "
                "identity: it deduplicates with nothing that is there, and its snapshots are told as "
                "unproven (the README says why)"
            )
        if state is None or state.domain != domain.secret.hex():
            followed = _digest_of_recipients(storage)
            state = WriterState(config.id, domain.secret.hex(), followed)
            save_state(state)
        pin(root, config)
        _check_last_snapshot(storage, state)
        return cls(keyring, domain, state, all_domains)

    @property
    def can_read(self) -> bool:
        """Tell whether there is any identity."""
        return self.keyring.can_read

    def session(self) -> WriteSession:
        """Return the session of this writer, which is durable; it begins when it is first asked for."""
        if self.domain is None:
            raise ValueError("the repository is open for reading")
        with self._lock:
            if self._session is None:
                domains = [self.domain]
                if self._all_domains:
                    domains = self.keyring.domains(self.domain)
                self._session = self.keyring.begin(domains)
            return self._session

    def record_published(self, snapshot_id: SnapshotId, time_ns: int) -> None:
        """Remember the last snapshot that this machine published."""
        if self._state is not None:
            self._remember(snapshot_id.hex(), time_ns)

    def record_deleted(self, snapshot_id: SnapshotId) -> None:
        """Forget about a snapshot that this machine itself removes."""
        if self._state is not None and self._state.last_snapshot == snapshot_id.hex():
            self._remember("", 0)

    def _remember(self, last: str, time_ns: int) -> None:
        assert self._state is not None
        self._state = msgspec.structs.replace(self._state, last_snapshot=last, last_time_ns=time_ns)
        try:
            save_state(self._state)
        except StorageError as error:
            log.warning("%s; a rollback of the storage would not be noticed", error)


def _repository_domain(keyring: Keyring) -> DedupDomain | None:
    """Return the repository's own domain, None where no session that tells it can be opened."""
    try:
        return keyring.first_domain()
    except KeyMissingError as error:
        log.info("the repository's own domain is not known: %s", error)
        return None


def create_keys(
    storage: Storage,
    repository_id: str,
    recipients: Sequence[Recipient],
    passphrase: str | None = None,
) -> EncryptionConfig:
    """Make what an encrypted repository begins with: recipients, a domain, and a session that holds it."""
    everybody = with_gpg_identities(storage, merged([], recipients))
    if passphrase is not None:
        everybody.append(add_passphrase(storage, passphrase, bytes.fromhex(repository_id)))
    domain = DedupDomain.new(bytes.fromhex(repository_id))
    session = WriteSession.new([domain])
    write_recipients(storage, everybody)
    write_session(storage, session, everybody)
    save_state(
        WriterState(
            repository_id, domain.secret.hex(), digest_of(encode_recipients(everybody)).hex()
        )
    )
    return EncryptionConfig(CIPHER, session.id.hex(), domain.id.hex())


def with_gpg_identities(storage: Storage, recipients: Sequence[Recipient]) -> list[Recipient]:
    """Return recipients of which those of GPG have an identity in the repository."""
    return [
        add_gpg(storage, one) if one.kind == RecipientKind.GPG and not one.age else one
        for one in recipients
    ]


def change_recipients(
    root: Path, storage: Storage, config: RepositoryConfig, recipients: Sequence[Recipient]
) -> None:
    """Replace the list of recipients, which holds for new sessions, and have this machine follow it.

    Raises TrustError where the list is not the one that this machine knows, and UsageError for none.
    """
    if not recipients:
        raise UsageError(
            "the last recipient cannot be removed: nobody could read what is stored next"
        )
    verify_trusted(root, storage, config)
    write_recipients(storage, recipients)
    trust_current_recipients(root, storage, config)


def verify_trusted(root: Path, storage: Storage, config: RepositoryConfig) -> WriterState | None:
    """Return what this machine remembers of a repository.

    Raises TrustError where that, or its recipients, are not those that it knows.
    """
    verify_pin(root, config)
    state = load_state(config)
    if state is not None and state.recipients != _digest_of_recipients(storage):
        raise TrustError(
            f"the recipients of the repository in {root} are not those that this machine knows: "
            "what is stored next could be read by others. casfs key list shows them; if they are "
            "as they should be, say casfs key accept"
        )
    return state


def rewrap_sessions(storage: Storage, config: RepositoryConfig, identities: Identities) -> int:
    """Wrap every session to the recipients that there are now; returns how many sessions those are.

    The new files are durable before the old ones go, and what another process has written meanwhile stays.
    Raises KeyMissingError where the identities do not open one of them; nothing was changed then.
    """
    recipients = read_recipients(storage)
    sessions = Keyring(storage, config, identities).sessions()
    for session in sessions:
        before = [file.name for file in list_session_files(storage, session.id)]
        written = write_session(storage, session, recipients)
        for name in before:
            if name not in written:
                storage.delete(name)
    return len(sessions)


def require_recipients(storage: Storage, expected: Sequence[Recipient]) -> None:
    """Raise TrustError unless the repository's recipients are just those."""
    there = {(one.kind, one.value) for one in read_recipients(storage)}
    wanted = {(one.kind, one.value) for one in expected}
    if there != wanted:
        more = ", ".join(sorted(value for _, value in there - wanted)) or "none"
        less = ", ".join(sorted(value for _, value in wanted - there)) or "none"
        raise TrustError(
            "the repository has other recipients than the file names; "
            f"only the repository has: {more}; only the file has: {less}"
        )


def trust_current_recipients(
    root: Path, storage: Storage, config: RepositoryConfig
) -> list[Recipient]:
    """Have this machine follow the recipients that the repository has now; returns them."""
    pin(root, config)
    if config.encryption is None:
        return []
    recipients = read_recipients(storage)
    followed = _digest_of_recipients(storage)
    state = load_state(config)
    if state is not None:
        save_state(msgspec.structs.replace(state, recipients=followed))
    return recipients


def _digest_of_recipients(storage: Storage) -> str:
    return digest_of(encode_recipients(read_recipients(storage))).hex()


def _check_last_snapshot(storage: Storage, state: WriterState) -> None:
    """Warn where the last snapshot that this machine published is gone."""
    if not state.last_snapshot:
        return
    try:
        storage.size(f"snapshots/{state.last_snapshot}")
    except NotFoundError:
        log.warning(
            "the last snapshot that this machine published, %s, is not there any more: it was forgotten "
            "or replaced elsewhere, or the storage was set back to an earlier state",
            short_id(bytes.fromhex(state.last_snapshot)),
        )
