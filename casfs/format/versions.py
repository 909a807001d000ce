"""The versions of the repository format that this casfs reads and writes (FORMAT.md, "Compatibility")."""

from __future__ import annotations

OLDEST_FORMAT = 1
NEWEST_FORMAT = 2

DEFAULT_FORMAT = 2
"""The format of new repositories."""
