"""Replace a file that others read: they see the old content or the new one, never a part."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, data: bytes, *, mode: int = 0o600, durable: bool = False) -> None:
    """Replace a file atomically, or create it; with `durable`, only after its bytes are synced.

    A link in the place of the file is replaced, not followed. The name of the unfinished file begins with `.`
    and ends in `.tmp`; no other process can predict it. Raise OSError.
    """
    unfinished = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(fd, mode)
            if durable:
                os.fsync(fd)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
