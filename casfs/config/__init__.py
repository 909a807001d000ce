"""The configuration: repositories and profiles by name, read from TOML files."""

from __future__ import annotations
