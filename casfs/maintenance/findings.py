"""The findings of a check: objects that are damaged, missing or inconsistent."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from casfs.digest import Digest, PackId, SnapshotId
from casfs.errors import CasfsError, PackError, StorageError

_REFUSED = frozenset([errno.EACCES, errno.EPERM])


@dataclass(frozen=True, slots=True)
class Finding:
    """A damaged, missing or inconsistent object.

    `what` is the kind of object: "pack", "blob", "index", "delta", "session", "snapshot list", "snapshot",
    "tree" or "file".
    Fields that do not apply are None. `ranges` are the lost ranges of a file: begin and end in bytes.
    """

    what: str
    message: str
    pack: PackId | None = None
    blob: Digest | None = None
    snapshot: SnapshotId | None = None
    path: bytes | None = None
    ranges: tuple[tuple[int, int], ...] = ()


def is_refused(error: CasfsError) -> bool:
    """Return whether an object could not be read because this user has no permission to read it."""
    return isinstance(error, StorageError) and error.cause.errno in _REFUSED


def reason_of(error: CasfsError) -> str:
    """Return the message of an error for a finding, which names the pack itself."""
    return error.reason if isinstance(error, PackError) else str(error)
