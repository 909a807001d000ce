"""Patterns against random trees, in the matcher, in backup and in restore; `git check-ignore` is the oracle.

One git process answers for all examples of a test. Each example is a directory of its own with a
.gitignore file, so that git reads just that example's patterns.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casfs.backup.exclude import Exclusions
from casfs.backup.run import BackupOptions, run_backup
from casfs.errors import NotFoundError
from casfs.format.tree import Node
from casfs.monitor import RecordingMonitor
from casfs.patterns import InvalidPatternError, Pattern, PatternMatcher, parse_patterns
from casfs.repository.creation import create_repository
from casfs.repository.opening import OpenOptions, open_for_writing
from casfs.repository.repository import Repository
from casfs.restore.restorer import RestoreOptions, Restorer
from tests.support.effort import EFFORT

pytestmark = pytest.mark.timeout(300 * EFFORT)

PIECES = (
    *(b"a", b"b", b"c", b"ab", b"A", b"1", b".", b"-", b" ", b"#", b"\xff", b"\xc3\xbc", b"\t"),
    *(b"/", b"/", b"/", b"*", b"*", b"**", b"**/", b"/**", b"/**/", b"***", b"?", b"!", b"\\"),
    *(b"[ab]", b"[!a]", b"[^b]", b"[a-c]", b"[]a]", b"[!]a]", b"[a-]", b"[-a]", b"[b-a]", b"[\\]]"),
    *(b"[[:alpha:]]", b"[![:digit:]]", b"[[:upper:]b]", b"[[:nope:]]", b"[[:alpha:", b"[[:a]"),
    *(b"[", b"]", b"[a", b"-c]", b":]", b"[/]", b"[a/b]", b"[\xc0-\xff]", b"\\a", b"\\*", b"\\/"),
)
"""What patterns are put together from, so that most of them mean something and many nearly do."""

NAMES = st.one_of(
    st.sampled_from([b"a", b"b", b"c", b"ab", b"abc", b"A", b"a.b", b"b c", b"a1"]),
    st.lists(
        st.sampled_from([b"a", b"b", b"c", b"A", b"1", b".", b"-", b" ", b"#", b"!", b"*", b"["])
        | st.sampled_from([b"]", b"\\", b"?", b":", b"\xff", b"\xc3\xbc", b"\n", b"\r", b"\t"]),
        min_size=1,
        max_size=4,
    ).map(b"".join),
).filter(lambda name: name not in (b".", b"..", b".git"))

LINES = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map(b"".join)

PATHS = st.lists(NAMES, min_size=1, max_size=4).map(b"/".join)


@dataclass(frozen=True, slots=True)
class Tree:
    """Paths of directories and of other entries; every parent is a directory."""

    directories: frozenset[bytes]
    others: frozenset[bytes]

    def entries(self) -> list[tuple[bytes, bool]]:
        return [
            *((path, True) for path in sorted(self.directories)),
            *((path, False) for path in sorted(self.others)),
        ]


def grow(paths: Sequence[bytes], leaves_are_directories: bool) -> Tree:
    directories = {b"/".join(parts) for path in paths for parts in _parents(path)}
    leaves = {path for path in paths if path not in directories}
    if leaves_are_directories:
        return Tree(frozenset(directories | leaves), frozenset())
    return Tree(frozenset(directories), frozenset(leaves))


def _parents(path: bytes) -> Iterator[list[bytes]]:
    parts = path.split(b"/")
    for length in range(1, len(parts)):
        yield parts[:length]


TREES = st.builds(grow, st.lists(PATHS, min_size=1, max_size=8), st.booleans())


def escape(name: bytes) -> bytes:
    """Return a pattern for a name, with a backslash before each byte that could mean something else."""
    return re.sub(rb"([*?\[\\!# ])", rb"\\\1", name)


@st.composite
def lines_about(draw: st.DrawFn, tree: Tree) -> bytes:
    """Return a pattern that matches one of the paths of a tree, or nearly does."""
    path, _ = draw(st.sampled_from(tree.entries()))
    names = path.split(b"/")
    if draw(st.booleans()):
        names = names[-1:]
    parts = [
        draw(st.sampled_from([escape(name), escape(name), escape(name[:1]) + b"*", b"*", b"**"]))
        for name in names
    ]
    sign, root, end = (draw(st.sampled_from([b"", text])) for text in (b"!", b"/", b"/"))
    return sign + root + b"/".join(parts) + end


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[bytes], Tree]:
    """Return lines of patterns, and a tree that some of them are about."""
    tree = draw(TREES)
    lines = st.one_of(LINES, lines_about(tree)).filter(lambda line: b"\n" not in line)
    return draw(st.lists(lines.filter(is_kept_by_git), min_size=1, max_size=5)), tree


@dataclass(slots=True)
class Git:
    """A repository, and a `git check-ignore` that is asked about it as long as the test runs."""

    top: Path
    process: subprocess.Popen[bytes]
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def ignored(self, lines: bytes, tree: Tree) -> set[bytes]:
        """Return the paths of a tree that git ignores with a .gitignore file in its top directory."""
        number = b"%d" % next(self.numbers)
        folder = os.path.join(os.fsencode(self.top), number)
        os.mkdir(folder)
        Path(os.fsdecode(folder), ".gitignore").write_bytes(lines)
        for path in sorted(tree.directories):
            os.mkdir(os.path.join(folder, path))
        paths = [path for path, _ in tree.entries()]
        assert self.process.stdin is not None
        self.process.stdin.write(b"".join(number + b"/" + path + b"\0" for path in paths))
        self.process.stdin.flush()
        return {path for path in paths if self._is_ignored(number + b"/" + path)}

    def _is_ignored(self, path: bytes) -> bool:
        """Return git's answer for the next path that was written."""
        source, _, pattern, answered = (self._field() for _ in range(4))
        assert answered == path
        return source != b"" and not pattern.startswith(b"!")

    def _field(self) -> bytes:
        assert self.process.stdout is not None
        read = bytearray()
        while (byte := self.process.stdout.read(1)) != b"\0":
            assert byte, "git ended"
            read += byte
        return bytes(read)


