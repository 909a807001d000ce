"""The configuration: repositories by name and profiles of what is backed up when, from TOML files."""

from __future__ import annotations
