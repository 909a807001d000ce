"""Build the problems that a backup or a restore reports for single entries: a message and its details."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from casfs.display import escape_path
from casfs.errors import BlobError, IntegrityError, ReflinkError, TreeError
from casfs.format.tree import CaptureState, ChangeReason, Node, capture_of, captured_digest
from casfs.monitor import Problem, ProblemKind

MAX_SOURCES_LEFT_OUT = 10
"""Excluded sources that are reported one by one; a single problem counts the others."""


def unstable_capture(path: bytes, node: Node) -> Problem | None:
    """Return the problem of a file that changed or vanished during its capture, or None."""
    capture = capture_of(node)
    if capture is None:
        return None
    if node.state == CaptureState.STABLE and capture.reason != ChangeReason.VANISHED:
        return None
    reason = reason_label(capture.reason)
    captured = captured_digest(node)
    details: dict[str, str | int | None] = {
        "state": CaptureState(node.state).name.lower(),
        "reason": reason,
        "attempts": capture.attempts,
        "captured": captured.hex() if captured is not None else None,
        "observed": capture.observed.hex() if capture.observed is not None else None,
    }
    if node.state == CaptureState.CHANGED:
        times = "once" if capture.attempts == 1 else f"{capture.attempts} times"
        message = (
            f"it changed while it was read, {times} ({reason}); the snapshot marks it as changed"
        )
        return Problem(ProblemKind.CHANGED, path, message, details)
    if node.state == CaptureState.APPENDED:
        message = "it grew while it was read; its beginning is stored"
        return Problem(ProblemKind.APPENDED, path, message, details)
    message = "it vanished while it was read; its content is stored"
    return Problem(ProblemKind.VANISHED, path, message, details)


def backup_failed(path: bytes, error: OSError | TreeError) -> Problem:
    """Return the problem of an entry that could not be backed up."""
    if isinstance(error, FileNotFoundError):
        return Problem(ProblemKind.VANISHED, path, "it vanished before it was read")
    if isinstance(error, TreeError):
        return Problem(ProblemKind.UNREADABLE, path, f"it cannot be stored: {error}")
    action = "cloned" if isinstance(error, ReflinkError) else "read"
    message = f"it cannot be {action}: {error.strerror or error}"
    return Problem(ProblemKind.UNREADABLE, path, message)


def unread_xattrs(path: bytes, error: OSError) -> Problem:
    """Return the problem of an entry that is stored without some of its extended attributes."""
    message = f"not all of its extended attributes can be read: {error.strerror or error}"
    return Problem(ProblemKind.METADATA, path, message)


def missing_sources(sources: Iterable[bytes], error: OSError) -> Iterator[Problem]:
    """Yield a problem for each named source that does not exist or cannot be opened."""
    if isinstance(error, FileNotFoundError):
        message = "this source does not exist"
    else:
        message = f"this source cannot be read: {error.strerror or error}"
    for source in sources:
        yield Problem(ProblemKind.MISSING_SOURCE, source, message)


def sources_left_out(reasons: Mapping[bytes, str]) -> Iterator[Problem]:
    """Yield a problem for each named source that the options exclude; `reasons` are clauses.

    Of a long list, as `find` makes one, only the first `MAX_SOURCES_LEFT_OUT` get problems of their own.
    """
    for source, reason in islice(reasons.items(), MAX_SOURCES_LEFT_OUT):
        yield Problem(ProblemKind.LEFT_OUT, source, f"this source is left out: {reason}")
    more = len(reasons) - MAX_SOURCES_LEFT_OUT
    if more > 0:
        what = "1 more named source is" if more == 1 else f"{more} more named sources are"
        yield Problem(ProblemKind.LEFT_OUT, b"", f"{what} left out", {"sources": more})


def marked_source(path: bytes, marker: bytes) -> Problem:
    """Return the problem of a named directory whose marker excludes all its other entries."""
    message = f"all entries of this source are left out: it contains {escape_path(marker)}"
    return Problem(ProblemKind.LEFT_OUT, path, message)


def silent_change(path: bytes, before: Node, now: Node) -> Problem:
    """Return the problem of a file whose content changed while its metadata did not."""
    digests = [captured_digest(node) for node in (before, now)]
    was, captured = (digest.hex() if digest is not None else None for digest in digests)
    message = (
        "its content changed, but size, mtime and ctime did not; the new content is stored, and the "
        "previous snapshot keeps the old content"
    )
    return Problem(
        ProblemKind.SILENTLY_CHANGED, path, message, {"captured": captured, "previous": was}
    )


def repository_excluded(path: bytes) -> Problem:
    """Return the problem of a repository inside a source."""
    return Problem(ProblemKind.REPOSITORY, path, "the repository itself is left out")


def reason_label(reason: int) -> str:
    """Return the display form of a ChangeReason."""
    return ChangeReason(reason).name.lower().replace("_", " ")


def changed_file(path: bytes, node: Node) -> Problem:
    """Return the problem of a restored file in state `changed`."""
    capture = capture_of(node)
    reason = ChangeReason(capture.reason).name.lower() if capture is not None else "unknown"
    message = f"it changed while it was captured ({reason}); restored as captured"
    if capture is not None and capture.reason == ChangeReason.DAMAGED:
        message = "it had lost data when its snapshot was repaired; the lost ranges are zeros"
    return Problem(ProblemKind.CHANGED, path, message, {"reason": reason})


def damaged_entry(
    path: bytes, message: str, error: IntegrityError | None, ranges: Sequence[tuple[int, int]]
) -> Problem:
    """Return the problem of a damaged entry; `ranges` are the lost ranges in bytes."""
    details: dict[str, str | int | None] = {}
    if isinstance(error, BlobError):
        details["blob"] = error.digest.hex()
        details["pack"] = error.pack.hex() if error.pack is not None else None
    if ranges:
        details["ranges"] = ",".join(f"{begin}-{end}" for begin, end in ranges)
    return Problem(ProblemKind.DAMAGED, path, message, details)


def restore_failed(path: bytes, error: OSError) -> Problem:
    """Return the problem of an entry that could not be restored."""
    message = f"it cannot be restored: {error.strerror or error}"
    return Problem(ProblemKind.UNREADABLE, path, message)
