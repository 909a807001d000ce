"""Patterns in gitignore syntax: examples of what each form means, and of what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from casfs.errors import NotFoundError, StorageError, UsageError
from casfs.patterns import (
    MAX_PATTERN_BYTES,
    InvalidPatternError,
    PatternMatcher,
    parse_pattern,
    parse_patterns,
    read_patterns,
)


def selected(patterns: list[bytes], *paths: bytes) -> list[bytes]:
    """Return the paths that are selected, with what is below them; directories end in a slash."""
    matcher = PatternMatcher([parse_pattern(pattern) for pattern in patterns])
    return [path for path in paths if matcher.select(path.rstrip(b"/"), path.endswith(b"/"))]


class TestGlobs:
    def test_a_pattern_without_a_slash_matches_at_any_depth(self) -> None:
        paths = (b"a.o", b"x/y/a.o", b"a.oo", b"a.o/")
        assert selected([b"*.o"], *paths) == [b"a.o", b"x/y/a.o", b"a.o/"]

    def test_a_pattern_with_a_slash_matches_from_the_root_of_the_snapshot(self) -> None:
        paths = (b"home/a/x", b"x/home/a/x", b"home/a/y")
        assert selected([b"/home/a/x"], *paths) == [b"home/a/x"]
        assert selected([b"home/a/x"], *paths) == [b"home/a/x"]

    def test_a_pattern_that_ends_in_a_slash_matches_directories_only(self) -> None:
        paths = (b"cache", b"cache/", b"x/cache/", b"x/cache/y")
        assert selected([b"cache/"], *paths) == [b"cache/", b"x/cache/", b"x/cache/y"]

    def test_two_stars_match_any_number_of_directories(self) -> None:
        paths = (b"a/z", b"a/b/z", b"a/b/c/z", b"b/z")
        assert selected([b"a/**/z"], *paths) == [b"a/z", b"a/b/z", b"a/b/c/z"]
        assert selected([b"a/**"], b"a/", *paths) == [b"a/z", b"a/b/z", b"a/b/c/z"]
        assert selected([b"**/z"], b"z", *paths) == [b"z", *paths]

    def test_two_stars_beside_other_characters_are_like_one(self) -> None:
        assert selected([b"a**/z"], b"ab/z", b"a/z", b"az", b"ab/c/z") == [b"ab/z", b"a/z"]

    def test_character_classes_match_what_posix_says(self) -> None:
        assert selected([b"[[:alpha:]]"], b"a", b"1", b"Z") == [b"a", b"Z"]
        assert selected([b"x[[:digit:][:upper:]_]"], b"x1", b"xA", b"x_", b"xa") == [
            *(b"x1", b"xA", b"x_")
        ]

    def test_matching_is_case_sensitive(self) -> None:
        assert selected([b"*.TMP"], b"a.tmp", b"a.TMP") == [b"a.TMP"]

    def test_a_backslash_takes_the_meaning_from_the_next_character(self) -> None:
        paths = (b"#b", b"!c", b"x*", b"xy", b"e ")
        assert selected([rb"\#b", rb"\!c", rb"x\*", b"e\\ "], *paths) == [
            *(b"#b", b"!c", b"x*", b"e ")
        ]


class TestReinclusion:
    def test_the_last_pattern_that_matches_decides(self) -> None:
        paths = (b"a.log", b"keep.log", b"x/keep.log")
        assert selected([b"*.log", b"!keep.log"], *paths) == [b"a.log"]
        assert selected([b"!keep.log", b"*.log"], *paths) == list(paths)

    def test_everything_but_one_suffix_can_be_left_out_at_any_depth(self) -> None:
        paths = (b"a.c", b"a.o", b"x/", b"x/b.c", b"x/b.o", b"x/y/c.c")
        assert selected([b"*", b"!*/", b"!*.c"], *paths) == [b"a.o", b"x/b.o"]

    def test_one_entry_can_be_kept_of_all_that_is_below_a_directory(self) -> None:
        paths = (b"build/", b"build/drop", b"build/keep/", b"build/keep/x", b"build/y/keep")
        left_out = [b"build/drop", b"build/y/keep"]
        assert selected([b"build/**", b"!build/keep"], b"build/keep", b"build/x") == [b"build/x"]
        assert selected([b"build/**", b"!build/keep", b"!build/keep/**"], *paths) == left_out
        assert selected([b"build/*", b"!build/keep"], *paths) == left_out

    def test_a_pattern_after_one_with_an_exclamation_mark_counts(self) -> None:
        assert selected([b"!*", b"x"], b"x/", b"x/y", b"z") == [b"x/", b"x/y"]

    def test_nothing_below_an_excluded_directory_comes_back(self) -> None:
        assert selected([b"build", b"!build/keep"], b"build/keep") == [b"build/keep"]


class TestPathsAsPeopleWriteThem:
    def test_a_dot_at_the_beginning_means_the_root_of_the_snapshot(self) -> None:
        assert selected([b"./x"], b"x", b"y/x") == [b"x"]
        assert selected([b"./*.c"], b"a.c", b"y/a.c") == [b"a.c"]
        assert selected([b"*", b"!./x"], b"x", b"y") == [b"y"]

    def test_dots_and_doubled_slashes_in_a_path_mean_nothing(self) -> None:
        assert selected([b"/home//a/./x"], b"home/a/x", b"x") == [b"home/a/x"]
        assert selected([b"//home/a"], b"home/a", b"x/home/a") == [b"home/a"]
        assert selected([b"cache//"], b"x/cache/", b"cache") == [b"x/cache/"]
        assert selected([b"x/."], b"x/", b"x", b"y/x/") == [b"x/"]

    def test_dots_in_a_name_or_a_bracket_expression_stay(self) -> None:
        assert selected([b".x", b"a/.b"], b".x", b"x", b"a/.b", b"a/b") == [*(b".x", b"a/.b")]
        assert selected([b"[./]a"], b".a", b"a") == [b".a"]


class TestOddNames:
    def test_bytes_that_are_not_utf8_match_themselves(self) -> None:
        assert selected([b"*.o"], b"\xff\xfe.o", b"\xff.x") == [b"\xff\xfe.o"]
        assert selected([b"\xff*"], b"\xffabc", b"\xfeabc") == [b"\xffabc"]

    def test_a_question_mark_matches_one_byte_as_in_git(self) -> None:
        assert selected([b"m?ller"], "müller".encode(), b"muller") == [b"muller"]
        assert selected([b"m??ller"], "müller".encode()) == ["müller".encode()]

    def test_a_line_feed_at_the_end_of_a_name_is_part_of_it(self) -> None:
        assert selected([b"*.o"], b"a.o\n", b"a.o") == [b"a.o"]
        assert selected([b"name"], b"name\n", b"name") == [b"name"]
        assert selected([b"/name"], b"name\n", b"name") == [b"name"]
        assert selected([b"/n*e"], b"name\n", b"name") == [b"name"]

    def test_a_line_feed_in_a_path_matches_like_any_byte(self) -> None:
        assert selected([b"*.o"], b"two\nlines/a.o") == [b"two\nlines/a.o"]
        assert selected([b"a?b", b"/dir/"], b"a\nb", b"dir/") == [b"a\nb", b"dir/"]
        assert selected([b"a\nb"], b"a\nb", b"a", b"b", b"axb") == [b"a\nb"]


class TestHostilePatterns:
    """Each of these takes longer than the tests may run where a matcher goes back and tries again."""

    def test_many_stars_in_a_name_are_matched_at_once(self) -> None:
        assert not selected([b"a*" * 60 + b"b"], b"a" * 255)
        assert selected([b"a*" * 60 + b"b"], b"a" * 254 + b"b")

    def test_many_double_stars_in_a_path_are_matched_at_once(self) -> None:
        path = b"/".join([b"a"] * 1000)
        assert not selected([b"**/a/" * 60 + b"b"], path)
        assert selected([b"**/a/" * 60 + b"b"], path + b"/b")
        assert not selected([b"**/a*a*a*a*/" * 60 + b"b"], b"/".join([b"a" * 200] * 20))

    def test_alternatives_do_not_multiply(self) -> None:
        patterns = [b"*a" * number + b"b" for number in range(2, 60)]
        assert not selected(patterns, b"a" * 255)


class TestSelection:
    def test_the_highest_level_and_the_deciding_pattern_are_named(self) -> None:
        patterns = [parse_pattern(text) for text in (b"*.o", b"b*/", b"build")]
        found = PatternMatcher(patterns).select(b"x/build/y/a.o", is_directory=False)
        assert found is not None
        assert (found.path, found.pattern.text) == (b"x/build", b"build")

    def test_nothing_is_selected_by_no_patterns(self) -> None:
        assert PatternMatcher([]).select(b"x", is_directory=True) is None
        assert not PatternMatcher([]).matches(b"x", is_directory=False)

    def test_a_single_pattern_reports_a_match_whatever_its_sign(self) -> None:
        pattern = parse_pattern(b"!*.c")
        assert pattern.negated
        assert pattern.matches(b"x/a.c", is_directory=False)
        assert not pattern.matches(b"x/a.h", is_directory=False)


class TestRefusal:
    @pytest.mark.parametrize(
        ("pattern", "reason"),
        [
            (b"", "names no entry"),
            (b"!", "names no entry"),
            (b"/", "names no entry"),
            (b"!./", "names no entry"),
            (b"a\\", "backslash"),
            (b"a\\/", "backslash"),
            (b"[a", "not closed"),
            (b"a/[[:alpha:", "not closed"),
            (b"[", "not closed"),
            (b"[/]", "no character"),
            (b"[[:letter:]]", "no character class 'letter'"),
            (b"../x", "'..'"),
            (b"/a/../b", "'..'"),
        ],
    )
    def test_a_pattern_that_can_never_match_is_refused(self, pattern: bytes, reason: str) -> None:
        with pytest.raises(InvalidPatternError, match="matches nothing") as caught:
            parse_pattern(pattern)
        assert reason in str(caught.value)

    def test_a_pattern_longer_than_any_path_is_refused_before_it_is_compiled(self) -> None:
        assert selected([b"?" * MAX_PATTERN_BYTES], b"x") == []
        with pytest.raises(InvalidPatternError, match="longer than 16384 bytes") as caught:
            parse_pattern(b"?" * (MAX_PATTERN_BYTES + 1))
        assert len(str(caught.value)) < 400

    def test_a_refusal_shows_a_pattern_on_one_line(self) -> None:
        with pytest.raises(InvalidPatternError) as caught:
            parse_pattern(b"\x1b[2J\n\xff[")
        assert str(caught.value).isprintable()


class TestPatternFiles:
    def write(self, folder: Path, data: bytes) -> Path:
        path = folder / "patterns"
        path.write_bytes(data)
        return path

    def texts(self, data: bytes) -> list[bytes]:
        return [pattern.text for pattern in parse_patterns(data, "rules")]

    def test_each_line_is_a_pattern_but_for_comments_and_blank_ones(self, tmp_path: Path) -> None:
        patterns = read_patterns(self.write(tmp_path, b"*.o\n# comment\n\n   \n/home/a\nlast"))
        assert [pattern.text for pattern in patterns] == [b"*.o", b"/home/a", b"last"]

    def test_a_byte_order_mark_and_carriage_returns_are_skipped(self) -> None:
        assert self.texts(b"\xef\xbb\xbf# c\r\n*.a\r\n\r\nb\r") == [b"*.a", b"b"]
        assert self.texts(b"*.a\n\xef\xbb\xbf*.b") == [b"*.a", b"\xef\xbb\xbf*.b"]

    def test_spaces_at_the_end_of_a_line_go_unless_escaped(self) -> None:
        assert self.texts(b"a  \nb\\ \nc\\  \nd\\\\ \ne\t\n f") == [
            *(b"a", b"b\\ ", b"c\\ ", b"d\\\\", b"e\t", b" f")
        ]

    def test_only_a_line_feed_ends_a_line(self) -> None:
        odd = "a\x0bb\x0cc\x1cd\x85e\u2028f\rg".encode()
        assert self.texts(odd) == [odd]

    def test_bytes_that_are_not_utf8_are_kept(self) -> None:
        patterns = parse_patterns(b"caf\xe9", "rules")
        matcher = PatternMatcher(patterns)
        assert matcher.matches(b"caf\xe9", is_directory=False)
        assert not matcher.matches(b"caf\xc3\xa9", is_directory=False)

    def test_a_refusal_names_file_and_line(self) -> None:
        with pytest.raises(InvalidPatternError, match=r"line 3 of rules"):
            parse_patterns(b"a\n# c\n[z\n", "rules")

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
    def test_a_file_in_an_encoding_with_zero_bytes_is_refused(self, encoding: str) -> None:
        with pytest.raises(UsageError, match="save it as UTF-8"):
            parse_patterns("*.o\n".encode(encoding), "rules")

    def test_an_endless_file_is_refused(self) -> None:
        with pytest.raises(UsageError, match="larger than"):
            read_patterns(Path("/dev/zero"))

    def test_a_missing_file_or_a_directory_is_a_clear_error(self, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError, match="does not exist"):
            read_patterns(tmp_path / "none")
        with pytest.raises(StorageError, match="read the file of patterns"):
            read_patterns(tmp_path)


def test_options_are_patterns_even_where_a_file_would_have_a_comment() -> None:
    assert selected([os.fsencode("#recycle")], b"#recycle/", b"x") == [b"#recycle/"]
    assert selected([b"a "], b"a ", b"a") == [b"a "]
