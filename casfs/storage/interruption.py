"""The request to end this process, at which every wait for a network looks.

A call of a library that waits for a server cannot be ended from outside, and a thread that waits for it would
keep the process alive until the timeout. So every wait for a remote storage ends within a second once
this is set; the process then ends without the threads that still wait.
"""

from __future__ import annotations

import errno
import threading

from casfs.errors import StorageUnavailableError

INTERRUPTED = threading.Event()
"""Set by the command line when a signal asks it to end."""


def interrupted_error(place: str) -> StorageUnavailableError:
    """Return the error of a wait that was ended."""
    return StorageUnavailableError("use", place, OSError(errno.EINTR, "interrupted"))
