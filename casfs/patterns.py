"""Patterns in the syntax of .gitignore files, matched against paths inside a snapshot.

The semantics are those of gitignore(5), whose globs git's wildmatch defines; a property test compares them
with `git check-ignore`. Patterns and paths are bytes, whatever the locale. There are three differences.
Doubled slashes and `.` components are removed, so that `./x` means `/x`; in git a pattern with them matches
nothing. Any other pattern that can never match is refused. And `**` directly after literal text means `*`,
as gitignore(5) says; many releases of git compare the text before the first wildcard apart, and then take
`x**/y` for `x` followed by `**/y`.

Matching takes linear memory and at most quadratic time in the lengths of pattern and path: each part of a
pattern between two wildcards is matched once, at the first place where it fits, and never reconsidered.
Everything here is immutable after construction and can be used by any thread.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import groupby
from pathlib import Path

from casfs.display import single_line
from casfs.errors import NotFoundError, StorageError, UsageError

MAX_PATTERN_BYTES = 16 * 1024
"""Of one pattern; a path that Linux takes in one piece has at most 4,096."""

MAX_FILE_BYTES = 16 * 1024 * 1024
"""Limit of a file of patterns."""

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


class _Wild(Enum):
    STAR = "*"
    """Any bytes of one name."""
    GLOBSTAR = "**"
    """Any number of names; only as the whole of a component."""


_Item = int | frozenset[int] | _Wild
"""A literal byte, a set of bytes one of which must be there, or a wildcard."""

_Component = list[_Item]


def show_pattern(text: bytes) -> str:
    """Return a pattern for messages: as the user wrote it, but on one line and not too long."""
    shortened = text if len(text) <= _MAX_SHOWN_BYTES else text[:_MAX_SHOWN_BYTES] + b"..."
    return single_line(shortened.decode("utf-8", "surrogateescape"))


class InvalidPatternError(UsageError):
    """A pattern that can never match anything."""

    def __init__(self, pattern: bytes, reason: str, place: str = "") -> None:
        self.pattern, self.reason, self.place = pattern, reason, place
        where = f" ({place})" if place else ""
        super().__init__(f"the pattern '{show_pattern(pattern)}'{where} matches nothing: {reason}")


@dataclass(frozen=True, slots=True)
class Pattern:
    """One pattern of a list; `text` is how the user wrote it."""

    text: bytes
    negated: bool = False
    only_directories: bool = False
    by_name: bool = True
    """True where the pattern is matched against the last component of a path, false for the whole path."""
    literal: bytes | None = None
    """The only name or path that it matches, where it has no wildcard."""
    expression: bytes = b""
    """A regular expression that is matched from the beginning and ends with `\\Z`, where it has one."""
    _compiled: re.Pattern[bytes] | None = field(default=None, repr=False, compare=False)

    def matches(self, path: bytes, is_directory: bool) -> bool:
        """Return whether the pattern matches this very path; `!` is ignored."""
        if self.only_directories and not is_directory:
            return False
        subject = path[path.rfind(b"/") + 1 :] if self.by_name else path
        if self._compiled is None:
            return subject == self.literal
        return self._compiled.match(subject) is not None


def parse_pattern(text: bytes) -> Pattern:
    """Return the pattern that an option holds: neither a comment nor a trailing space is special in it.

    Raises InvalidPatternError.
    """
    if len(text) > MAX_PATTERN_BYTES:
        raise InvalidPatternError(text, f"it is longer than {MAX_PATTERN_BYTES} bytes")
    negated = text.startswith(b"!")
    body = text[1:] if negated else text
    only_directories = body.endswith(b"/")
    if only_directories:
        body = body[:-1]
    try:
        components = _split(body)
    except _InvalidError as error:
        raise InvalidPatternError(text, str(error)) from None
    by_name = _is_by_name(body)
    if components and components[-1] == [ord(".")]:
        only_directories = True
    components = [component for component in components if component not in ([], [ord(".")])]
    if not components:
        raise InvalidPatternError(text, "it names no entry")
    if [ord("."), ord(".")] in components:
        raise InvalidPatternError(text, "a path inside a snapshot has no '..'")
    if by_name and components == [[_Wild.GLOBSTAR]]:
        components = [[_Wild.STAR]]
    literal = _literal(components)
    if literal is not None:
        return Pattern(text, negated, only_directories, by_name, literal)
    expression = _expression(components)
    compiled = re.compile(expression)
    return Pattern(text, negated, only_directories, by_name, None, expression, compiled)


def parse_patterns(data: bytes, name: str) -> list[Pattern]:
    """Return the patterns of a file in the syntax of .gitignore; `name` is the file's, for messages.

    Raises InvalidPatternError, with the line's number, and UsageError for bytes that are no text.
    """
    if b"\0" in data:
        raise UsageError(
            f"the file of patterns {name} holds a zero byte: it is no text, or not in an encoding "
            "that names can have, such as UTF-16; save it as UTF-8"
        )
    patterns = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        text = _trim_spaces(line.removesuffix(b"\r"))
        if not text or text.startswith(b"#"):
            continue
        try:
            patterns.append(parse_pattern(text))
        except InvalidPatternError as error:
            place = f"line {number} of {name}"
            raise InvalidPatternError(error.pattern, error.reason, place) from None
    return patterns


def read_patterns(path: Path) -> list[Pattern]:
    """Return the patterns of a file in the syntax of .gitignore."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise NotFoundError(f"the file of patterns {path} does not exist") from error
    except OSError as error:
        raise StorageError("read the file of patterns", str(path), error) from error
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"the file of patterns {path} is larger than {MAX_FILE_BYTES} bytes")
    return parse_patterns(data, str(path))


