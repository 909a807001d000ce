"""Git's globs (wildmatch), parsed into components and translated into regular expressions over bytes.

`**` directly after literal text means `*`, as gitignore(5) says; many releases of git compare the text before
the first wildcard apart, and then take `x**/y` for `x` followed by `**/y`.

Matching takes linear memory and at most quadratic time in the lengths of pattern and path: each part of a
pattern between two wildcards is matched once, at the first place where it fits, and never reconsidered.
"""

from __future__ import annotations

import re
import string
from enum import Enum

from casfs.display import single_line

_MAX_SHOWN_BYTES = 200

_SLASH = ord("/")
_ALL_BYTES = frozenset(range(1, 256)) - {_SLASH}
"""The bytes that a name can contain, and so the bytes that a wildcard or bracket expression can match."""


def _bytes_of(characters: str) -> frozenset[int]:
    return frozenset(characters.encode())


_GRAPH = string.ascii_letters + string.digits + string.punctuation
_CLASSES = {
    b"alnum": _bytes_of(string.ascii_letters + string.digits),
    b"alpha": _bytes_of(string.ascii_letters),
    b"blank": _bytes_of(" \t"),
    b"cntrl": frozenset((*range(32), 127)),
    b"digit": _bytes_of(string.digits),
    b"graph": _bytes_of(_GRAPH),
    b"lower": _bytes_of(string.ascii_lowercase),
    b"print": _bytes_of(_GRAPH + " "),
    b"punct": _bytes_of(string.punctuation),
    b"space": _bytes_of(" \t\n\r"),
    b"upper": _bytes_of(string.ascii_uppercase),
    b"xdigit": _bytes_of(string.hexdigits),
}
"""The POSIX character classes as git has them: ASCII only, in every locale."""


class Wildcard(Enum):
    """A wildcard that matches several bytes."""

    STAR = "*"
    """Any bytes of one name."""
    GLOBSTAR = "**"
    """Any number of names; only as the whole of a component."""


Item = int | frozenset[int] | Wildcard
"""A literal byte, a set of bytes one of which must be there, or a wildcard."""

Component = list[Item]


class NeverMatchesError(Exception):
    """A pattern can never match; the message says why."""


def show_pattern(text: bytes) -> str:
    """Return a pattern for messages: as the user wrote it, but on one line and not too long."""
    shortened = text if len(text) <= _MAX_SHOWN_BYTES else text[:_MAX_SHOWN_BYTES] + b"..."
    return single_line(shortened.decode("utf-8", "surrogateescape"))


def split_components(body: bytes) -> list[Component]:
    """Return the components of a pattern, which slashes separate; raise NeverMatchesError."""
    components: list[Component] = [[]]
    position = 0
    while position < len(body):
        byte = body[position]
        if byte == _SLASH:
            components.append([])
        elif byte == ord("\\"):
            position += 1
            if position == len(body):
                raise NeverMatchesError("it ends in a backslash that escapes nothing")
            if body[position] != _SLASH:
                components[-1].append(body[position])
            else:
                if components[-1] == [Wildcard.GLOBSTAR]:
                    # To wildmatch, `**` before an escaped slash is at least one name.
                    components.insert(-1, [Wildcard.STAR])
                components.append([])
        elif byte == ord("["):
            members, position = _parse_bracket(body, position)
            components[-1].append(members)
        elif byte == ord("?"):
            components[-1].append(_ALL_BYTES)
        elif byte == ord("*"):
            end = position + 1
            while body[end : end + 1] == b"*":
                end += 1
            is_whole = not components[-1] and (
                end == len(body) or body[end] == _SLASH or body.startswith(b"\\/", end)
            )
            many = is_whole and end - position > 1
            components[-1].append(Wildcard.GLOBSTAR if many else Wildcard.STAR)
            position = end - 1
        else:
            components[-1].append(byte)
        position += 1
    return components


