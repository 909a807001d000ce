"""List the values of the configuration, each with the file and the line that it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from casfs.config.file import Configuration
from casfs.config.profiles import Profile
from casfs.config.repositories import NamedRepository
from casfs.config.values import ConfigText, PingUrl


@dataclass(frozen=True, slots=True)
class ConfigValue:
    """One key of a table; `line` is None for a default. A value of None is not set."""

    section: str
    name: str
    key: str
    value: Any
    file: str
    line: int | None


def list_values(configuration: Configuration) -> Iterator[ConfigValue]:
    """Yield every value of every repository and profile; `keep.daily` is `daily` in the table `keep`."""
    tables: list[tuple[str, str, NamedRepository | Profile]] = []
    tables += [("repositories", name, table) for name, table in configuration.repositories.items()]
    tables += [("profiles", name, table) for name, table in configuration.profiles.items()]
    for section, name, table in tables:
        file = configuration.file_of(section, name)
        for path, value in _values(table, ()):
            line = file.lines.get((section, name, *path))
            yield ConfigValue(section, name, ".".join(path), value, str(file.path), line)


def _values(table: msgspec.Struct, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for field in msgspec.structs.fields(table):
        value = getattr(table, field.name)
        inner = (*path, field.encode_name)
        if isinstance(value, msgspec.Struct):
            yield from _values(value, inner)
        else:
            yield inner, _plain(value)


def _plain(value: Any) -> Any:
    """Return a value as it is written in the file, but without the path of a ping URL, which is a secret."""
    if isinstance(value, PingUrl):
        return value.host
    if isinstance(value, ConfigText):
        return value.text
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
