"""An object that is collected on this machine and sent when its name is known.

It waits in memory, or in a temporary file without a name in the folder that TMPDIR names: such a file
disappears with its process and only this user could ever have opened it.
"""

from __future__ import annotations

import errno
import mmap
import tempfile
from collections.abc import Callable
from typing import IO

from casfs.errors import StorageError
from casfs.storage.base import Data


class BufferedWriter:
    """An `ObjectWriter` for places that take an object as a whole; `send(name, data)` creates it."""

    def __init__(self, send: Callable[[str, Data], None], in_memory: bool) -> None:
        self._send = send
        self._buffer: bytearray | None = bytearray() if in_memory else None
        self._file: IO[bytes] | None = None

    def append(self, data: Data) -> None:
        """Add bytes to the end; raise StorageError where the temporary file cannot grow."""
        if self._buffer is not None:
            self._buffer += data
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="casfs-")  # noqa: SIM115
            self._file.write(data)
        except OSError as error:
            raise StorageError("write a temporary file in", tempfile.gettempdir(), error) from error

    def commit(self, name: str) -> None:
        """Send the bytes under their name."""
        if self._buffer is not None:
            with memoryview(self._buffer) as view:
                self._send(name, view)
            self._buffer = bytearray()
        elif self._file is None:
            self._send(name, b"")
        else:
            self._send_file(name, self._file)
            self.discard()

    def _send_file(self, name: str, file: IO[bytes]) -> None:
        try:
            file.flush()
            size = file.seek(0, 2)
            # A private file that is never cut cannot fault for being short; mapped, it takes no memory.
            mapped = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        except OSError as error:
            raise StorageError("read a temporary file in", tempfile.gettempdir(), error) from error
        with mapped, memoryview(mapped) as view:
            self._send(name, view)

    def discard(self) -> None:
        """Drop what was appended."""
        if self._buffer is not None:
            self._buffer = bytearray()
        if self._file is not None:
            self._file.close()
            self._file = None


def size_conflict(url: str, name: str, found_bytes: int, wanted_bytes: int) -> StorageError:
    """Return the error for an object that is there already and is not the one that was to be written."""
    return StorageError(
        "create",
        f"{url}/{name}",
        OSError(
            errno.EEXIST,
            f"an object of this name has {found_bytes} bytes instead of {wanted_bytes}, so it is damaged "
            "or was not written by casfs; remove it and try again",
        ),
    )
