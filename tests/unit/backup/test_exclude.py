"""What a backup leaves out: patterns, markers and cache tags."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from casfs.backup.exclude import CACHEDIR_SIGNATURE, CACHEDIR_TAG, Exclusions
from casfs.patterns import parse_pattern


class TestMatcher:
    def test_a_matcher_exists_only_where_patterns_are_given(self) -> None:
        assert Exclusions().matcher() is None
        matcher = Exclusions((parse_pattern(b"*.o"),)).matcher()
        assert matcher is not None
        assert matcher.matches(b"a.o", is_directory=False)


class TestNamedSources:
    def reason(self, exclusions: Exclusions, source: str) -> str | None:
        return exclusions.reason_against(os.fsencode(source), exclusions.matcher())

    @pytest.fixture
    def here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        (tmp_path / "top" / "below").mkdir(parents=True)
        (tmp_path / "top" / "file").write_bytes(b"12345")
        (tmp_path / "top" / "link").symlink_to("below")
        monkeypatch.chdir(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("pattern", "source", "reason"),
        [
            ("below", "top/below", "matches it"),
            ("top", "top/below", "matches top above it"),
            ("/top/", "./top//below/", "matches top above it"),
            ("file", "top/below/../file", "matches it"),
            ("below/", "top/below", "matches it"),
            ("below/", "top/file", None),
            ("link/", "top/link", None),
            ("link/", "top/link/", "matches it"),
            ("top/*", "top", None),
            ("*", ".", None),
            ("none", "none", None),
        ],
    )
    def test_a_pattern_counts_for_a_source_and_what_is_above_it(
        self, here: Path, pattern: str, source: str, reason: str | None
    ) -> None:
        found = self.reason(Exclusions((parse_pattern(pattern.encode()),)), source)
        assert found == (reason and f"the pattern '{pattern}' {reason}")

    def test_an_absolute_source_is_matched_by_its_whole_path(self, here: Path) -> None:
        pattern = parse_pattern(os.fsencode(here / "top"))
        assert self.reason(Exclusions((pattern,)), str(here / "top" / "below")) is not None
        assert self.reason(Exclusions((pattern,)), "top/below") is None

    def test_the_size_counts_for_files_only(self, here: Path) -> None:
        for size, reason in ((4, "it is larger than 4 bytes"), (5, None)):
            exclusions = Exclusions(larger_than=size)
            assert self.reason(exclusions, "top/file") == reason
            assert self.reason(exclusions, "top") is None
            assert self.reason(exclusions, "top/link") is None


class TestMarkers:
    @pytest.fixture
    def fd(self, tmp_path: Path) -> Iterator[int]:
        fd = os.open(tmp_path, os.O_RDONLY)
        yield fd
        os.close(fd)

    def marker(self, exclusions: Exclusions, fd: int) -> bytes | None:
        return exclusions.marker_of([os.fsencode(name) for name in os.listdir(fd)], fd)

    def test_a_marker_excludes_the_directory_that_holds_it(self, tmp_path: Path, fd: int) -> None:
        exclusions = Exclusions(if_present=(b".nobackup", b".skip"))
        assert self.marker(exclusions, fd) is None
        (tmp_path / ".skip").touch()
        assert self.marker(exclusions, fd) == b".skip"
        assert self.marker(Exclusions(), fd) is None

    def test_a_cache_tag_needs_the_signature(self, tmp_path: Path, fd: int) -> None:
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
    def test_a_cache_tag_is_a_regular_file(self, tmp_path: Path, fd: int, kind: str) -> None:
        tag = tmp_path / os.fsdecode(CACHEDIR_TAG)
        if kind == "symlink":
            (tmp_path / "real").write_bytes(CACHEDIR_SIGNATURE)
            tag.symlink_to("real")
        elif kind == "fifo":
            os.mkfifo(tag)
        else:
            tag.mkdir()
        assert self.marker(Exclusions(caches=True), fd) is None
