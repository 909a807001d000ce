"""Telling: what a monitor is told of single entries of a backup or a restore, in sentences and in fields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from casfs.display import escape_path
from casfs.errors import BlobError, IntegrityError, ReflinkError
from casfs.format.tree import CaptureState, ChangeReason, Node, capture_of, captured_digest
from casfs.monitor import Problem, ProblemKind

MAX_SOURCES_LEFT_OUT = 10
"""Named sources that are left out and reported one by one."""


def unstable_capture(path: bytes, node: Node) -> Problem | None:
    """Return what there is to tell of how a file was captured, or None: it was there, and stable."""
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
        message = f"it changed while it was read, {times} ({reason}); it is flagged in the snapshot"
        return Problem(ProblemKind.CHANGED, path, message, details)
    if node.state == CaptureState.APPENDED:
        message = "it grew while it was read; its beginning is stored"
        return Problem(ProblemKind.APPENDED, path, message, details)
    message = "it vanished while it was read; what it held is stored"
    return Problem(ProblemKind.VANISHED, path, message, details)


def backup_failed(path: bytes, error: OSError) -> Problem:
    """Return what there is to tell of an entry that is not in the snapshot."""
    if isinstance(error, FileNotFoundError):
        return Problem(ProblemKind.VANISHED, path, "it vanished before it was read")
    what = "cannot be frozen" if isinstance(error, ReflinkError) else "cannot be read"
    message = f"it {what}: {error.strerror or error}"
    return Problem(ProblemKind.UNREADABLE, path, message)


def missing_sources(sources: Iterable[bytes], error: OSError) -> Iterator[Problem]:
    """Yield what there is to tell of named sources that are not there."""
    if isinstance(error, FileNotFoundError):
        message = "this source does not exist"
    else:
        message = f"this source cannot be read: {error.strerror or error}"
    for source in sources:
        yield Problem(ProblemKind.MISSING_SOURCE, source, message)


def sources_left_out(reasons: Mapping[bytes, str]) -> Iterator[Problem]:
    """Yield problems of named sources that options leave out, for clauses that say why.

    Where there are many, as of a list that `find` made, one problem stands for all but the first few.
    """
    for source, reason in islice(reasons.items(), MAX_SOURCES_LEFT_OUT):
        yield Problem(ProblemKind.LEFT_OUT, source, f"this source is left out: {reason}")
    more = len(reasons) - MAX_SOURCES_LEFT_OUT
    if more > 0:
        what = "1 more named source is" if more == 1 else f"{more} more named sources are"
        yield Problem(ProblemKind.LEFT_OUT, b"", f"{what} left out", {"sources": more})


def marked_source(path: bytes, marker: bytes) -> Problem:
    """Return the problem of a named directory that holds a marker."""
    message = f"all that is in this source is left out, because it holds {escape_path(marker)}"
    return Problem(ProblemKind.LEFT_OUT, path, message)


def silent_change(path: bytes, before: Node, now: Node) -> Problem:
    """Return what there is to tell of a file whose content moved while its metadata did not."""
    digests = [captured_digest(node) for node in (before, now)]
    was, captured = (digest.hex() if digest is not None else None for digest in digests)
    message = (
        "its content is not what it was, while size, mtime and ctime are; the new content is stored, "
        "and the snapshot before keeps the old"
    )
    return Problem(
        ProblemKind.SILENTLY_CHANGED, path, message, {"captured": captured, "previous": was}
    )


def repository_excluded(path: bytes) -> Problem:
    """Return what there is to tell of a repository that lies in the source."""
    return Problem(ProblemKind.REPOSITORY, path, "the repository itself is left out")


def reason_label(reason: int) -> str:
    """Return a word for why a file was not simply captured as stable."""
    return ChangeReason(reason).name.lower().replace("_", " ")


def changed_file(path: bytes, node: Node) -> Problem:
    """Return what there is to tell of a flagged file that is restored."""
    capture = capture_of(node)
    reason = ChangeReason(capture.reason).name.lower() if capture is not None else "unknown"
    message = f"it had changed while it was captured ({reason}); restored as captured"
    if capture is not None and capture.reason == ChangeReason.DAMAGED:
        message = "it had lost data when its snapshot was repaired; zeros stand there"
    return Problem(ProblemKind.CHANGED, path, message, {"reason": reason})


def damaged_entry(
    path: bytes, message: str, error: IntegrityError | None, ranges: Sequence[tuple[int, int]]
) -> Problem:
    """Return what there is to tell of an entry that is not restored whole."""
    details: dict[str, str | int | None] = {}
    if isinstance(error, BlobError):
        details["blob"] = error.digest.hex()
        details["pack"] = error.pack.hex() if error.pack is not None else None
    if ranges:
        details["ranges"] = ",".join(f"{begin}-{end}" for begin, end in ranges)
    return Problem(ProblemKind.DAMAGED, path, message, details)


def restore_failed(path: bytes, error: OSError) -> Problem:
    """Return what there is to tell of an entry that is not restored at all."""
    message = f"it cannot be restored: {error.strerror or error}"
    return Problem(ProblemKind.UNREADABLE, path, message)
