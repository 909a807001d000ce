"""The key manager: the keys with which a process reads or writes one encrypted repository.

A writer has a dedup domain, and a write session that begins with the first stored blob. A reader has the
sessions that its identities decrypt. A backup needs no identity: it can write without being able to read.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from casfs.crypto.generations import Generations, require_authentic, require_no_rollback
from casfs.crypto.identities import Identities, add_gpg, add_passphrase
from casfs.crypto.keyring import Keyring
from casfs.crypto.recipients import (
    Recipient,
    RecipientKind,
    RecipientList,
    merged,
    write_recipients,
)
from casfs.crypto.session_files import list_session_files, write_session
from casfs.crypto.trust_root import TrustRoot
from casfs.crypto.trust_state import (
    WriterState,
    change_state,
    load_state,
    pin,
    pin_generations,
    pinned_generations,
    save_state,
    verify_pin,
)
from casfs.crypto.writer_domain import state_for_writing
from casfs.crypto.writers import TrustedWriters
from casfs.digest import SnapshotId, short_id
from casfs.errors import (
    NotFoundError,
    StorageError,
    TrustError,
    UsageError,
    WrongKeyError,
)
from casfs.format.config import CIPHER, EncryptionConfig, RepositoryConfig
from casfs.format.key_derivation import DedupDomain, WriteSession
from casfs.format.signature import SEED_BYTES, SigningKey
from casfs.storage.base import Storage
from casfs.storage.clock import StorageClock

log = logging.getLogger(__name__)

_CLOCK_STEP_NS = 2_000_000_000
"""Times of a storage that differ by more are different, however coarse they are."""


class KeyManager:
    """Keys for reading and, in a writer, its domain and its session. Threads may share it."""

    def __init__(
        self,
        keyring: Keyring,
        domain: DedupDomain | None = None,
        state: WriterState | None = None,
        all_domains: bool = False,
        writers: TrustedWriters | None = None,
    ) -> None:
        self.keyring = keyring
        self.writers = writers
        self.domain = domain
        self._state = state
        self._all_domains = all_domains
        self._session: WriteSession | None = None
        self._lock = threading.Lock()

    @classmethod
    def for_reading(
        cls,
        storage: Storage,
        config: RepositoryConfig,
        identities: Identities,
        trust: TrustRoot | None = None,
    ) -> KeyManager:
        """Return a key manager that decrypts with the given identities.

        Without `trust` the list of recipients is not read: only the first domain is the repository's own.
        """
        writers = TrustedWriters(config) if config.signs_snapshots else None
        shown = (lambda: trust.recipients(storage)) if trust is not None else None
        generations = Generations(storage, config, shown)
        return cls(Keyring(storage, config, identities, None, generations), writers=writers)

    @classmethod
    def for_writing(
        cls,
        root: Path | str,
        storage: Storage,
        trust: TrustRoot,
        identities: Identities,
        all_domains: bool = False,
    ) -> KeyManager:
        """Return a key manager that also writes, in this machine's domain or in a new one.

        With `all_domains` it can store blobs of every domain, which needs identities. Raise TrustError where
        the repository or its recipients differ from those that this machine trusts.
        """
        config = trust.config
        state = verify_trusted(root, storage, trust)
        recipients = trust.recipients(storage)
        generations = Generations(storage, config, lambda: recipients)
        keyring = Keyring(storage, config, identities, recipients, generations)
        state = state_for_writing(state, keyring, recipients.digest)
        if not state.signing_seed:
            seed = secrets.token_bytes(SEED_BYTES).hex()
            state = msgspec.structs.replace(state, signing_seed=seed)
            save_state(state)
        pin(root, trust)
        _check_last_snapshot(storage, state)
        writers = TrustedWriters(config) if config.signs_snapshots else None
        return cls(keyring, state.own_domain(), state, all_domains, writers)

    @property
    def signing_key(self) -> SigningKey | None:
        """The key with which this writer signs its snapshots, None in a repository of format 1."""
        if self.writers is None or self._state is None:
            return None
        return self._state.signing_key()

    @property
    def can_read(self) -> bool:
        """Whether any identity is available."""
        return self.keyring.can_read

    @property
    def is_trusted_writer(self) -> bool:
        """Whether what this process publishes is proven: it writes in the repository's own domain."""
        return self.domain is not None and self.domain.id == self.keyring.generations.newest_id

    @property
    def earlier_domains(self) -> list[DedupDomain]:
        """The domains in which this writer wrote before they were replaced, the newest first."""
        return self._state.earlier_domains() if self._state is not None else []

    def session(self) -> WriteSession:
        """Return this writer's session, which is durable; the first call creates it."""
        if self.domain is None:
            raise ValueError("the repository is open for reading")
        with self._lock:
            if self._session is None:
                # With the earlier ones it can store a blob again that it stored before a replacement.
                domains = [self.domain, *self.earlier_domains]
                if self._all_domains:
                    domains = self.keyring.domains(self.domain)
                self._session = self.keyring.begin(domains)
            return self._session

    def use_domain(self, domain: DedupDomain, recipients: RecipientList) -> None:
        """Remember a new domain of the repository as this machine's own, and the list that has its record."""
        before = self._state
        assert before is not None
        pin_generations(before.repository, recipients.generations)
        self._state = change_state(
            before,
            lambda state: msgspec.structs.replace(
                state,
                domain=domain.secret.hex(),
                recipients=recipients.digest,
                generation=len(recipients.generations),
                earlier=(before.domain, *before.earlier),
            ),
        )
        self.domain = domain

    def unproven_session(self) -> WriteSession:
        """Return a new durable session of a domain that is not the repository's own.

        What is published in it is unproven, like what a write-only host publishes. No blob is stored in it.
        """
        return self.keyring.begin([DedupDomain.new(self.keyring.repository)])

    def record_published(self, snapshot_id: SnapshotId, time_ns: int) -> None:
        """Record the last snapshot that this machine published."""
        self._remember(
            lambda state: msgspec.structs.replace(
                state, last_snapshot=snapshot_id.hex(), last_time_ns=time_ns
            )
        )

    def record_deleted(self, snapshot_id: SnapshotId) -> None:
        """Drop the record of the last published snapshot if this machine deletes that snapshot."""
        if self._state is None or self._state.last_snapshot != snapshot_id.hex():
            return
        self._remember(
            lambda state: (
                msgspec.structs.replace(state, last_snapshot="", last_time_ns=0)
                if state.last_snapshot == snapshot_id.hex()
                else state
            )
        )

    def _remember(self, change: Callable[[WriterState], WriterState]) -> None:
        """Change the record of the last snapshot; the session goes on with the domain that it has."""
        if self._state is None:
            return
        self._state = change(self._state)
        try:
            change_state(self._state, change)
        except (StorageError, TrustError) as error:
            log.warning("%s; a rollback of the storage would not be noticed", error)


