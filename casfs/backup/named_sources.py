"""The sources that a backup was given: which are excluded, missing, or the repository itself."""

from __future__ import annotations

import os

from casfs.backup.exclude import Exclusions
from casfs.backup.source_process import ServedMounts
from casfs.display import escape_path
from casfs.errors import NotFoundError, RefusedError
from casfs.monitor import Monitor
from casfs.problems import sources_left_out
from casfs.repository.place import Place, RemotePlace


def included_sources(
    paths: tuple[bytes, ...], exclusions: Exclusions, mounts: ServedMounts, monitor: Monitor
) -> tuple[bytes, ...]:
    """Return the named sources that are not excluded, and report the others.

    Raises NotFoundError where all sources are excluded.
    """
    matcher = exclusions.matcher()
    reasons = {
        source: reason
        for source in paths
        if (reason := exclusions.reason_against(source, matcher, mounts.stat)) is not None
    }
    included = tuple(source for source in paths if source not in reasons)
    if reasons and not included:
        source, reason = next(iter(reasons.items()))
        what = f"{escape_path(source)} is left out"
        if len(reasons) > 1:
            what = f"all sources are left out, as {escape_path(source)}"
        raise NotFoundError(f"{what}: {reason}; nothing was published")
    for problem in sources_left_out(reasons):
        monitor.problem(problem)
    return included


def _is_repository(path: bytes, mounts: ServedMounts, place: Place) -> bool:
    """Return whether a path is the folder of the repository."""
    if isinstance(place, RemotePlace):
        return False
    try:
        return os.path.samestat(mounts.stat(path, follow=True), os.stat(place.root))
    except OSError:
        return False


def require_a_source(sources: tuple[bytes, ...], mounts: ServedMounts, place: Place) -> None:
    """Raise NotFoundError where no source exists, RefusedError where only the repository itself does.

    The walk reports single missing sources as problems.
    """
    if not sources:
        return
    errors = {path: error for path in sources if (error := lstat_error(path, mounts)) is not None}
    found = [path for path in sources if path not in errors]
    if any(not _is_repository(path, mounts, place) for path in found):
        return
    if found:
        raise RefusedError(f"{place} is the repository itself; nothing was published")
    for path, error in errors.items():
        if not isinstance(error, FileNotFoundError):
            raise NotFoundError(
                f"{escape_path(path)} cannot be read: {error.strerror}; nothing was published"
            )
    names = ", ".join(escape_path(path) for path in sources[:3])
    more = ", …" if len(sources) > 3 else ""
    verb = "do not exist" if len(sources) > 1 else "does not exist"
    raise NotFoundError(f"{names}{more} {verb}; nothing was published")


def lstat_error(path: bytes, mounts: ServedMounts) -> OSError | None:
    """Return the error of `lstat` on a path, or None."""
    try:
        mounts.stat(path)
    except OSError as error:
        return error
    return None
