"""All parsers of bytes that others wrote, by their names."""

from __future__ import annotations

from tests.fuzz import format_targets, key_targets, storage_targets, text_targets
from tests.fuzz.target import Target

_MODULES = (format_targets, key_targets, storage_targets, text_targets)

TARGETS: dict[str, Target] = {one.name: one for module in _MODULES for one in module.TARGETS}
