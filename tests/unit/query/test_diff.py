"""Differences are reported exactly, and equal trees are not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from casfs.cli.app import casfs
from casfs.cli.settings import Settings
from casfs.digest import Digest
from casfs.errors import BlobError
from casfs.format.tree import MAX_DEPTH, Node, NodeExtra, NodeType, replace
from casfs.monitor import ProblemKind, RecordingMonitor
from casfs.query.diff import Change, ChangeKind, Differ, ancestor_dirs
from casfs.trees.reader import TreeReader
from tests.support.builders import (
    MTIME_NS,
    Plan,
    RepositoryFixture,
    TreeFixture,
    entry,
    file,
    flagged,
    reference,
)

Changes = list[tuple[str, str, tuple[str, ...]]]


def changes(trees: TreeFixture, before: Node, after: Node, **how: Any) -> list[Change]:
    monitor = RecordingMonitor()
    reported = list(Differ(trees.reader, monitor, **how).changes(before, after))
    assert monitor.problems == []
    return reported


def reported(trees: TreeFixture, before: Node, after: Node, **how: Any) -> Changes:
    return [
        (change.kind.value, change.path.decode(), change.fields)
        for change in changes(trees, before, after, **how)
    ]


def changes_of_one(before: Node, after: Node) -> Changes:
    """Compare two entries of one name in directories that are otherwise the same."""
    trees = TreeFixture()
    return reported(trees, trees.build({b"it": before}), trees.build({b"it": after}))


OLD = file(b"", b"old")
LINK = entry(b"", NodeType.SYMLINK, content=b"here")
DEVICE = entry(b"", NodeType.CHARACTER_DEVICE, extra=NodeExtra(rdev=259))


@pytest.mark.parametrize(
    ("before", "after", "kind", "fields"),
    [
        (OLD, file(b"", b"new"), "modified", ("content",)),
        (OLD, file(b"", b"longer"), "modified", ("size", "content")),
        (OLD, file(b"", b"new", mode=0o600, mtime_ns=1), "modified", ("content", "mode", "mtime")),
        (OLD, replace(OLD, mode=0o600), "metadata", ("mode",)),
        (OLD, replace(OLD, uid=1), "metadata", ("uid",)),
        (OLD, replace(OLD, gid=1), "metadata", ("gid",)),
        (OLD, replace(OLD, mtime_ns=MTIME_NS + 1), "metadata", ("mtime",)),
        (OLD, replace(OLD, extra=NodeExtra(((b"user.a", b"1"),))), "metadata", ("xattrs",)),
        (LINK, replace(LINK, content=b"there"), "modified", ("target",)),
        (DEVICE, replace(DEVICE, extra=NodeExtra(rdev=260)), "modified", ("rdev",)),
        (OLD, LINK, "type", ("kind",)),
    ],
)
def test_diff_reports_what_differs_of_an_entry(
    before: Node, after: Node, kind: str, fields: tuple[str, ...]
) -> None:
    assert changes_of_one(before, after) == [(kind, "it", fields)]
    assert changes_of_one(after, before) == [(kind, "it", fields)]


@pytest.mark.parametrize(
    "other",
    [
        {"inode": 99},
        {"ctime_ns": 99},
        {"nlink": 2, "extra": NodeExtra(device=5)},
        {"racy": True},
        {"captured": OLD.content[8:40]},
    ],
    ids=str,
)
def test_diff_ignores_fields_that_differ_in_every_copy(other: dict[str, Any]) -> None:
    assert changes_of_one(OLD, replace(OLD, **other)) == []


def test_a_copied_tree_does_not_differ_although_its_digests_do() -> None:
    trees = TreeFixture()
    before = trees.build({b"a": {b"b": file(b"", b"x", inode=1)}})
    after = trees.build({b"a": {b"b": file(b"", b"x", inode=2)}})
    assert reference(before) != reference(after)
    assert reported(trees, before, after) == []


def test_diff_reports_everything_in_an_added_or_removed_directory() -> None:
    trees = TreeFixture()
    less = trees.build({b"kept": b""})
    more = trees.build({b"a": {b"b": {b"c": b"1"}, b"d": b"2"}, b"kept": b"", b"z": b"3"})
    paths = ["a", "a/b", "a/b/c", "a/d", "z"]
    assert reported(trees, less, more) == [("added", path, ()) for path in paths]
    assert reported(trees, more, less) == [("removed", path, ()) for path in paths]


def test_diff_reports_a_directory_in_place_of_a_file_with_its_entries() -> None:
    trees = TreeFixture()
    before, after = trees.build({b"it": b"file"}), trees.build({b"it": {b"in": b""}})
    assert reported(trees, before, after) == [("type", "it", ("kind",)), ("added", "it/in", ())]
    assert reported(trees, after, before) == [("type", "it", ("kind",)), ("removed", "it/in", ())]


def test_a_directory_comes_before_what_is_in_it() -> None:
    trees = TreeFixture()
    inside = {b"x": b"1"}
    before = trees.build({b"d": trees.build(inside, mode=0o700)})
    after = trees.build({b"d": trees.build({b"x": b"2"}, mode=0o755)})
    assert reported(trees, before, after) == [
        ("metadata", "d", ("mode",)),
        ("modified", "d/x", ("content",)),
    ]


def test_two_roots_are_compared_themselves() -> None:
    trees = TreeFixture()
    assert reported(trees, trees.build({}), trees.build({}, mode=0o700)) == [
        ("metadata", "", ("mode",))
    ]
    assert reported(trees, file(b"old", b"1"), file(b"new", b"2")) == [
        ("modified", "new", ("content",))
    ]
    assert reported(trees, file(b"x"), trees.build({b"y": b""})) == [
        ("type", "", ("kind",)),
        ("added", "y", ()),
    ]


def test_equal_directories_are_not_read() -> None:
    trees = TreeFixture()
    same = trees.build({b"deep": {b"file": b"x"}})
    before = trees.build({b"a": same, b"b": b"1"})
    after = trees.build({b"a": same, b"b": b"2"})
    assert reported(trees, before, after) == [("modified", "b", ("content",))]
    assert trees.reads == [reference(before), reference(after)]
    trees.reads.clear()
    assert reported(trees, before, before) == []
    assert trees.reads == []


def test_equal_pieces_of_split_directories_are_not_read() -> None:
    trees = TreeFixture()
    plan: dict[bytes, object] = {b"%06d" % number: file(b"") for number in range(40_000)}
    before = trees.build(plan)
    plan[b"020000x"] = file(b"")
    del plan[b"000007"]
    plan[b"039999"] = file(b"", b"x")
    after = trees.build(plan)
    assert len(trees.reader.piece(before.tree)) > 6 if before.tree is not None else False
    trees.reads.clear()
    expected = [
        ("removed", "000007", ()),
        ("added", "020000x", ()),
        ("modified", "039999", ("size", "content")),
    ]
    assert reported(trees, before, after) == expected
    assert len(trees.reads) == 2 + 2 * 3, "two branches, and three pieces of each"


def test_a_split_directory_is_compared_with_one_that_is_not() -> None:
    trees = TreeFixture()
    plan = {b"%05d" % number: file(b"") for number in range(20_000)}
    few = {name: plan[name] for name in list(plan)[::50]}
    left, right = trees.build(few), trees.build(plan)
    missing = [name.decode() for name in plan if name not in few]
    assert [path for _, path, _ in reported(trees, left, right)] == missing
    assert {kind for kind, _, _ in reported(trees, left, right)} == {"added"}
    assert [path for _, path, _ in reported(trees, right, left)] == missing
    assert [path for _, path, _ in reported(trees, right, trees.build({}))] == [
        name.decode() for name in plan
    ]


def test_diff_reports_a_damaged_directory_and_compares_the_rest() -> None:
    trees = TreeFixture()
    bad = trees.build({b"x": b"1"})
    before = trees.build({b"a": bad, b"b": b"1"})
    after = trees.build({b"a": {b"x": b"2"}, b"b": b"2"})

    def read(digest: Digest) -> bytes:
        if digest == reference(bad):
            raise BlobError(digest, "it is damaged")
        return trees.blobs[digest]

    monitor = RecordingMonitor()
    found = list(Differ(TreeReader(read), monitor).changes(before, after))
    assert [(change.kind, change.path) for change in found] == [(ChangeKind.MODIFIED, b"b")]
    (problem,) = monitor.problems
    assert (problem.kind, problem.path) == (ProblemKind.DAMAGED, b"a")


def test_diff_reports_directories_beyond_the_depth_bound_and_skips_them() -> None:
    trees = TreeFixture()
    node = trees.build({b"bottom": b""})
    for _ in range(MAX_DEPTH):
        node = trees.build({b"d": node})
    monitor = RecordingMonitor()
    found = list(Differ(trees.reader, monitor).changes(trees.build({}), node))
    assert len(found) == MAX_DEPTH
    assert ["deep" in problem.message for problem in monitor.problems] == [True]


@pytest.mark.parametrize(
    ("paths", "above", "expected"),
    [
        ((b"/home/me",), b"", {b"", b"home"}),
        ((b"/home/me",), b"home", {b""}),
        ((b"/home/me",), b"home/me", set()),
        ((b"/home/me",), b"home/me/docs", set()),
        ((b"/home/me",), b"var", set()),
        ((b"docs",), b"", {b""}),
        ((b".",), b"", set()),
        ((b"/",), b"", set()),
        ((b"/home", b"/home/me/docs"), b"", {b""}),
        ((b"/a/b/c", b"/a/x"), b"", {b"", b"a", b"a/b"}),
    ],
)
def test_ancestor_directories_only_lead_to_what_was_backed_up(
    paths: tuple[bytes, ...], above: bytes, expected: set[bytes]
) -> None:
    assert ancestor_dirs(paths, above) == expected


def test_diff_ignores_the_mtime_of_an_ancestor_directory_but_not_its_mode() -> None:
    trees = TreeFixture()
    before = trees.build({b"home": trees.build({b"me": b"1"})})
    later = trees.build({b"home": trees.build({b"me": b"1"}, mtime_ns=5)}, mtime_ns=5)
    ancestors = frozenset([b"", b"home"])
    assert reported(trees, before, later, ancestors=ancestors) == []
    assert [path for _, path, _ in reported(trees, before, later)] == ["", "home"]
    other = trees.build({b"home": trees.build({b"me": b"1"}, mtime_ns=5, mode=0o700)})
    assert reported(trees, before, other, ancestors=ancestors) == [("metadata", "home", ("mode",))]


_names = st.sampled_from([b"a", b"b", b"c", b"ab"])
_contents = st.sampled_from([b"", b"1", b"2"])
_plans: st.SearchStrategy[Plan] = st.recursive(
    st.dictionaries(_names, _contents, max_size=3),
    lambda below: st.dictionaries(_names, st.one_of(_contents, below), max_size=3),
    max_leaves=12,
)


def flat(plan: Plan, above: str = "") -> dict[str, bytes | None]:
    """Map every path of a plan to a file's content, or None for a directory."""
    found: dict[str, bytes | None] = {}
    for name, what in plan.items():
        path = above + name.decode()
        found[path] = what if isinstance(what, bytes) else None
        if not isinstance(what, bytes):
            found |= flat(what, path + "/")
    return found


