"""What a command says: people's lines, JSON lines, and file names that cannot forge either."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Container, Iterable
from datetime import datetime
from typing import Any

from casfs.digest import SHOWN_HEX_DIGITS
from casfs.display import format_size as format_size
from casfs.display import single_line

JsonValue = Any


class Output:
    """Standard output of one command, as text for people or as one JSON object a line."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def line(self, text: str) -> None:
        """Print a line for people; nothing with --json."""
        if not self.as_json:
            print(text)

    def emit(self, kind: str, /, **fields: JsonValue) -> None:
        """Print a JSON object of this type; nothing without --json."""
        if self.as_json:
            print(json.dumps({"type": kind, **fields}))

    def table(
        self, heads: tuple[str, ...], numbers: Container[str], rows: Iterable[tuple[str, ...]]
    ) -> None:
        """Print a table for people; columns whose heads are among `numbers` stand to the right."""
        lines = [heads, *rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
        for line in lines:
            cells = [
                f"{cell:>{width}}" if head in numbers else f"{cell:<{width}}"
                for head, cell, width in zip(heads, line, widths, strict=True)
            ]
            self.line("  ".join(cells).rstrip())

    def warn(self, sentence: str) -> None:
        """Print a sentence about a problem to standard error."""
        sys.stdout.flush()
        print(f"casfs: {single_line(sentence)}", file=sys.stderr)


def json_path(path: bytes, field: str = "path") -> dict[str, str]:
    """Return the fields that tell a path losslessly.

    The text has surrogate escapes for bytes that are not UTF-8; those paths are told in base64 too.
    """
    fields = {field: path.decode("utf-8", "surrogateescape")}
    try:
        path.decode("utf-8")
    except UnicodeDecodeError:
        fields[f"{field}_b64"] = base64.b64encode(path).decode("ascii")
    return fields


def short_id(digest: bytes) -> str:
    """Return the beginning of an id as people see it."""
    return digest.hex()[:SHOWN_HEX_DIGITS]


def format_time(time_ns: int) -> str:
    """Return a time as people read it: local, to the second."""
    try:
        return datetime.fromtimestamp(time_ns // 1_000_000_000).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return f"@{time_ns // 1_000_000_000}"


def iso_time(time_ns: int) -> str:
    """Return a time as programs read it: ISO 8601 with the local offset."""
    try:
        return datetime.fromtimestamp(time_ns / 1_000_000_000).astimezone().isoformat()
    except (OverflowError, ValueError, OSError):
        return f"@{time_ns / 1_000_000_000}"


def path_argument(text: str) -> bytes:
    """Return the bytes of a path that was given on the command line."""
    return os.fsencode(text)
