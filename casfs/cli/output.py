"""The output of a command, as text or as JSON lines; file names cannot forge either."""

from __future__ import annotations

import os
import sys
import threading
from binascii import b2a_base64
from collections.abc import Container, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, TextIO

from casfs.digest import SnapshotId, short_id
from casfs.display import counted, single_line
from casfs.errors import CasfsError

JsonValue = Any


class TerminalLine:
    """The line of a terminal that shows progress. Other output clears it first. Thread-safe.

    `lock` is held while the line or other output is written.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._shown_cells = 0

    def show(self, text: str, cells: int) -> None:
        """Write the line over the previous one; `cells` is its width on the terminal."""
        with self.lock:
            padding = " " * (self._shown_cells - cells)
            sys.stderr.write(f"\r{text}{padding}")
            sys.stderr.flush()
            self._shown_cells = cells

    def clear(self) -> None:
        """Clear the line, if one is shown."""
        with self.lock:
            if self._shown_cells:
                sys.stderr.write(f"\r{' ' * self._shown_cells}\r")
                sys.stderr.flush()
                self._shown_cells = 0


terminal_line = TerminalLine()
"""The terminal has one line of progress, and all output of the process clears it."""


class Output:
    """Standard output of one command, as text or as one JSON object per line. Thread-safe.

    With `quiet` no summary is printed.
    """

    def __init__(self, as_json: bool, quiet: bool = False) -> None:
        self.as_json = as_json
        self._quiet = quiet

    def line(self, text: str) -> None:
        """Print a line of text; print nothing with --json."""
        if not self.as_json:
            _print(text, sys.stdout)

    def summary(self, text: str) -> None:
        """Print a line about what was done; print nothing with --json or --quiet."""
        if not self._quiet:
            self.line(text)

    def emit(self, kind: str, /, **fields: JsonValue) -> None:
        """Print a JSON object of this type; print nothing without --json."""
        if self.as_json:
            import json

            _print(json.dumps({"type": kind, **fields}), sys.stdout)

    def table(
        self,
        heads: tuple[str, ...],
        numbers: Container[str],
        rows: Iterable[tuple[str, ...]],
        texts: Mapping[str, int] | None = None,
        spare: Sequence[str] = (),
    ) -> None:
        """Print a table as text; columns whose heads are in `numbers` are aligned to the right.

        On a terminal that is too narrow, the `spare` columns are left out, and the columns of `texts` are
        wrapped, each to its number of characters at least.
        """
        from casfs.cli.table import table_lines

        for line in table_lines(heads, numbers, rows, texts or {}, _terminal_columns(), spare):
            self.line(line)

    def warn(self, message: str) -> None:
        """Print a message about a problem to standard error, on one line."""
        sys.stdout.flush()
        _print(f"casfs: {single_line(message)}", sys.stderr)


def _terminal_columns() -> int | None:
    """Return the width of the terminal, None where standard output is none."""
    if not sys.stdout.isatty():
        return None
    import shutil

    return shutil.get_terminal_size().columns


def _print(text: str, stream: TextIO) -> None:
    """Print a line as a whole, also beside other threads."""
    with terminal_line.lock:
        terminal_line.clear()
        stream.write(f"{text}\n")


_MOST_UNPROVEN = 20


def warn_of_unproven(output: Output, snapshot_ids: Sequence[SnapshotId]) -> None:
    """Print a line for each unproven snapshot, at most a screenful."""
    for snapshot_id in snapshot_ids[:_MOST_UNPROVEN]:
        output.warn(
            f"{short_id(snapshot_id)} is unproven: the owner of the storage may have made it"
        )
    if len(snapshot_ids) > _MOST_UNPROVEN:
        output.warn(f"{counted(len(snapshot_ids) - _MOST_UNPROVEN, 'more unproven snapshot')}")


def report_omitted(output: Output, omitted: Mapping[SnapshotId, CasfsError]) -> int:
    """Report the snapshots that could not be read, and return the exit code of an incomplete result."""
    code = 0
    for snapshot_id, error in omitted.items():
        output.emit("omitted", snapshot=snapshot_id.hex(), message=str(error))
        code = max(code, error.exit_code)
    if omitted:
        output.warn(
            f"{counted(len(omitted), 'snapshot')} could not be read (see above): the result is incomplete"
        )
    return code


def json_path(path: bytes, field: str = "path") -> dict[str, str]:
    """Return the JSON fields that hold a path without loss.

    The text has surrogate escapes for bytes that are not UTF-8; a path with such bytes is given in
    base64 too, as `path_b64`.
    """
    fields = {field: path.decode("utf-8", "surrogateescape")}
    try:
        path.decode("utf-8")
    except UnicodeDecodeError:
        fields[f"{field}_b64"] = _base64(path)
    return fields


def json_paths(paths: Sequence[bytes], field: str = "paths") -> dict[str, list[str]]:
    """Return the JSON fields that hold several paths without loss, as `json_path` does for one."""
    each = [json_path(path) for path in paths]
    fields = {field: [one["path"] for one in each]}
    if any("path_b64" in one for one in each):
        fields[f"{field}_b64"] = [_base64(path) for path in paths]
    return fields


def _base64(path: bytes) -> str:
    return b2a_base64(path, newline=False).decode("ascii")


def format_time(time_ns: int) -> str:
    """Return a time for text output: local time, to the second."""
    try:
        return datetime.fromtimestamp(time_ns // 1_000_000_000).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return f"@{time_ns // 1_000_000_000}"


def iso_time(time_ns: int) -> str:
    """Return a time for JSON output: ISO 8601 with the local offset."""
    try:
        return datetime.fromtimestamp(time_ns / 1_000_000_000).astimezone().isoformat()
    except (OverflowError, ValueError, OSError):
        return f"@{time_ns / 1_000_000_000}"


def path_argument(text: str) -> bytes:
    """Return the bytes of a path that the user typed."""
    return os.fsencode(text)