@dataclass(frozen=True, slots=True)
class _Alternatives:
    """The alternatives of several patterns: names, paths, and an expression each for those with wildcards."""

    names: frozenset[bytes]
    paths: frozenset[bytes]
    name_expression: re.Pattern[bytes] | None
    path_expression: re.Pattern[bytes] | None

    @classmethod
    def merge(cls, patterns: Sequence[Pattern]) -> _Alternatives:
        named = [pattern for pattern in patterns if pattern.by_name]
        anchored = [pattern for pattern in patterns if not pattern.by_name]
        return cls(
            _literals(named), _literals(anchored), _alternation(named), _alternation(anchored)
        )

    def match(self, path: bytes, name: bytes) -> bool:
        return (
            name in self.names
            or path in self.paths
            or (self.name_expression is not None and self.name_expression.match(name) is not None)
            or (self.path_expression is not None and self.path_expression.match(path) is not None)
        )


class PatternMatcher:
    """A list of patterns of which the last that matches decides."""

    def __init__(self, patterns: Iterable[Pattern]) -> None:
        self.patterns = tuple(patterns)
        # Neighbours of one sign decide the same, so that they are tried together.
        self._runs: list[tuple[bool, _Alternatives, _Alternatives]] = []
        for negated, run in groupby(reversed(self.patterns), lambda pattern: pattern.negated):
            both = list(run)
            others = [pattern for pattern in both if not pattern.only_directories]
            pair = _Alternatives.merge(both), _Alternatives.merge(others)
            self._runs.append((negated, *pair))

    def matches(self, path: bytes, is_directory: bool) -> bool:
        """Return whether the patterns select this very path, which has no slash at its ends.

        For a path below a directory that is selected the answer means nothing: everything there is, and
        no pattern with `!` changes that. A caller that descends from the root stops at such a directory.
        """
        name = path[path.rfind(b"/") + 1 :]
        for negated, directories, others in self._runs:
            if (directories if is_directory else others).match(path, name):
                return not negated
        return False

    def select(self, path: bytes, is_directory: bool) -> Selected | None:
        """Return why a path or a directory above it is selected, or None where neither is."""
        for level, is_level_directory in levels(path, is_directory):
            if self.matches(level, is_level_directory):
                for pattern in reversed(self.patterns):
                    if pattern.matches(level, is_level_directory):
                        return Selected(level, pattern)
        return None


