"""File names as people see them: on one line, whatever bytes a name is made of."""

from __future__ import annotations


def shown(name: bytes) -> str:
    """Return a file name as people see it: control bytes, odd bytes and backslashes escaped.

    What comes out is one line, and two names never look alike.
    """
    text = name.decode("utf-8", "surrogateescape")
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(map(_shown_character, text))


def on_one_line(sentence: str) -> str:
    """Return a sentence for people in which no name that stands in it can forge a line."""
    if sentence.isprintable():
        return sentence
    return "".join(c if c.isprintable() else _shown_character(c) for c in sentence)


def _shown_character(character: str) -> str:
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
