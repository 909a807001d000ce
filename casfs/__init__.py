"""Content-addressed backups that say when a file changed while it was captured."""

from __future__ import annotations

__version__ = "0.1.0"
