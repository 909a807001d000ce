"""Open a repository for a change of its keys, of which one at a time may run.

In a folder a lock excludes others. Where hosts write over a network, a process first shows its presence and
then looks for others that change keys: of two at the same time, at least one sees the other and gives up. The
process writes only as long as no other can take its presence for stale. If it is suspended between that test
and a write, a change of another machine may be lost, which the machines that trust the other list report.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from casfs.crypto.trust_root import TrustRoot
from casfs.errors import LockedError, RefusedError
from casfs.repository.activity import Activity, begin_writing
from casfs.repository.place import Place
from casfs.repository.presence import Presence, present_processes
from casfs.repository.remote_writers import is_marked, is_shared
from casfs.storage.base import Data, Storage
from casfs.storage.clock import StorageClock
from casfs.storage.local import LocalStorage
from casfs.storage.locks import LockMode
from casfs.storage.wrapper import StorageWrapper


@dataclass(frozen=True, slots=True)
class KeyChange:
    """A repository whose keys this process may change; `clock` is set where other hosts may do the same."""

    storage: Storage
    trust: TrustRoot
    clock: StorageClock | None


@contextmanager
def open_for_key_change(place: Place, verb: str, sync: bool = True) -> Iterator[KeyChange]:
    """Yield a repository for a change of its keys; `verb` begins with `key `.

    Raise LockedError while another process changes them, and RefusedError where the storage accepts no
    presence object, or where this machine was suspended.
    """
    storage = place.open_storage(sync)
    activity: Activity | None = None
    try:
        trust = place.trust_root(storage)
        activity = begin_writing(
            place, storage, trust.config, verb, LockMode.MAINTENANCE, lambda: is_marked(storage)
        )
        activity.wait_for_clock()
        if isinstance(storage, LocalStorage) and activity.lock is not None:
            storage.writer = activity.lock.name
        if is_shared(storage):
            assert activity.presence is not None
            _require_alone(storage, activity.presence, activity.clock)
            yield KeyChange(_ClaimedStorage(storage, activity.presence), trust, activity.clock)
        else:
            yield KeyChange(storage, trust, None)
    finally:
        if activity is not None:
            activity.end()
        storage.close()


def _require_alone(storage: Storage, presence: Presence, clock: StorageClock) -> None:
    if not presence.is_fresh():
        raise RefusedError(
            f"the keys are not changed: {storage.url} accepts no presence object from this machine, so "
            "others would not see the change; use credentials that may write"
        )
    for name, other in present_processes(storage).items():
        is_change = other.record.verb.startswith("key ")
        if name != presence.name and is_change and not other.is_stale(clock.now_ns()):
            raise LockedError(
                f"another machine changes the keys: {other.record.verb}, process {other.record.pid}; nothing "
                "was changed. Run the command again when it has ended; `casfs locks` lists it, for half an "
                "hour if it died"
            )


class _ClaimedStorage(StorageWrapper):
    """A storage that is changed only while this process can be seen to change the keys."""

    def __init__(self, inner: Storage, presence: Presence) -> None:
        super().__init__(inner)
        self._presence = presence

    def write(self, name: str, data: Data) -> None:
        """Store an object and replace an object of the same name."""
        self._require_fresh()
        self.inner.write(name, data)

    def create(self, name: str, data: Data) -> None:
        """Store an object unless the name exists."""
        self._require_fresh()
        self.inner.create(name, data)

    def delete(self, name: str) -> None:
        """Remove an object."""
        self._require_fresh()
        self.inner.delete(name)

    def _require_fresh(self) -> None:
        if not self._presence.is_fresh():
            raise RefusedError(
                "this machine was suspended, or cut off, while it changed the keys; run the command again"
            )