def _parse_bracket(body: bytes, position: int) -> tuple[frozenset[int], int]:
    """Return the bytes that the bracket expression at a position matches, and where its `]` is.

    It follows wildmatch step by step: which `-` is a range, which `]` is a member, and what a class that
    is not closed by `:]` means.
    """
    position += 1
    negated = body[position : position + 1] in (b"!", b"^")
    position += negated
    first = position
    members: set[int] = set()
    previous: int | None = None
    while True:
        byte = _byte_at(body, position)
        if byte == ord("]") and position > first:
            break
        if byte == ord("\\"):
            position += 1
            previous = _byte_at(body, position)
            members.add(previous)
        elif (
            byte == ord("-")
            and previous is not None
            and body[position + 1 : position + 2] not in (b"", b"]")
        ):
            position += 1
            last = _byte_at(body, position)
            if last == ord("\\"):
                position += 1
                last = _byte_at(body, position)
            members.update(range(previous, last + 1))
            previous = None
        elif body.startswith(b"[:", position):
            end = body.find(b"]", position + 2)
            if end < 0:
                raise NeverMatchesError("a '[' is not closed by ']'")
            if end > position + 2 and body[end - 1] == ord(":"):
                name = body[position + 2 : end - 1]
                if name not in _CLASSES:
                    raise NeverMatchesError(f"there is no character class '{show_pattern(name)}'")
                members |= _CLASSES[name]
                previous = None
                position = end
            else:
                members.add(byte)
                previous = byte
        else:
            members.add(byte)
            previous = byte
        position += 1
    found = _ALL_BYTES - members if negated else _ALL_BYTES & members
    if not found:
        raise NeverMatchesError("a bracket expression matches no character")
    return found, position


def _byte_at(body: bytes, position: int) -> int:
    if position >= len(body):
        raise NeverMatchesError("a '[' is not closed by ']'")
    return body[position]


def literal_path(components: list[Component]) -> bytes | None:
    """Return the only path that components match, or None where there are several."""
    names = []
    for component in components:
        name = bytes(item for item in component if isinstance(item, int))
        if len(name) < len(component):
            return None
        names.append(name)
    return b"/".join(names)


def expression_of(components: list[Component]) -> bytes:
    """Return a regular expression for a whole name or path.

    Its groups that could match in several ways are atomic. That gives up no match: what follows them
    begins with a wildcard of the same kind, for which an earlier beginning is never worse.
    """
    if components[-1] == [Wildcard.GLOBSTAR]:
        components = [*components, [Wildcard.STAR]]
    runs: list[list[bytes]] = [[]]
    for component in components:
        if component == [Wildcard.GLOBSTAR]:
            if runs[-1] or len(runs) == 1:
                runs.append([])
        else:
            runs[-1].append(_name_expression(component))
    last = runs.pop()
    parts = []
    for number, run in enumerate(runs):
        names = b"".join(name + b"/" for name in run)
        parts.append(rb"(?>(?:[^/]+/)*?%b)" % names if number else names)
    if runs:
        parts.append(rb"(?:[^/]+/)*?")
    return b"".join(parts) + b"/".join(last) + rb"\Z"


def _name_expression(component: Component) -> bytes:
    """Return a regular expression for one name, which must be followed by a slash or the end."""
    parts = [b""]
    for item in component:
        if isinstance(item, Wildcard):
            parts.append(b"")
        else:
            parts[-1] += _byte_expression(item)
    if len(parts) == 1:
        return parts[0]
    middle = b"".join(rb"(?>[^/]*?%b)" % part for part in parts[1:-1] if part)
    return parts[0] + middle + b"[^/]*" + parts[-1] + rb"(?=/|\Z)"


def _byte_expression(item: int | frozenset[int]) -> bytes:
    if isinstance(item, int):
        return re.escape(bytes([item]))
    if item == _ALL_BYTES:
        return b"[^/]"
    return b"[" + b"".join(rb"\x%02x" % byte for byte in sorted(item)) + b"]"
