"""One run of a profile: backup, forget, prune and check when due, mirror; then notifications."""

from __future__ import annotations
