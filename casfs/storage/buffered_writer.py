"""An object that is collected on this machine and sent once its name is known.

The bytes wait in memory, or in an unnamed temporary file in the TMPDIR folder. The file disappears with its
process, and no other user can open it.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable
from typing import IO

from casfs.errors import StorageError
from casfs.storage.base import Data


class BufferedWriter:
    """An `ObjectWriter` for back ends that take only whole objects; `send(name, data)` creates one."""

    def __init__(self, send: Callable[[str, Data], None], in_memory: bool) -> None:
        self._send = send
        self._buffer: bytearray | None = bytearray() if in_memory else None
        self._file: IO[bytes] | None = None

    def append(self, data: Data) -> None:
        """Append bytes; raise StorageError where the temporary file cannot grow."""
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
            # The file is private and never truncated, so the mapping cannot fault. A mapping takes
            # no memory.
            mapped = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        except OSError as error:
            raise StorageError("read a temporary file in", tempfile.gettempdir(), error) from error
        with mapped, memoryview(mapped) as view:
            self._send(name, view)

    def discard(self) -> None:
        """Drop the appended bytes."""
        if self._buffer is not None:
            self._buffer = bytearray()
        if self._file is not None:
            self._file.close()
            self._file = None
