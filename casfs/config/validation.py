"""Validate the tables of a configuration file: every error names the file, the line and the key.

msgspec compares a table with its type. This module turns its messages into those of casfs.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from casfs.config.lines import KeyPath, find_key_lines
from casfs.config.values import convert_value
from casfs.errors import ConfigError

_TOML_PLACE = re.compile(r"(.*) \(at line (\d+), column \d+\)", re.DOTALL)
_PROBLEM_PLACE = re.compile(r"(.*) - at `\$(.*)`", re.DOTALL)
_PATH_PART = re.compile(r"\.([^.\[]+)|\[(\d+)\]")
_TYPE_NAMES = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "array": "an array",
    "object": "a table",
    "datetime": "a date",
    "date": "a date",
    "time": "a time",
}

_T = TypeVar("_T", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A configuration file, and the lines on which its keys begin."""

    path: Path
    lines: Mapping[KeyPath, int]

    def error(self, path: KeyPath, reason: str) -> ConfigError:
        """Return an error about the value at `path`, on the line of the nearest key that has one."""
        line = next(
            (self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), None
        )
        return ConfigError(str(self.path), line, _dotted(path), reason)


def parse_toml(path: Path, text: str) -> tuple[dict[str, Any], SourceFile]:
    """Parse a file; return its tables and the lines of its keys. Raises ConfigError."""
    try:
        document = tomllib.loads(text)
        return document, SourceFile(path, find_key_lines(text.replace("\r\n", "\n")))
    except tomllib.TOMLDecodeError as error:
        match = _TOML_PLACE.fullmatch(str(error))
        reason, line = (match[1], int(match[2])) if match is not None else (str(error), None)
        if line is None and "end of document" in reason:
            line = text.count("\n") + 1
        raise ConfigError(str(path), line, "", f"not valid TOML: {reason}") from error
    except RecursionError as error:
        raise ConfigError(str(path), None, "", "is nested too deeply") from error
    except ValueError as error:  # Python refuses to convert more than 4300 digits
        raise ConfigError(str(path), None, "", "has a number that is too long") from error


def convert_table(file: SourceFile, place: KeyPath, table: dict[str, Any], kind: type[_T]) -> _T:
    """Return the table at `place` of a file as a value of `kind`; raises ConfigError."""
    try:
        return msgspec.convert(table, kind, dec_hook=convert_value)
    except msgspec.ValidationError as error:
        match = _PROBLEM_PLACE.fullmatch(str(error))
        problem, inside = (match[1], match[2]) if match is not None else (str(error), "")
        path = (*place, *_path_parts(inside))
        raise _problem(file, path, problem, kind) from error


def _problem(file: SourceFile, path: KeyPath, problem: str, kind: type[_T]) -> ConfigError:
    """Return the error for msgspec's message about the value at `path`."""
    if match := re.fullmatch(r"Object contains unknown field `(.*)`", problem, re.DOTALL):
        known = _keys_at(kind, path[2:])
        return file.error((*path, match[1]), unknown_key("key", match[1], known))
    if match := re.fullmatch(r"Object missing required field `(.*)`", problem):
        return file.error((*path, match[1]), "is missing")
    if match := re.fullmatch(r"Expected `(.*)`, got `(.*)`", problem):
        wanted = [_TYPE_NAMES.get(word, word) for word in match[1].split(" | ") if word != "null"]
        found = _TYPE_NAMES.get(match[2], match[2])
        return file.error(path, f"must be {' or '.join(wanted)}, not {found}")
    if re.fullmatch(r"Expected `\w+` of length >= 1", problem):
        return file.error(path, "must not be empty")
    if match := re.fullmatch(r"Expected `\w+` (>=|<=) (-?\d+)", problem):
        bound = "at least" if match[1] == ">=" else "at most"
        return file.error(path, f"must be {bound} {match[2]}")
    if match := re.fullmatch(r"Invalid enum value '(.*)'", problem, re.DOTALL):
        choices = ", ".join(_choices_at(kind, path[2:]))
        return file.error(path, f"{match[1]!r} is not possible here; possible are: {choices}")
    return file.error(path, problem)


def _fields_at(kind: type[msgspec.Struct], path: KeyPath) -> msgspec.inspect.StructType | None:
    """Return the type of the table that lies at `path` inside a table of `kind`."""
    current = msgspec.inspect.type_info(kind)
    for part in path:
        if isinstance(part, int) or not isinstance(current, msgspec.inspect.StructType):
            return None
        inner = next(f.type for f in current.fields if f.encode_name == part)
        options = inner.types if isinstance(inner, msgspec.inspect.UnionType) else (inner,)
        current = next((o for o in options if isinstance(o, msgspec.inspect.StructType)), inner)
    return current if isinstance(current, msgspec.inspect.StructType) else None


def _keys_at(kind: type[msgspec.Struct], path: KeyPath) -> list[str]:
    table = _fields_at(kind, path)
    return [field.encode_name for field in table.fields] if table is not None else []


def _choices_at(kind: type[msgspec.Struct], path: KeyPath) -> list[str]:
    table = _fields_at(kind, path[:-1])
    if table is None:
        return []
    value = next(field.type for field in table.fields if field.encode_name == path[-1])
    options = value.types if isinstance(value, msgspec.inspect.UnionType) else (value,)
    names = []
    for option in options:
        if isinstance(option, msgspec.inspect.LiteralType):
            names += [str(choice) for choice in option.values]
        elif isinstance(option, msgspec.inspect.IntType):
            names.append("a number")
    return names


def unknown_key(what: str, name: str, known: list[str]) -> str:
    """Return the message about an unknown key, with the most similar known key."""
    close = difflib.get_close_matches(name, known, 1)
    if close:
        return f"unknown {what}; did you mean {close[0]}?"
    return f"unknown {what}; there are: {', '.join(known)}"


def _path_parts(text: str) -> KeyPath:
    return tuple(int(position) if position else key for key, position in _PATH_PART.findall(text))


def _dotted(path: KeyPath) -> str:
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f"{'.' if text else ''}{part}"
    return text