@dataclass(frozen=True, slots=True)
class Selected:
    """The highest path that patterns select, and the pattern that decided."""

    path: bytes
    pattern: Pattern


def levels(path: bytes, is_directory: bool) -> Iterator[tuple[bytes, bool]]:
    """Yield each directory above a path, from the root down, then the path; with what is a directory."""
    end = path.find(b"/")
    while end >= 0:
        yield path[:end], True
        end = path.find(b"/", end + 1)
    if path:
        yield path, is_directory


def _trim_spaces(line: bytes) -> bytes:
    """Return a line without the spaces at its end that no backslash protects."""
    trimmed = line.rstrip(b" ")
    backslashes = len(trimmed) - len(trimmed.rstrip(b"\\"))
    if backslashes % 2 and len(trimmed) < len(line):
        return trimmed + b" "
    return trimmed


class _InvalidError(Exception):
    """Why a pattern can never match."""


def _is_by_name(body: bytes) -> bool:
    """Return whether a pattern without its last slash has none; one in a bracket expression counts."""
    return b"/" not in body.rstrip(b"/")


def _split(body: bytes) -> list[_Component]:
    """Return the components of a pattern. Raise _InvalidError."""
    components: list[_Component] = [[]]
    position = 0
    while position < len(body):
        byte = body[position]
        if byte == _SLASH:
            components.append([])
        elif byte == ord("\\"):
            position += 1
            if position == len(body):
                raise _InvalidError("it ends in a backslash that escapes nothing")
            if body[position] != _SLASH:
                components[-1].append(body[position])
            else:
                if components[-1] == [_Wild.GLOBSTAR]:
                    # To wildmatch, `**` before an escaped slash is at least one name.
                    components.insert(-1, [_Wild.STAR])
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
            components[-1].append(_Wild.GLOBSTAR if many else _Wild.STAR)
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
                raise _InvalidError("a '[' is not closed by ']'")
            if end > position + 2 and body[end - 1] == ord(":"):
                name = body[position + 2 : end - 1]
                if name not in _CLASSES:
                    raise _InvalidError(f"there is no character class '{show_pattern(name)}'")
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
        raise _InvalidError("a bracket expression matches no character")
    return found, position


def _byte_at(body: bytes, position: int) -> int:
    if position >= len(body):
        raise _InvalidError("a '[' is not closed by ']'")
    return body[position]


def _literal(components: list[_Component]) -> bytes | None:
    """Return the only path that components match, or None where there are several."""
    names = []
    for component in components:
        name = bytes(item for item in component if isinstance(item, int))
        if len(name) < len(component):
            return None
        names.append(name)
    return b"/".join(names)


def _expression(components: list[_Component]) -> bytes:
    """Return a regular expression for a whole name or path.

    Its groups that could match in several ways are atomic. That gives up no match: what follows them
    begins with a wildcard of the same kind, for which an earlier beginning is never worse.
    """
    if components[-1] == [_Wild.GLOBSTAR]:
        components = [*components, [_Wild.STAR]]
    runs: list[list[bytes]] = [[]]
    for component in components:
        if component == [_Wild.GLOBSTAR]:
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


def _name_expression(component: _Component) -> bytes:
    """Return a regular expression for one name, which must be followed by a slash or the end."""
    parts = [b""]
    for item in component:
        if isinstance(item, _Wild):
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


def _literals(patterns: Iterable[Pattern]) -> frozenset[bytes]:
    return frozenset(pattern.literal for pattern in patterns if pattern.literal is not None)


def _alternation(patterns: Iterable[Pattern]) -> re.Pattern[bytes] | None:
    expressions = [pattern.expression for pattern in patterns if pattern.literal is None]
    return re.compile(b"|".join(expressions)) if expressions else None
