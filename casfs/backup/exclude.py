"""What a backup leaves out: patterns in gitignore syntax, sizes, and marked directories.

Patterns are matched against the path inside the snapshot, so that `/home/a/x` names just that entry
and `*.o` names it anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from casfs.errors import NotFoundError, StorageError, UsageError

CACHEDIR_TAG = b"CACHEDIR.TAG"
CACHEDIR_SIGNATURE = b"Signature: 8a477f597d28d172789f06886806bc55"
"""The first 43 bytes of a tag file (Cache Directory Tagging Specification 0.6)."""

_NOT_A_LINE = "\ufffe"
"""A code point that no text has, to stand for a line feed in a name."""


@dataclass(frozen=True, slots=True)
class Exclusions:
    """What to leave out; `patterns` in gitignore syntax, the last that fits decides."""

    patterns: tuple[str, ...] = ()
    caches: bool = False
    if_present: tuple[bytes, ...] = ()
    larger_than: int | None = None

    def matcher(self) -> PatternMatcher | None:
        """Return what tells for a path whether a pattern excludes it, or None without patterns."""
        return PatternMatcher(self.patterns) if self.patterns else None

    def marker_of(self, names: list[bytes], fd: int) -> bytes | None:
        """Return the name of the file that excludes a directory's other entries, or None."""
        if self.caches and CACHEDIR_TAG in names and _has_signature(fd):
            return CACHEDIR_TAG
        for name in self.if_present:
            if name in names:
                return name
        return None


class PatternMatcher:
    """Patterns in gitignore syntax, compiled once."""

    def __init__(self, patterns: Iterable[str]) -> None:
        from pathspec import GitIgnoreSpec

        try:
            self._spec = GitIgnoreSpec.from_lines(
                [pattern.replace("\n", _NOT_A_LINE) for pattern in patterns]
            )
        except ValueError as error:
            raise UsageError(f"a pattern to exclude is not valid: {error}") from error

    def matches(self, path: bytes, is_directory: bool) -> bool:
        """Tell whether the entry at this path of the snapshot is left out."""
        text = os.fsdecode(path)
        if "\n" in text:
            # To a regular expression, a line's end would be the name's.
            text = text.replace("\n", _NOT_A_LINE)
        return self._spec.match_file(text + "/" if is_directory else text)


def read_patterns(path: Path) -> list[str]:
    """Return the lines of a file of patterns; comments and blank lines are the matcher's business.

    Only a line feed, with or without a carriage return before it, ends a line.
    """
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
        return [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]
    except FileNotFoundError as error:
        raise NotFoundError(f"the file of patterns {path} does not exist") from error
    except OSError as error:
        raise StorageError("read the file of patterns", str(path), error) from error


def _has_signature(fd: int) -> bool:
    try:
        tag = os.open(CACHEDIR_TAG, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=fd)
    except OSError:
        return False
    try:
        return os.read(tag, len(CACHEDIR_SIGNATURE)) == CACHEDIR_SIGNATURE
    except OSError:
        return False
    finally:
        os.close(tag)
