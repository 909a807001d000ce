"""Data of the tests, and what made it."""

from __future__ import annotations
