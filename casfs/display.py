"""Format values for display: file names of any bytes on one line, sizes with units, counts with nouns."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def escape_path(name: bytes) -> str:
    """Return a file name for display: control characters, undecodable bytes and backslashes escaped.

    The result is a single line, and different names have different results.
    """
    text = name.decode("utf-8", "surrogateescape")
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(map(_escape_character, text))


def single_line(sentence: str) -> str:
    """Return a message on a single line: a name inside it cannot forge a second line."""
    if sentence.isprintable():
        return sentence
    return "".join(c if c.isprintable() else _escape_character(c) for c in sentence)


def format_size(size: float) -> str:
    """Return a number of bytes with a binary unit."""
    for unit in _UNITS[:-1]:
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} {_UNITS[-1]}"


def format_duration(seconds: int) -> str:
    """Return a duration in the largest unit that divides it: `30 d`, `36 h`, `90 min` or `45 s`."""
    for unit_s, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds and seconds % unit_s == 0:
            return f"{seconds // unit_s} {unit}"
    return f"{seconds} s"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, as in "1 file" and "2 files"."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {plural if plural is not None else noun + 's'}"


def were(number: int) -> str:
    """Return the verb for a number of things: "was" or "were"."""
    return "was" if number == 1 else "were"


def _escape_character(character: str) -> str:
    code = ord(character)
    if character == "\\":
        return "\\\\"
    if character.isprintable():
        return character
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(character, f"\\x{code:02x}")
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
