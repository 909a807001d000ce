"""Names that the whole-repository view gives: to times, to hosts and tags, to ids."""

from __future__ import annotations

from datetime import datetime
from itertools import pairwise

from casfs.digest import SHOWN_HEX_DIGITS, digest_of

_MAX_NAME_BYTES = 255


def time_name(time_ns: int) -> bytes:
    """Return the name of a snapshot of that time: local, to the second."""
    try:
        moment = datetime.fromtimestamp(time_ns // 1_000_000_000)
    except (OverflowError, ValueError, OSError):
        return b"@%d" % (time_ns // 1_000_000_000)
    return moment.strftime("%Y-%m-%dT%H:%M:%S").encode("ascii")


def safe_name(text: str) -> bytes:
    """Return a file name for a host or a tag, another one for each: odd characters as %XX.

    What would be too long is cut and told apart by a digest.
    """
    raw = text.encode("utf-8", "surrogateescape")
    name = b"".join(
        b"%%%02X" % byte if byte < 0x20 or byte in b"/%\x7f" else bytes([byte]) for byte in raw
    )
    if name in (b"", b".", b".."):
        name = name.replace(b".", b"%2E") or b"%"
    if len(name) > _MAX_NAME_BYTES:
        mark = b"%" + digest_of(raw).hex()[:16].encode("ascii")
        name = name[: _MAX_NAME_BYTES - len(mark)] + mark
    return name


def digits_that_differ(ids: list[str]) -> int:
    """Return how many digits tell all ids apart, twelve at least."""
    ordered = sorted(ids)
    digits = SHOWN_HEX_DIGITS
    for one, other in pairwise(ordered):
        while one[:digits] == other[:digits] and digits < 64:
            digits += 1
    return digits
