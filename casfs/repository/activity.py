"""The marks that show other processes that this one uses a repository: a lock and a presence object.

A lock is seen by the processes that open the repository's folder. A presence object is seen by all hosts; it
is written where hosts use the repository over a network.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from casfs.errors import StorageError
from casfs.format.config import RepositoryConfig
from casfs.repository.place import Place, RemotePlace
from casfs.repository.remote_writers import is_shared, mark_remote_writers
from casfs.storage.base import HeldLock, Storage
from casfs.storage.clock import StorageClock
from casfs.storage.locks import LockMode

if TYPE_CHECKING:
    from casfs.repository.presence import Presence

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Activity:
    """The lock, the presence object and the storage's clock of one process; `end` it."""

    clock: StorageClock
    lock: HeldLock | None = None
    presence: Presence | None = None

    def end(self) -> None:
        """Delete the presence object, then release the lock; raise nothing. The storage is still open."""
        presence, self.presence = self.presence, None
        if presence is not None:
            presence.end()
        if self.lock is not None:
            self.lock.release()

    def wait_until_shown(self) -> None:
        """Wait until the presence of this process is shown, if it can be."""
        if self.presence is not None:
            self.presence.wait_until_shown()

    def wait_for_clock(self) -> None:
        """Wait until the presence object of a writer has set the clock, if it can be written."""
        if self.presence is not None and self.is_writer:
            self.presence.wait_for_clock()

    @property
    def is_writer(self) -> bool:
        """Whether the process may change the repository."""
        return self.lock is not None and self.lock.mode != LockMode.READER


def begin_writing(
    place: Place,
    storage: Storage,
    config: RepositoryConfig,
    command: str,
    mode: LockMode,
    has_mark: Callable[[], bool],
) -> Activity:
    """Take a lock and begin to show the presence of a writer; raise LockedError and StorageError.

    `has_mark` returns whether a remote place has the mark of remote writers. The caller waits until the
    presence is shown (`wait_until_shown`) before it stores anything.
    """
    host = _shown_host(config)
    activity = Activity(StorageClock(storage))
    activity.lock = place.locks(config).acquire(command, mode, host)
    try:
        if isinstance(place, RemotePlace) and not has_mark():
            mark_remote_writers(storage)
        if is_shared(storage):
            activity.presence = _presence(storage, activity.clock, mode, command, host)
            is_far = storage.capabilities.parallel_requests > 1
            activity.presence.begin(in_background=is_far)
    except BaseException:
        activity.end()
        raise
    return activity


def begin_reading(
    place: Place, storage: Storage, config: RepositoryConfig, command: str | None
) -> Activity:
    """Show the presence of a reader as far as that is possible; a `command` of None is not shown."""
    activity = Activity(StorageClock(storage))
    if command is None:
        return activity
    host = _shown_host(config)
    try:
        activity.lock = place.locks(config).acquire(command, LockMode.READER, host)
        if is_shared(storage):
            activity.presence = _presence(storage, activity.clock, LockMode.READER, command, host)
            activity.presence.begin(in_background=True)
    except StorageError as error:
        log.debug("a read-only medium, or a user who may only read: %s", error)
    return activity


def _presence(
    storage: Storage, clock: StorageClock, mode: LockMode, command: str, host: str | None
) -> Presence:
    # Most repositories are not shared over a network, and do not need this import.
    from casfs.repository.presence import Presence

    return Presence(storage, clock, mode, command, host)


def _shown_host(config: RepositoryConfig) -> str | None:
    """Return the host name to show; in an encrypted repository a placeholder that reveals nothing."""
    return None if config.encryption is None else "a machine"
