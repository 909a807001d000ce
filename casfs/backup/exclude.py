"""Exclusions of a backup: patterns in gitignore syntax, a size limit, and marked directories.

Patterns are matched against the path inside the snapshot: `/home/a/x` matches that entry only, `*.o`
matches entries in every directory.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from casfs.backup.source_fs import Handle, close, open_once, read_next
from casfs.display import escape_path
from casfs.paths import normalize_source_path, split
from casfs.patterns import Pattern, PatternMatcher
from casfs.wildmatch import show_pattern

CACHEDIR_TAG = b"CACHEDIR.TAG"
CACHEDIR_SIGNATURE = b"Signature: 8a477f597d28d172789f06886806bc55"
"""The first 43 bytes of a tag file (Cache Directory Tagging Specification 0.6)."""


@dataclass(frozen=True, slots=True)
class Exclusions:
    """The exclusion options. The last pattern that matches an entry decides about it.

    `caches` excludes directories with a CACHEDIR.TAG, `if_present` directories with an entry of one of
    these names; the marker itself is backed up. `larger_than` is a file size in bytes.
    """

    patterns: tuple[Pattern, ...] = ()
    caches: bool = False
    if_present: tuple[bytes, ...] = ()
    larger_than: int | None = None

    def matcher(self) -> PatternMatcher | None:
        """Return a matcher of the patterns, or None without patterns."""
        return PatternMatcher(self.patterns) if self.patterns else None

    def reason_against(
        self,
        source: bytes,
        matcher: PatternMatcher | None,
        lstat: Callable[[bytes], os.stat_result] = os.lstat,
    ) -> str | None:
        """Return why the options exclude a named source, as a clause of a message.

        Returns None where the source is not excluded or does not exist.
        """
        try:
            st = lstat(source)
        except OSError:
            return None
        if matcher is not None:
            path = b"/".join(split(normalize_source_path(source)))
            found = matcher.select(path, stat.S_ISDIR(st.st_mode))
            if found is not None:
                what = "it" if found.path == path else f"{escape_path(found.path)} above it"
                return f"the pattern '{show_pattern(found.pattern.text)}' matches {what}"
        if self.excludes_file(st):
            return f"it is larger than {self.larger_than} bytes"
        return None

    def excludes_file(self, st: os.stat_result) -> bool:
        """Return whether an entry is a regular file above the size limit."""
        limit = self.larger_than
        return limit is not None and st.st_size > limit and stat.S_ISREG(st.st_mode)

    def marker_of(self, names: list[bytes], fd: Handle) -> bytes | None:
        """Return the name of the marker that excludes all other entries of a directory, or None."""
        if self.caches and CACHEDIR_TAG in names and _has_signature(fd):
            return CACHEDIR_TAG
        for name in self.if_present:
            if name in names:
                return name
        return None


def _has_signature(above: Handle) -> bool:
    try:
        tag = open_once(above, CACHEDIR_TAG, False)
    except OSError:
        return False
    try:
        return read_next(tag, len(CACHEDIR_SIGNATURE)) == CACHEDIR_SIGNATURE
    except OSError:
        return False
    finally:
        close(tag)
