"""The damage that readers of a mount met: logged once each, and listed in `.casfs/damage`.

Safe to share between threads. Memory is bounded: after 10,000 entries further damage is not recorded.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from casfs.display import escape_path
from casfs.errors import BlobError, CasfsError, StorageUnavailableError
from casfs_mount.logged_name import LoggedName

log = logging.getLogger(__name__)

_MAX_LINES = 10_000

_REPEATED_AFTER_S = 60.0
"""How often it is logged that the storage does not answer: every read fails then."""


class UnreadableError(CasfsError):
    """A range of a file cannot be read; the error was already logged and is the `__cause__`."""


class DamageLog:
    """The damage in one snapshot that readers of this mount met."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._unavailable_s: float | None = None
        self._lock = threading.Lock()
        self._lines: dict[tuple[bytes, bytes], str] = {}

    def add_range(self, path: bytes, begin: int, length: int, error: CasfsError) -> None:
        """Record that `length` bytes of a file, from `begin` on, cannot be read."""
        self._add(path, begin, f"bytes {begin} to {begin + length - 1}: {describe(error)}", error)

    def add_entry(self, path: bytes, error: CasfsError) -> None:
        """Record that another part of an entry cannot be read, such as a directory's tree."""
        self._add(path, -1, describe(error), error)

    def text(self) -> bytes:
        """Return one line for each damage, the first recorded one first."""
        with self._lock:
            lines = list(self._lines.values())
        return "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")

    def _add(self, path: bytes, begin: int, what: str, error: CasfsError) -> None:
        if isinstance(error, StorageUnavailableError):
            self._report_unavailable(path, error)
            return
        key = (path, error.digest if isinstance(error, BlobError) else b"%d" % begin)
        with self._lock:
            if key in self._lines or len(self._lines) >= _MAX_LINES:
                return
            name = escape_path(path) or "/"
            self._lines[key] = f"{name}: {what}"
        log.error("%s: %s", LoggedName(name), what)

    def _report_unavailable(self, path: bytes, error: StorageUnavailableError) -> None:
        """Log an error that says nothing about what is stored."""
        now_s = self._clock()
        with self._lock:
            if self._unavailable_s is not None and now_s - self._unavailable_s < _REPEATED_AFTER_S:
                return
            self._unavailable_s = now_s
        log.warning("%s cannot be read now: %s", LoggedName(escape_path(path) or "/"), error)


def describe(error: CasfsError) -> str:
    """Return the message of an error, with unabbreviated digests."""
    if isinstance(error, BlobError):
        pack = f" in pack {error.pack.hex()}" if error.pack is not None else ""
        return f"blob {error.digest.hex()}{pack}: {error.reason}"
    return str(error)
