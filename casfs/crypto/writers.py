"""The machines whose snapshots this machine trusts, in one encrypted repository: trust on first use.

A snapshot of format 2 is signed by the machine that made it and by the one that published it
(`format/signature.py`). A file in the user's state directory has, for each host name, the keys of its
machines. The first key that appears for a host is trusted; another one for the same host is not, until
`casfs key accept`. So a former recipient, who knows the repository's secrets, cannot publish in the name of
a known host. This machine's own key is trusted for every host: a tag, a copy or a repair keeps the host name.

Used by one thread. Two processes that learn keys at once may forget some: they learn them again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from casfs.crypto.trust_state import (
    load_state,
    require_of_repository,
    state_folder,
    write_state_file,
)
from casfs.digest import SnapshotId, short_id
from casfs.errors import NoHomeError, RefusedError, StorageError, TrustError
from casfs.json_document import InvalidJsonError, parse_json

if TYPE_CHECKING:
    from pathlib import Path

    from casfs.format.config import RepositoryConfig
    from casfs.format.signature import Signers

log = logging.getLogger(__name__)


class _Known(msgspec.Struct, frozen=True):
    """The contents of the file; keys and ids are hexadecimal."""

    repository: str
    hosts: dict[str, tuple[str, ...]] = {}
    unsigned: tuple[str, ...] = ()
    """The unsigned snapshots of earlier versions that were there at the first use."""


class SignedSnapshot(NamedTuple):
    """What decides about the trust in a snapshot whose writer knew the repository's own secret."""

    snapshot_id: SnapshotId
    host: str
    signers: Signers | None


class HostKey(NamedTuple):
    """The public signing key of a machine with a host name, in hexadecimal; `is_own` means this machine."""

    host: str
    key: str
    is_own: bool


class TrustedWriters:
    """The keys that this machine trusts in the repository of a configuration.

    Raise StorageError, and TrustError for a damaged file.
    """

    def __init__(self, config: RepositoryConfig) -> None:
        self._repository = config.id
        self._own = ""
        self._known: _Known | None = None
        try:
            state = load_state(config)
            self._known = _read(config.id)
        except NoHomeError:
            state = None  # nothing can have been recorded
        if state is not None and state.signing_seed:
            self._own = state.signing_key().public.hex()
        self._warned: set[tuple[str, str]] = set()

    @property
    def is_first_use(self) -> bool:
        """Whether this machine has not learned the keys of this repository yet."""
        return self._known is None

    def listed(self) -> list[HostKey]:
        """Return the trusted keys, sorted by host."""
        hosts = self._known.hosts if self._known is not None else {}
        found = [HostKey(host, key, key == self._own) for host in hosts for key in hosts[host]]
        return sorted(found)

    def is_own(self, key: str) -> bool:
        """Return whether a public key is this machine's."""
        return key == self._own

    def hosts_of(self, key: str) -> list[str]:
        """Return the hosts for which this machine trusts a public key, sorted."""
        return sorted({one.host for one in self.listed() if one.key == key})

    def learn(
        self, snapshots: Iterable[SignedSnapshot], unknown_hosts_only: bool = False
    ) -> list[HostKey]:
        """Trust the author of each snapshot, and each unsigned one; return the keys that are new.

        With `unknown_hosts_only` a further key of a known host is not trusted, but logged, and neither is an
        unsigned snapshot, except at the first use.
        """
        known = self._known or _Known(self._repository)
        kept = known.hosts if unknown_hosts_only else {}
        hosts, unsigned = dict(known.hosts), set(known.unsigned)
        new = []
        for snapshot_id, host, signers in snapshots:
            if signers is None:
                if self._known is None or not unknown_hosts_only:
                    unsigned.add(snapshot_id.hex())
                continue
            key = signers.author.key.hex()
            if host in kept:
                if not self._is_trusted(host, signers.author.key):
                    self._warn(snapshot_id, host, key)
                continue
            if key not in hosts.get(host, ()):
                hosts[host] = (*hosts.get(host, ()), key)
                new.append(HostKey(host, key, key == self._own))
        self._save(_Known(self._repository, hosts, tuple(sorted(unsigned))))
        return new

    def learn_own(self, host: str) -> None:
        """Trust this machine's own key for a host in whose name it published, if no key is known for it."""
        if self._known is None:
            raise ValueError("the keys of the repository's writers are unknown yet")
        if host in self._known.hosts or not self._own:
            return
        hosts = self._known.hosts | {host: (self._own,)}
        self._save(msgspec.structs.replace(self._known, hosts=hosts))

    def trusts(self, snapshot: SignedSnapshot) -> bool:
        """Return whether a trusted machine made a snapshot; learn the key of an unknown host."""
        signers = snapshot.signers
        if self._known is None:
            raise ValueError("the keys of the repository's writers are unknown yet")
        if signers is None:
            return snapshot.snapshot_id.hex() in self._known.unsigned
        if snapshot.host not in self._known.hosts and signers.author.key.hex() != self._own:
            for host, key, _ in self.learn([snapshot]):
                log.info("the machine %s signs with the key %s, from now on trusted", host, key)
        if self._is_trusted(snapshot.host, signers.author.key):
            return True
        self._warn(snapshot.snapshot_id, snapshot.host, signers.author.key.hex())
        return False

    def trusts_publisher(self, snapshot: SignedSnapshot) -> bool:
        """Return whether a trusted machine published a snapshot, so that it may replace another one."""
        if snapshot.signers is None:
            return self.trusts(snapshot)
        return self._is_trusted(snapshot.host, snapshot.signers.publisher)

    def _is_trusted(self, host: str, key: bytes) -> bool:
        assert self._known is not None
        return key.hex() == self._own or key.hex() in self._known.hosts.get(host, ())

    def _warn(self, snapshot_id: SnapshotId, host: str, key: str) -> None:
        if (host, key) in self._warned:
            return
        self._warned.add((host, key))
        log.warning(
            "snapshot %s names the host %s, but the key %s that signed it is not one that this machine "
            "trusts for that host. If the host was set up again, run `casfs key accept` with an identity",
            short_id(snapshot_id),
            host,
            key[:16],
        )

    def _save(self, known: _Known) -> None:
        self._known = known
        try:
            write_state_file(_path(self._repository), msgspec.json.encode(known))
        except (StorageError, RefusedError, NoHomeError) as error:
            log.info("%s; a snapshot in another machine's name will not be noticed", error)


def _path(repository: str, make: bool = True) -> Path:
    return state_folder(make) / f"writers-{repository[:32]}.json"


def _read(repository: str) -> _Known | None:
    path = _path(repository, make=False)
    try:
        known = parse_json(path.read_bytes(), _Known)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StorageError("read", str(path), error) from error
    except InvalidJsonError as error:
        raise TrustError(
            f"{path} is damaged; restore it, or remove it and run `casfs key accept`"
        ) from error
    require_of_repository(path, known.repository, repository)
    return known
