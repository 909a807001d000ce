"""One run of a profile: backup, forget, prune and check when due, mirror; and who hears of it."""

from __future__ import annotations
