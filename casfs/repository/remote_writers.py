"""The mark of a repository to which hosts write over a network, where prune cannot see their locks.

A prune of a local repository finds running writers by their locks. A host that writes over a network holds no
such lock, so it leaves a mark. A marked repository is pruned by the rules for places without locks
(`casfs.maintenance.shared_prune`). A writer leaves the mark before it reads which packs are marked for
removal. A prune by locks looks for the mark after it has marked packs and before it removes any. So one of
the two sees the other.
"""

from __future__ import annotations

from casfs.errors import NotFoundError, RefusedError
from casfs.storage.base import Storage

MARK = "remote-writers"

_TEXT = (
    b"Hosts write to this repository over a network, where they hold no locks.\n"
    b"While this file is here, casfs removes data only a margin after it was found unneeded.\n"
)


def mark_remote_writers(storage: Storage) -> None:
    """Write the mark durably, unless the repository has it; raise StorageError."""
    if not is_marked(storage):
        storage.create(MARK, _TEXT)


def is_marked(storage: Storage) -> bool:
    """Return whether the repository has the mark; raise StorageError."""
    try:
        return storage.size(MARK) > 0
    except NotFoundError:
        return False


def is_shared(storage: Storage) -> bool:
    """Return whether hosts write, or may write, to the repository over a network; raise StorageError."""
    if not storage.capabilities.holds_locks:
        return True
    try:
        storage.size(MARK)
    except NotFoundError:
        return False
    return True


def require_no_remote_writers(storage: Storage) -> None:
    """Raise RefusedError if a host writes over a network to a repository that is pruned by its locks."""
    if is_shared(storage):
        raise RefusedError(
            f"a host has begun to write to {storage.url} over a network; nothing more was removed; run "
            "`casfs prune` again"
        )
