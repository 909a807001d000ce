"""Patterns in the syntax of .gitignore files, matched against paths inside a snapshot.

The semantics are those of gitignore(5), whose globs git's wildmatch defines (`casfs.wildmatch`); a property
test compares them with `git check-ignore`. Patterns and paths are bytes, whatever the locale. There are two
differences, beside the one of the globs. Doubled slashes and `.` components are removed, so that `./x` means
`/x`; in git a pattern with them matches nothing. Any other pattern that can never match is refused.

Everything here is immutable after construction and can be used by any thread.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from casfs.errors import NotFoundError, StorageError, UsageError
from casfs.wildmatch import (
    NeverMatchesError,
    Wildcard,
    expression_of,
    literal_path,
    show_pattern,
    split_components,
)

MAX_PATTERN_BYTES = 16 * 1024
"""Of one pattern; a path that Linux takes in one piece has at most 4,096."""

MAX_FILE_BYTES = 16 * 1024 * 1024
"""Limit of a file of patterns."""


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
        components = split_components(body)
    except NeverMatchesError as error:
        raise InvalidPatternError(text, str(error)) from None
    by_name = _is_by_name(body)
    if components and components[-1] == [ord(".")]:
        only_directories = True
    components = [component for component in components if component not in ([], [ord(".")])]
    if not components:
        raise InvalidPatternError(text, "it names no entry")
    if [ord("."), ord(".")] in components:
        raise InvalidPatternError(text, "a path inside a snapshot has no '..'")
    if by_name and components == [[Wildcard.GLOBSTAR]]:
        components = [[Wildcard.STAR]]
    literal = literal_path(components)
    if literal is not None:
        return Pattern(text, negated, only_directories, by_name, literal)
    expression = expression_of(components)
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


def _is_by_name(body: bytes) -> bool:
    """Return whether a pattern without its last slash has none; one in a bracket expression counts."""
    return b"/" not in body.rstrip(b"/")


def _literals(patterns: Iterable[Pattern]) -> frozenset[bytes]:
    return frozenset(pattern.literal for pattern in patterns if pattern.literal is not None)


def _alternation(patterns: Iterable[Pattern]) -> re.Pattern[bytes] | None:
    expressions = [pattern.expression for pattern in patterns if pattern.literal is None]
    return re.compile(b"|".join(expressions)) if expressions else None
