"""The names of repositories and profiles in the configuration."""

from __future__ import annotations

import re

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""They become names of files, of units and of labels."""
