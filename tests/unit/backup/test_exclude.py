"""What a backup leaves out: patterns in gitignore syntax, markers and cache tags."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from casfs.backup.exclude import (
    CACHEDIR_SIGNATURE,
    CACHEDIR_TAG,
    Exclusions,
    PatternMatcher,
    read_patterns,
)
from casfs.errors import NotFoundError, StorageError, UsageError


def excluded(patterns: list[str], *paths: bytes) -> list[bytes]:
    """Return those of the paths that are left out; a path that ends in a slash is a directory's."""
    matcher = PatternMatcher(patterns)
    return [path for path in paths if matcher.matches(path.rstrip(b"/"), path.endswith(b"/"))]


class TestPatterns:
    def test_without_a_slash_fit_at_any_depth(self) -> None:
        paths = (b"a.o", b"x/y/a.o", b"a.oo", b"a.o/")
        assert excluded(["*.o"], *paths) == [b"a.o", b"x/y/a.o", b"a.o/"]

    def test_with_a_slash_fit_from_the_root_of_the_snapshot(self) -> None:
        paths = (b"home/a/x", b"x/home/a/x", b"home/a/y")
        assert excluded(["/home/a/x"], *paths) == [b"home/a/x"]
        assert excluded(["home/a/x"], *paths) == [b"home/a/x"]

    def test_that_end_in_a_slash_fit_directories_only(self) -> None:
        assert excluded(["cache/"], b"cache", b"cache/", b"x/cache/") == [b"cache/", b"x/cache/"]

    def test_let_the_last_that_fits_decide(self) -> None:
        paths = (b"a.log", b"keep.log", b"x/keep.log")
        assert excluded(["*.log", "!keep.log"], *paths) == [b"a.log"]
        assert excluded(["!keep.log", "*.log"], *paths) == list(paths)

    def test_with_two_stars_fit_over_any_depth(self) -> None:
        paths = (b"a/z", b"a/b/z", b"a/b/c/z", b"b/z")
        assert excluded(["a/**/z"], *paths) == [b"a/z", b"a/b/z", b"a/b/c/z"]

    def test_may_be_comments_or_empty_or_escaped(self) -> None:
        assert excluded(["# a", "", "   ", r"\#b", r"\!c"], b"# a", b"#b", b"!c", b"x") == [
            *(b"#b", b"!c")
        ]

    @pytest.mark.parametrize("pattern", ["!", "\\", "a/\\"])
    def test_that_mean_nothing_are_refused(self, pattern: str) -> None:
        with pytest.raises(UsageError, match="pattern to exclude is not valid"):
            PatternMatcher([pattern])


class TestOddNames:
    def test_that_are_not_utf8_fit_by_what_is_readable_of_them(self) -> None:
        assert excluded(["*.o"], b"\xff\xfe.o", b"\xff.x") == [b"\xff\xfe.o"]
        assert excluded([os.fsdecode(b"\xff*")], b"\xffabc", b"\xfeabc") == [b"\xffabc"]

    def test_that_end_in_a_line_feed_are_not_those_without(self) -> None:
        assert excluded(["*.o"], b"a.o\n", b"a.o") == [b"a.o"]
        assert excluded(["name"], b"name\n", b"name") == [b"name"]

    def test_with_a_line_feed_anywhere_on_the_way_fit_like_others(self) -> None:
        assert excluded(["*.o"], b"two\nlines/a.o") == [b"two\nlines/a.o"]
        assert excluded(["a?b", "/dir/"], b"a\nb", b"dir/") == [b"a\nb", b"dir/"]
        assert excluded(["a\nb"], b"a\nb", b"a", b"b", b"axb") == [b"a\nb"]


class TestMatcher:
    def test_is_none_where_there_is_nothing_to_match(self) -> None:
        assert Exclusions().matcher() is None
        matcher = Exclusions(("*.o",)).matcher()
        assert matcher is not None
        assert matcher.matches(b"a.o", is_directory=False)


class TestPatternFiles:
    def write(self, folder: Path, data: bytes) -> Path:
        path = folder / "patterns"
        path.write_bytes(data)
        return path

    def test_have_a_pattern_on_each_line(self, tmp_path: Path) -> None:
        lines = read_patterns(self.write(tmp_path, b"*.o\n# comment\n\n/home/a\nlast"))
        assert lines == ["*.o", "# comment", "", "/home/a", "last"]

    def test_may_have_the_line_ends_and_the_mark_of_another_system(self, tmp_path: Path) -> None:
        assert read_patterns(self.write(tmp_path, b"\xef\xbb\xbf*.o\r\n*.a\r\n")) == [
            *("*.o", "*.a", "")
        ]

    def test_keep_what_only_looks_like_a_line_end(self, tmp_path: Path) -> None:
        odd = "a\x0bb\x0cc\x1cd\x85e\u2028f\rg"
        assert read_patterns(self.write(tmp_path, odd.encode())) == [odd]

    def test_need_not_be_utf8(self, tmp_path: Path) -> None:
        (line,) = read_patterns(self.write(tmp_path, b"caf\xe9"))
        assert excluded([line], b"caf\xe9", b"caf\xc3\xa9") == [b"caf\xe9"]

    def test_that_are_not_there_or_no_files_are_clear_errors(self, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError, match="does not exist"):
            read_patterns(tmp_path / "none")
        with pytest.raises(StorageError, match="read the file of patterns"):
            read_patterns(tmp_path)


class TestMarkers:
    @pytest.fixture
    def fd(self, tmp_path: Path) -> Iterator[int]:
        fd = os.open(tmp_path, os.O_RDONLY)
        yield fd
        os.close(fd)

    def marker(self, exclusions: Exclusions, fd: int) -> bytes | None:
        return exclusions.marker_of([os.fsencode(name) for name in os.listdir(fd)], fd)

    def test_by_name_exclude_where_they_stand(self, tmp_path: Path, fd: int) -> None:
        exclusions = Exclusions(if_present=(b".nobackup", b".skip"))
        assert self.marker(exclusions, fd) is None
        (tmp_path / ".skip").touch()
        assert self.marker(exclusions, fd) == b".skip"
        assert self.marker(Exclusions(), fd) is None

    def test_of_caches_need_the_signature(self, tmp_path: Path, fd: int) -> None:
        tag = tmp_path / os.fsdecode(CACHEDIR_TAG)
        caches = Exclusions(caches=True)
        for data, found in (
            (b"", None),
            (CACHEDIR_SIGNATURE[:-1], None),
            (b" " + CACHEDIR_SIGNATURE, None),
            (CACHEDIR_SIGNATURE, CACHEDIR_TAG),
            (CACHEDIR_SIGNATURE + b"\n# made by a test\n", CACHEDIR_TAG),
        ):
            tag.write_bytes(data)
            assert self.marker(caches, fd) == found
            assert self.marker(Exclusions(), fd) is None

    @pytest.mark.parametrize("kind", ["symlink", "fifo", "directory"])
    def test_of_caches_are_regular_files(self, tmp_path: Path, fd: int, kind: str) -> None:
        tag = tmp_path / os.fsdecode(CACHEDIR_TAG)
        if kind == "symlink":
            (tmp_path / "real").write_bytes(CACHEDIR_SIGNATURE)
            tag.symlink_to("real")
        elif kind == "fifo":
            os.mkfifo(tag)
        else:
            tag.mkdir()
        assert self.marker(Exclusions(caches=True), fd) is None