@given(_plans, _plans)
def test_diff_agrees_with_a_comparison_of_every_path(before: Plan, after: Plan) -> None:
    trees = TreeFixture()
    old, new = flat(before), flat(after)
    expected = dict.fromkeys(new.keys() - old.keys(), "added")
    expected |= dict.fromkeys(old.keys() - new.keys(), "removed")
    for path in old.keys() & new.keys():
        if (old[path] is None) != (new[path] is None):
            expected[path] = "type"
        elif old[path] != new[path]:
            expected[path] = "modified"
    found = reported(trees, trees.build(before), trees.build(after))
    assert {path: kind for kind, path, _ in found} == expected
    assert len(found) == len(expected)


class TestDiffCommand:
    """`casfs diff`."""

    @pytest.fixture
    def repo(self, tmp_path: Path) -> RepositoryFixture:
        return RepositoryFixture(tmp_path)

    def run(self, repo: RepositoryFixture, *arguments: str, expect: int = 0) -> Result:
        result = CliRunner().invoke(
            casfs,
            ["diff", "--repo", str(repo.root), *arguments],
            obj=Settings(),
            standalone_mode=False,
        )
        assert result.exception is None, result.exception
        assert result.return_value == expect
        return result

    def test_diff_prints_changes_as_lines_and_sums(self, repo: RepositoryFixture) -> None:
        first, _ = repo.publish({b"a": b"12", b"b": {b"c": b""}, b"gone": b"1", b"same": b"1"})
        second, _ = repo.publish(
            {
                b"a": file(b"", b"345", mode=0o600),
                b"b": b"now a file",
                b"new\n": {b"in": b"1234"},
                b"same": file(b"", b"1", uid=7),
            }
        )
        lines = self.run(repo, first.hex(), second.hex()).stdout.splitlines()
        assert lines == [
            "M  a",
            "T  b",
            "-  b/c",
            "-  gone",
            "+  new\\n/",
            "+  new\\n/in",
            "U  same",
            "2 added (14 B), 2 removed (1 B), 1 modified (3 B), 1 with changed metadata, "
            "1 with a changed type",
        ]
        *_, last = self.run(repo, first.hex(), first.hex()).stdout.splitlines()
        assert last == "no differences found"
        *_, last = self.run(repo, f"{first.hex()}:b", f"{second.hex()}:new\n").stdout.splitlines()
        assert last == "1 added (4 B), 1 removed (0 B)"

    def test_diff_prints_which_sides_changed_during_capture(self, repo: RepositoryFixture) -> None:
        first, _ = repo.publish({b"log": flagged(file(b"", b"1")), b"x": b""})
        second, _ = repo.publish({b"log": flagged(file(b"", b"2")), b"x": flagged(file(b""))})
        third, _ = repo.publish({b"log": file(b"", b"3")})
        lines = self.run(repo, first.hex(), second.hex()).stdout.splitlines()
        assert lines[0] == "M  log"
        assert [line.split()[2] for line in lines[1:3]] == ["before", "after"]
        assert lines[-1].startswith("1 of them")
        reported = self.run(repo, second.hex(), third.hex(), "--json").stdout.splitlines()
        log, x, summary = map(json.loads, reported)
        assert (log["path"], log["change"], log["flagged_sides"]) == ("log", "modified", ["before"])
        assert (x["path"], x["change"], x["flagged_sides"]) == ("x", "removed", ["before"])
        assert log["before"]["state"] == "changed" and log["after"]["state"] == "stable"
        assert log["before"]["captured"] != log["after"]["captured"]
        assert (x["before"]["size"], x["after"]) == (0, None)
        assert summary["type"] == "summary"
        assert (summary["removed"], summary["modified"], summary["flagged"]) == (1, 1, 2)
        assert (summary["before_snapshot"], summary["after_snapshot"]) == (
            second.hex(),
            third.hex(),
        )

    def test_diff_of_subtrees_prints_relative_paths(self, repo: RepositoryFixture) -> None:
        first, _ = repo.publish({b"a": {b"x": b"1"}, b"other": b"1"})
        second, _ = repo.publish({b"b": {b"y": b"1"}, b"other": b"2"})
        lines = self.run(repo, f"{first.hex()}:a", f"{second.hex()}:b").stdout.splitlines()
        assert lines[:-1] == ["-  x", "+  y"]

    def test_diff_of_two_backups_shows_what_was_done_in_the_folder(
        self, repo: RepositoryFixture, tmp_path: Path
    ) -> None:
        source = tmp_path / "source"
        (source / "sub").mkdir(parents=True)
        (source / "sub" / "kept").write_bytes(b"kept")
        (source / "edited").write_bytes(b"old")
        first, _ = repo.back_up(source)
        (source / "edited").write_bytes(b"new")
        (source / "sub" / "kept").chmod(0o600)
        (tmp_path / "beside").touch()
        second, _ = repo.back_up(source)
        lines = self.run(repo, first.hex(), second.hex()).stdout.splitlines()
        top = str(source).lstrip("/")
        assert lines[:-1] == [f"M  {top}/edited", f"U  {top}/sub/kept"]

    def test_diff_skips_damage_and_exits_with_5(self, repo: RepositoryFixture) -> None:
        first, snapshot = repo.publish({b"a": {b"x": b"1"}, b"b": b"1"})
        second, _ = repo.publish({b"a": {b"x": b"2"}, b"b": b"2"})
        with repo.reading() as repository:
            node = repository.trees.resolve(snapshot.root, b"a")
        assert node is not None
        repo.damage(reference(node))
        result = self.run(repo, first.hex(), second.hex(), expect=5)
        assert result.stdout.splitlines()[0] == "M  b"
        assert "a: the directory cannot be compared completely" in result.stderr