@pytest.fixture(scope="module")
def git(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Git]:
    folder = tmp_path_factory.mktemp("gitignore")
    top = folder / "repository"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_FLUSH": "1",
        "HOME": str(folder),
        "XDG_CONFIG_HOME": str(folder),
    }
    subprocess.run(["git", "init", "--quiet", top], env=environment, check=True)
    with subprocess.Popen(
        ["git", "check-ignore", "--no-index", "--stdin", "-z", "-v", "-n"],
        cwd=top,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        yield Git(top, process)
        assert process.stdin is not None
        process.stdin.close()


def selected(patterns: Sequence[Pattern], tree: Tree) -> set[bytes]:
    """Return the paths that a matcher selects in a descent that stops at what it selects."""
    matcher = PatternMatcher(patterns)
    found: set[bytes] = set()
    for path, is_directory in sorted(tree.entries()):
        above = path.rpartition(b"/")[0]
        if above in found or matcher.matches(path, is_directory):
            found.add(path)
    return found


def is_kept_by_git(line: bytes) -> bool:
    """Return whether a line has neither empty nor `.` components, which casfs removes and git does not."""
    bare = line.rstrip(b" \r").removeprefix(b"!")
    if bare.startswith(b"\\/"):
        return False
    bare = bare.replace(b"\\", b"")
    return not {b"", b"."} & set(bare.removeprefix(b"/").removesuffix(b"/").split(b"/"))


def spelled_for_git(line: bytes) -> bytes:
    """Return a line that every release of git reads as its manual says.

    Many compare the text before the first wildcard apart, and then take `**` after it for one at the
    beginning of a component. A backslash ends that text earlier and changes nothing else.
    """
    if line.startswith(b"#"):
        return line
    sign = b"!" if line.startswith(b"!") else b""
    return sign + re.sub(
        rb"\A(/?[^*?\[\\]*)([^*?\[\\/])(?=\*\*)", rb"\1\\\2", line.removeprefix(sign)
    )


def parsed(lines: Sequence[bytes]) -> list[Pattern]:
    """Return the patterns of those lines that are valid."""
    patterns = []
    for line in lines:
        try:
            patterns += parse_patterns(line, "test")
        except InvalidPatternError:
            continue
    return patterns


@given(case=cases())
@settings(max_examples=4 * settings().max_examples)
def test_patterns_select_what_git_ignores(git: Git, case: tuple[list[bytes], Tree]) -> None:
    lines, tree = case
    ignored = git.ignored(b"\n".join(map(spelled_for_git, lines)), tree)
    patterns = parsed(lines)
    assert selected(patterns, tree) == ignored
    matcher = PatternMatcher(patterns)
    for path, is_directory in tree.entries():
        assert (matcher.select(path, is_directory) is not None) == (path in ignored)


@pytest.mark.parametrize(
    "name",
    (
        *("alnum", "alpha", "blank", "cntrl", "digit", "graph"),
        *("lower", "print", "punct", "space", "upper", "xdigit"),
    ),
)
@pytest.mark.parametrize("sign", ["", "!", "^"])
def test_character_classes_hold_the_bytes_that_git_has_in_them(
    git: Git, name: str, sign: str
) -> None:
    line = f"[{sign}[:{name}:]]x".encode()
    names = [bytes([byte]) + b"x" for byte in range(1, 256) if byte != ord("/")]
    tree = Tree(frozenset(), frozenset(names))
    ignored = git.ignored(line, tree)
    assert 0 < len(ignored) < len(names)
    assert selected(parsed([line]), tree) == ignored


@given(
    data=st.lists(
        LINES
        | st.sampled_from([b"#a", b"a\\ ", b"a  ", b"\\#a", b"a\r", b"\xef\xbb\xbfa", b"a\\\\ "]),
        min_size=1,
        max_size=4,
    ),
    ends=st.lists(
        st.sampled_from([b"\n", b"\r\n", b"\n\n", b" \n", b"\r\r\n"]), min_size=4, max_size=4
    ),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    tree=TREES,
)
def test_files_of_patterns_are_read_as_git_reads_them(
    git: Git, data: list[bytes], ends: list[bytes], mark: bytes, tree: Tree
) -> None:
    lines = [spelled_for_git(line) for line in data if is_kept_by_git(line)]
    text = mark + b"".join(line + end for line, end in zip(lines, ends, strict=False))
    try:
        patterns = parse_patterns(text, "test")
    except InvalidPatternError as error:
        tree_of_one = git.ignored(error.pattern, tree)
        assert tree_of_one == set()
        return
    assert selected(patterns, tree) == git.ignored(text, tree)


class Workshop:
    """A repository, and a folder in which each example has a source and targets of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        create_repository(folder / "repository")

    def opened(self) -> Repository:
        return open_for_writing(self._folder / "repository", "test", OpenOptions(sync=False))

    def target(self) -> bytes:
        """Return the path of a folder that does not exist yet."""
        return os.fsencode(self._folder / str(next(self._numbers)))

    def grow(self, tree: Tree) -> bytes:
        """Return a new folder that holds a tree."""
        folder = self.target()
        os.mkdir(folder)
        for path in sorted(tree.directories):
            os.mkdir(folder + b"/" + path)
        for path in tree.others:
            os.close(os.open(folder + b"/" + path, os.O_WRONLY | os.O_CREAT))
        return folder


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


def entries_below(folder: bytes) -> set[bytes]:
    found = set()
    for where, directories, others in os.walk(folder):
        found |= {os.path.relpath(os.path.join(where, name), folder) for name in directories}
        found |= {os.path.relpath(os.path.join(where, name), folder) for name in others}
    return found


def ancestors(paths: Iterable[bytes]) -> set[bytes]:
    return {b"/".join(parts) for path in paths for parts in _parents(path)}


@given(case=cases())
def test_backup_and_restore_leave_out_and_take_what_git_ignores(
    git: Git, workshop: Workshop, case: tuple[list[bytes], Tree]
) -> None:
    lines, tree = case
    ignored = git.ignored(b"\n".join(map(spelled_for_git, lines)), tree)
    everything = tree.directories | tree.others
    patterns = tuple(parsed(lines))
    with workshop.opened() as repository, chdir(workshop.grow(tree)):

        def back_up(exclude: tuple[Pattern, ...]) -> Node:
            options = BackupOptions(paths=(b".",), exclusions=Exclusions(exclude))
            return run_backup(repository, options, RecordingMonitor()).snapshot.root

        def restored(root: Node, options: RestoreOptions) -> set[bytes]:
            target = workshop.target()
            restorer = Restorer(repository, options, RecordingMonitor())
            try:
                restorer.restore(b"", root, target, with_root=False)
            except NotFoundError:
                assert entries_below(target) == set()
            return entries_below(target)

        assert restored(back_up(patterns), RestoreOptions()) == everything - ignored
        whole = back_up(())
        assert restored(whole, RestoreOptions(exclude=patterns)) == everything - ignored
        wanted = ignored | ancestors(ignored) if patterns else everything
        assert restored(whole, RestoreOptions(include=patterns)) == wanted
