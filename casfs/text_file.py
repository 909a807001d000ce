"""Replace a text file that other programs read: they see the old text or the new one, never a part."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from casfs.errors import StorageError


def replace_text_file(path: Path, text: str, action: str) -> None:
    """Replace a file atomically, readable by every user, or create it.

    The name of the unfinished file begins with `.` and ends in `.tmp`. Raise StorageError, whose message
    names the `action`, such as "write the unit".
    """
    try:
        fd, unfinished = tempfile.mkstemp(".tmp", f".{path.name}.", path.parent)
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(text)
                os.fchmod(fd, 0o644)
            os.replace(unfinished, path)
        except BaseException:
            os.unlink(unfinished)
            raise
    except OSError as error:
        raise StorageError(action, str(path), error) from error