def create_keys(
    storage: Storage,
    config: RepositoryConfig,
    recipients: Sequence[Recipient],
    passphrase: str | None = None,
) -> EncryptionConfig:
    """Create the first keys of an encrypted repository.

    Recipients, a domain, and a session that contains it.
    """
    repository = bytes.fromhex(config.id)
    all_recipients = with_gpg_identities(storage, merged([], recipients))
    if passphrase is not None:
        all_recipients.append(add_passphrase(storage, passphrase, repository))
    domain = DedupDomain.new(repository)
    session = WriteSession.new([domain], config.chunker if config.format >= 2 else None)
    listed = RecipientList.of(all_recipients)
    write_recipients(storage, listed)
    write_session(storage, session, listed.recipients)
    save_state(WriterState(config.id, domain.secret.hex(), listed.digest))
    return EncryptionConfig(CIPHER, session.id.hex(), domain.id.hex())


def with_gpg_identities(storage: Storage, recipients: Sequence[Recipient]) -> list[Recipient]:
    """Return the recipients; create an identity in the repository for each GPG recipient.

    Raise WrongKeyError where a GPG recipient has an age key: it would belong to another repository.
    """
    for one in recipients:
        if one.kind == RecipientKind.GPG and one.age:
            raise WrongKeyError(
                f"the GPG key {one.value} is new in this repository, which makes the age key of its own for "
                "it: leave out the age key after it"
            )
    return [add_gpg(storage, one) if one.kind == RecipientKind.GPG else one for one in recipients]


def change_recipients(
    root: Path | str, storage: Storage, trust: TrustRoot, recipients: Sequence[Recipient]
) -> None:
    """Replace the list of recipients of new sessions, and trust the new list on this machine.

    Raise TrustError where the current list is not the one that this machine trusts, and UsageError for an
    empty list.
    """
    require_any_recipient(recipients)
    verify_trusted(root, storage, trust)
    trust.replace_recipients(storage, recipients)
    trust_current_recipients(root, storage, trust)


def require_any_recipient(recipients: Sequence[Recipient]) -> None:
    """Raise UsageError for an empty list."""
    if not recipients:
        raise UsageError("the last recipient cannot be removed: no key could read later backups")


def verify_trusted(root: Path | str, storage: Storage, trust: TrustRoot) -> WriterState | None:
    """Return this machine's state of a repository.

    Raise TrustError where the repository or its recipients differ from those that the machine trusts.
    """
    verify_pin(root, trust)
    state = load_state(trust.config)
    if state is not None and state.recipients != trust.recipients(storage).digest:
        raise TrustError(
            f"the recipients of the repository in {root} differ from those that this machine trusts, so "
            "others could read later backups. Compare them (`casfs key list`); if they are correct, "
            "run `casfs key accept`"
        )
    require_no_rollback(trust.config, lambda: trust.recipients(storage), str(root))
    return state


