"""Names of snapshots, hosts and tags in the view of a whole repository."""

from __future__ import annotations

from datetime import datetime
from itertools import pairwise

from casfs.digest import SHOWN_HEX_DIGITS, digest_of

_MAX_NAME_BYTES = 255


def time_name(time_ns: int) -> bytes:
    """Return the name of a snapshot's folder: its local time, to the second.

    It has no colon: rsync and scp take what is before one for a host, and Windows has no such names.
    """
    try:
        moment = datetime.fromtimestamp(time_ns // 1_000_000_000)
    except (OverflowError, ValueError, OSError):
        return b"@%d" % (time_ns // 1_000_000_000)
    return moment.strftime("%Y-%m-%dT%H-%M-%S").encode("ascii")


def safe_name(text: str) -> bytes:
    """Return a unique file name for a host or a tag, with special characters as %XX.

    A name that would be too long is cut, and a digest is appended to keep it unique.
    """
    raw = text.encode("utf-8", "surrogateescape")
    name = b"".join(
        b"%%%02X" % byte if byte < 0x20 or byte in b"/:%\x7f" else bytes([byte]) for byte in raw
    )
    if name in (b"", b".", b".."):
        name = name.replace(b".", b"%2E") or b"%"
    if len(name) > _MAX_NAME_BYTES:
        mark = b"%" + digest_of(raw).hex()[:16].encode("ascii")
        name = name[: _MAX_NAME_BYTES - len(mark)] + mark
    return name


def digits_that_differ(ids: list[str]) -> int:
    """Return how many digits make all ids distinct, twelve at least."""
    ordered = sorted(ids)
    digits = SHOWN_HEX_DIGITS
    for one, other in pairwise(ordered):
        while one[:digits] == other[:digits] and digits < 64:
            digits += 1
    return digits
