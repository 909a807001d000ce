"""What a backup takes: every path where the user would look for it, and none twice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from casfs.backup.sources import SourceNode, build_source_tree
from casfs.errors import UsageError
from casfs.paths import normalize_source_path


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a little in it."""
    place = tmp_path / "here"
    (place / "a" / "b").mkdir(parents=True)
    (tmp_path / "beside").mkdir()
    (place / "away").symlink_to(tmp_path / "beside")
    monkeypatch.chdir(place)
    return place


def sources(*paths: bytes) -> dict[bytes, bytes]:
    """Return the sources, by their paths in the snapshot."""
    found: dict[bytes, bytes] = {}

    def look(place: SourceNode, path: bytes) -> None:
        if place.is_source:
            found[path] = place.source
            return
        for name, below in place.children.items():
            look(below, path + b"/" + name if path else name)

    look(build_source_tree(list(paths)), b"")
    return found


class TestNormalizedPath:
    @pytest.mark.parametrize(
        ("given", "kept"),
        [
            (b"a", b"a"),
            (b"./a", b"a"),
            (b"a/", b"a"),
            (b"a//b/.", b"a/b"),
            (b".", b"."),
            (b"./", b"."),
            (b"/", b"/"),
            (b"//", b"/"),
            (b"//home//a/", b"/home/a"),
            (b"/home/a", b"/home/a"),
            (b"\xff\n", b"\xff\n"),
            (b"a/../a/b", b"a/b"),
            (b"a/b/../..", b"."),
            (b"...", b"..."),
            (b"a/..b", b"a/..b"),
        ],
    )
    def test_a_normalized_path_has_no_dots_or_doubled_slashes(
        self, given: bytes, kept: bytes
    ) -> None:
        assert normalize_source_path(given) == kept

    def test_a_path_that_leads_out_of_the_current_directory_becomes_absolute(
        self, tmp_path: Path
    ) -> None:
        assert normalize_source_path(b"..") == bytes(tmp_path)
        assert normalize_source_path(b"../beside") == bytes(tmp_path / "beside")
        assert normalize_source_path(b"a/../../beside/x") == bytes(tmp_path / "beside" / "x")

    def test_a_path_that_leads_out_and_back_becomes_relative(self, here: Path) -> None:
        assert normalize_source_path(b"../here/a") == b"a"
        assert normalize_source_path(bytes(here) + b"/a/../a") == bytes(here / "a")

    def test_two_dots_go_up_from_the_target_of_a_symlink(self, tmp_path: Path) -> None:
        assert normalize_source_path(b"away/../beside") == bytes(tmp_path / "beside")
        assert normalize_source_path(b"away/x") == b"away/x"

    def test_an_empty_path_is_refused(self) -> None:
        with pytest.raises(UsageError, match="is empty"):
            normalize_source_path(b"")
        with pytest.raises(UsageError, match="is empty"):
            build_source_tree([b"", b"/etc"])


class TestSourceTree:
    def test_the_source_tree_keeps_absolute_paths_whole_and_relative_paths_as_given(self) -> None:
        assert sources(b"/home/a") == {b"home/a": b"/home/a"}
        assert sources(b"a/b") == {b"a/b": b"a/b"}
        assert sources(b"a/b", b"/home/a") == {b"a/b": b"a/b", b"home/a": b"/home/a"}

    def test_the_current_directory_and_the_root_become_the_root_of_the_snapshot(self) -> None:
        assert sources(b".") == {b"": b"."}
        assert sources(b"/") == {b"": b"/"}
        assert sources(b".", b"a") == {b"": b"."}

    def test_sources_within_each_other_are_taken_once(self) -> None:
        for paths in ((b"a", b"a/b"), (b"a/b", b"a"), (b"a", b"a/", b"./a")):
            assert sources(*paths) == {b"a": b"a"}
        assert sources(b"/home", b"/home/a") == {b"home": b"/home"}

    def test_sources_share_their_common_parent_directories(self) -> None:
        assert sources(b"/home/a", b"/home/b", b"/var") == {
            b"home/a": b"/home/a",
            b"home/b": b"/home/b",
            b"var": b"/var",
        }
        root = build_source_tree([b"/home/a", b"/home/b"])
        assert list(root.children) == [b"home"]
        assert root.children[b"home"].source == b"/home"
        assert list(root.sources()) == [b"/home/a", b"/home/b"]

    def test_no_sources_make_an_empty_tree(self) -> None:
        assert sources() == {}

    def test_a_source_given_by_two_paths_is_taken_once(self, here: Path) -> None:
        os.chdir("/")
        relative = bytes(here).lstrip(b"/")
        assert list(sources(bytes(here), relative)) == [relative]


class TestSourceConflict:
    """Two sources that would have one path in the snapshot: keeping one would lose the other."""

    @pytest.mark.parametrize(
        "paths",
        [
            (b"/etc", b"etc"),
            (b"etc", b"/etc"),
            (b"/etc/a", b"etc"),
            (b"etc", b"/etc/a"),
            (b"etc/a", b"/etc"),
            (b"/etc", b"etc/a"),
            (b".", b"/etc"),
            (b"/etc", b"."),
            (b"/", b"etc"),
            (b"a", b"/a/b", b"c"),
        ],
    )
    def test_two_sources_with_one_path_in_the_snapshot_are_refused_in_any_order(
        self, paths: tuple[bytes, ...]
    ) -> None:
        with pytest.raises(UsageError, match="with the same path in the snapshot"):
            build_source_tree(list(paths))

    def test_two_sources_may_share_parent_directories_from_different_places(self) -> None:
        assert sources(b"a/b", b"/a/c") == {b"a/b": b"a/b", b"a/c": b"/a/c"}
