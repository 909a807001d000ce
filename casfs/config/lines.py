"""Line numbers of the keys of a TOML document, which the standard library's parser does not keep.

The scanner is given documents that `tomllib` has accepted, so it recognizes just enough of the grammar to
find where keys begin. The parser interprets the values.
"""

from __future__ import annotations

import re
import tomllib

KeyPath = tuple[str | int, ...]
"""Keys and positions in arrays that lead from the document to a value."""

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_BASIC_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_LITERAL_STRING = re.compile(r"'[^']*'")
# Up to two quotes may directly precede the three that end a multi-line string.
_LONG_BASIC_STRING = re.compile(r'"""(?:[^\\]|\\.)*?"""(?:"{0,2})', re.DOTALL)
_LONG_LITERAL_STRING = re.compile(r"'''.*?'''(?:'{0,2})", re.DOTALL)
_OTHER_VALUE = re.compile(r"[^,\]}#\n]+")


def find_key_lines(text: str) -> dict[KeyPath, int]:
    """Return the line, from 1, on which each key and each item of an array begins.

    `text` is a document that `tomllib.loads` accepts.
    """
    return _Scanner(text).scan()


class _Scanner:
    """One pass over a document; `_at` is the offset of the next character."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._counted_to = 0
        self._line = 1
        self._lines: dict[KeyPath, int] = {}
        self._array_lengths: dict[KeyPath, int] = {}

    def scan(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        while True:
            self._skip_blank()
            if self._at >= len(self._text):
                return self._lines
            if self._peek() == "[":
                table = self._scan_header()
            else:
                self._scan_pair(table)

    def _scan_header(self) -> KeyPath:
        line = self._line_here()
        is_array = self._text.startswith("[[", self._at)
        self._at += 2 if is_array else 1
        keys = self._scan_dotted_key()
        self._at += 2 if is_array else 1
        path = self._resolve(keys[:-1], line)
        path = (*path, keys[-1])
        self._lines.setdefault(path, line)
        if is_array:
            position = self._array_lengths.get(path, 0)
            self._array_lengths[path] = position + 1
            path = (*path, position)
            self._lines[path] = line
        elif path in self._array_lengths:
            path = (*path, self._array_lengths[path] - 1)
        return path

    def _resolve(self, keys: list[str], line: int) -> KeyPath:
        """Return the path of the table that a header names, through the last table of each array."""
        path: KeyPath = ()
        for key in keys:
            path = (*path, key)
            self._lines.setdefault(path, line)
            if path in self._array_lengths:
                path = (*path, self._array_lengths[path] - 1)
        return path

    def _scan_pair(self, table: KeyPath) -> None:
        line = self._line_here()
        path = table
        for key in self._scan_dotted_key():
            path = (*path, key)
            self._lines.setdefault(path, line)
        self._at += 1  # the equals sign
        self._skip_blank()
        self._scan_value(path)

    def _scan_dotted_key(self) -> list[str]:
        keys = []
        while True:
            self._skip_blank()
            keys.append(self._scan_simple_key())
            self._skip_blank()
            if self._peek() != ".":
                return keys
            self._at += 1

    def _scan_simple_key(self) -> str:
        if self._peek() == '"':
            token = self._take(_BASIC_STRING)
            return str(tomllib.loads(f"key = {token}")["key"])
        if self._peek() == "'":
            return self._take(_LITERAL_STRING)[1:-1]
        return self._take(_BARE_KEY)

    def _scan_value(self, path: KeyPath) -> None:
        if self._peek() == "[":
            self._scan_array(path)
        elif self._peek() == "{":
            self._scan_inline_table(path)
        elif self._text.startswith('"""', self._at):
            self._take(_LONG_BASIC_STRING)
        elif self._text.startswith("'''", self._at):
            self._take(_LONG_LITERAL_STRING)
        elif self._peek() == '"':
            self._take(_BASIC_STRING)
        elif self._peek() == "'":
            self._take(_LITERAL_STRING)
        else:
            self._take(_OTHER_VALUE)

    def _scan_array(self, path: KeyPath) -> None:
        self._at += 1
        position = 0
        while True:
            self._skip_blank()
            if self._peek() == "]":
                self._at += 1
                return
            item = (*path, position)
            self._lines[item] = self._line_here()
            self._scan_value(item)
            position += 1
            self._skip_comma()

    def _scan_inline_table(self, path: KeyPath) -> None:
        self._at += 1
        while True:
            self._skip_blank()
            if self._peek() == "}":
                self._at += 1
                return
            self._scan_pair(path)
            self._skip_comma()

    def _skip_comma(self) -> None:
        self._skip_blank()
        if self._peek() == ",":
            self._at += 1

    def _skip_blank(self) -> None:
        self._take(_BLANK)

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise ValueError(f"not a TOML document at offset {self._at}")
        self._at = match.end()
        return match.group()

    def _line_here(self) -> int:
        self._line += self._text.count("\n", self._counted_to, self._at)
        self._counted_to = self._at
        return self._line