def is_list_trusted(storage: Storage, trust: TrustRoot) -> bool:
    """Return whether the list of recipients is no other than the one that this machine knows, if any."""
    recipients = trust.recipients(storage)
    state = load_state(trust.config)
    pinned = pinned_generations(trust.config.id) if trust.config.signs_snapshots else ()
    is_known = state is None or state.recipients == recipients.digest
    return is_known and pinned in ((), recipients.generations)


def require_trusted_recipients(storage: Storage, trust: TrustRoot) -> tuple[Recipient, ...]:
    """Return the recipients whose identities a passphrase may be tried on.

    Raise TrustError where this machine trusts another list.
    """
    recipients = trust.recipients(storage)
    state = load_state(trust.config)
    if state is not None and state.recipients != recipients.digest:
        raise TrustError(
            "the recipients of the repository differ from those that this machine trusts, so its passphrase "
            "is tried on nothing. Compare them (`casfs key list`); if they are correct, run "
            "`casfs key accept`, or give --identity FILE"
        )
    return recipients.recipients


def rewrap_sessions(
    storage: Storage, trust: TrustRoot, identities: Identities, clock: StorageClock | None = None
) -> int:
    """Encrypt every session to the current recipients; return the number of sessions.

    The new files are durable before the old ones are deleted. Files that another process writes meanwhile
    stay. `clock` is the storage's where other hosts may do the same: then only files that are older than the
    new ones are deleted, so that the newest files of a session always stay. Raise KeyMissingError, and change
    nothing, where the identities do not decrypt one of the sessions.
    """
    recipients = trust.recipients(storage).recipients
    keyring = Keyring(storage, trust.config, identities)
    ids = [session.id for session in keyring.sessions()]
    for session in keyring.sessions(ids):
        before = {
            file.name: storage.mtime_ns(file.name) if clock is not None else 0
            for file in list_session_files(storage, session.id)
        }
        if clock is not None:
            _wait_until_later(clock, max(before.values(), default=0))
        written = write_session(storage, session, recipients)
        first_ns = min(map(storage.mtime_ns, written)) if clock is not None else 1
        for name, mtime_ns in before.items():
            if name not in written and mtime_ns < first_ns:
                storage.delete(name)
    return len(ids)


def _wait_until_later(clock: StorageClock, time_ns: int) -> None:
    """Wait until a file that is written gets a later time than `time_ns`; the times may be in seconds."""
    while 0 <= clock.now_ns() - time_ns < _CLOCK_STEP_NS:
        time.sleep(0.1)


def require_recipients(current: RecipientList, expected: Sequence[Recipient]) -> None:
    """Raise TrustError unless sessions are encrypted to exactly the keys of the expected recipients."""
    found, wanted = (
        {key for one in of for key in one.keys} for of in (current.recipients, expected)
    )
    if found != wanted:
        more = ", ".join(sorted(found - wanted)) or "none"
        less = ", ".join(sorted(wanted - found)) or "none"
        hint = ""
        if any(one.age in found - wanted for one in current.recipients if one.age):
            hint = (
                "; a line for a GPG key names its age key too: compare the list with `casfs key list` on a "
                "machine that trusts the repository, then copy the line"
            )
        raise TrustError(
            "the repository's recipients differ from the file's; "
            f"only the repository has: {more}; only the file has: {less}{hint}"
        )


def trust_current_recipients(
    root: Path | str, storage: Storage, trust: TrustRoot
) -> tuple[Recipient, ...]:
    """Trust the repository's current recipients on this machine; return them.

    Raise TrustError, and remember nothing of the list, where it has a record of a replaced domain that is
    forged, as far as this machine's own domain shows.
    """
    config = trust.config
    if config.encryption is None:
        pin(root, trust)
        return ()
    recipients = trust.recipients(storage)
    state = load_state(config)
    generations = Generations(storage, config, lambda: recipients, uses_pins=False)
    if state is not None:
        generations.learn([state.own_domain(), *state.earlier_domains()])
    require_authentic(generations)
    pin(root, trust)
    if recipients.generations != (pinned := pinned_generations(config.id)):
        if recipients.generations[: len(pinned)] != pinned:
            log.warning(
                "this list of recipients lacks a replacement of the repository's secret that this machine "
                "has seen; what was published since then counts as unproven"
            )
        pin_generations(config.id, recipients.generations)
    if state is not None:
        change_state(state, lambda now: msgspec.structs.replace(now, recipients=recipients.digest))
    return recipients.recipients


def _check_last_snapshot(storage: Storage, state: WriterState) -> None:
    """Warn if the last snapshot that this machine published is missing."""
    if not state.last_snapshot:
        return
    try:
        storage.size(f"snapshots/{state.last_snapshot}")
    except NotFoundError:
        log.warning(
            "the last snapshot that this machine published, %s, is missing: it was removed or replaced "
            "elsewhere, or the storage was rolled back to an earlier state",
            short_id(bytes.fromhex(state.last_snapshot)),
        )
