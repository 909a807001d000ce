"""The list of paths that `--files-from` reads from a file or from standard input."""

from __future__ import annotations

import select
from io import RawIOBase

from casfs.errors import NotFoundError, UsageError

_MAX_LIST_BYTES = 64 * 1024 * 1024
"""Of a list of paths; a snapshot's file could not hold that many."""

_PIECE_BYTES = 64 * 1024


def read_path_list(name: str, nul: bool) -> list[bytes]:
    """Return the paths in a file, one per line; if every line ends with a carriage return, drop it."""
    where = "on standard input" if name == "-" else f"in {name}"
    try:
        with open(0 if name == "-" else name, "rb", 0, closefd=name != "-") as file:
            data = _read_all(file, _MAX_LIST_BYTES)
    except FileNotFoundError as error:
        raise NotFoundError(f"the file {name} of --files-from does not exist") from error
    if len(data) > _MAX_LIST_BYTES:
        raise UsageError(
            f"the paths {where} take more than {_MAX_LIST_BYTES} bytes; split the list"
        )
    if nul:
        return [path for path in data.split(b"\0") if path]
    if b"\0" in data:
        raise UsageError(f"the paths {where} hold NUL; add -0 where each path ends with it")
    lines = [line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line]
    if all(line.endswith(b"\r") for line in lines):
        lines = [path for line in lines if (path := line.removesuffix(b"\r"))]
    return lines


def _read_all(file: RawIOBase, max_bytes: int) -> bytes:
    """Return the content of a file, but at most `max_bytes` and one byte.

    Wait for data where another process made the pipe non-blocking.
    """
    data = bytearray()
    while len(data) <= max_bytes:
        piece = file.read(min(_PIECE_BYTES, max_bytes + 1 - len(data)))
        if piece is None:
            select.select([file], [], [])
        elif not piece:
            break
        else:
            data += piece
    return bytes(data)
