"""The listing verbs: snapshots, ls, find, changed."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from casfs.cli.app import casfs
from casfs.cli.settings import Settings
from casfs.digest import digest_of
from casfs.errors import NotFoundError, UsageError
from casfs.format.tree import CaptureState, NodeExtra, NodeType, replace
from tests.support.builders import (
    MTIME_NS,
    Plan,
    RepositoryFixture,
    entry,
    file,
    flagged,
    reference,
)

SECOND_NS = 1_000_000_000
SHOWN_TIME = "2020-09-13 12:26:40"


@pytest.fixture(autouse=True)
def universal_time() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


@pytest.fixture
def repo(tmp_path: Path) -> RepositoryFixture:
    return RepositoryFixture(tmp_path)


def run(repo: RepositoryFixture, verb: str, *arguments: str, expect: int = 0) -> Result:
    result = CliRunner().invoke(
        casfs,
        [verb, "--repo", str(repo.root), *arguments],
        obj=Settings(),
        standalone_mode=False,
    )
    if result.exception is not None:
        raise result.exception
    assert (result.return_value or 0) == expect
    return result


def lines(repo: RepositoryFixture, verb: str, *arguments: str) -> list[str]:
    return run(repo, verb, *arguments).stdout.splitlines()


def objects(repo: RepositoryFixture, verb: str, *arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(repo, verb, "--json", *arguments)]


class TestSnapshotsCommand:
    def test_snapshots_prints_only_a_hint_for_an_empty_repository(
        self, repo: RepositoryFixture
    ) -> None:
        result = run(repo, "snapshots")
        assert result.stdout == ""
        assert "has no snapshots" in result.stderr
        machine = run(repo, "snapshots", "--json")
        assert (machine.stdout, machine.stderr) == ("", "")

    def test_snapshots_prints_a_row_for_each_further_path(self, repo: RepositoryFixture) -> None:
        first, _ = repo.publish({b"f": file(b"", b"12345")}, time_ns=MTIME_NS, paths=(b"f",))
        second, _ = repo.publish(
            {b"f": flagged(file(b"", b"1"))},
            time_ns=MTIME_NS + SECOND_NS,
            host="far away",
            paths=(b"/a", b"/b\n"),
            tags=("t1", "t2"),
        )
        head, one, two, more = lines(repo, "snapshots")
        heads = ["id", "time", "host", "paths", "tags", "files", "size", "added", "flagged"]
        assert head.split() == heads
        sizes = ["0", "5", "B", "0", "B"]
        assert one.split() == [first.hex()[:12], *SHOWN_TIME.split(), "here", "f", *sizes]
        assert two.startswith(second.hex()[:12])
        assert two[head.index("host") :].startswith("far away  /a")
        assert two[head.index("tags") :].startswith("t1,t2")
        assert two.rstrip().endswith(" 1")
        assert more.split() == ["/b\\n"]
        assert more.index("/b") == head.index("paths")

    def test_snapshots_json_holds_every_field(
        self, repo: RepositoryFixture, tmp_path: Path
    ) -> None:
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "f").write_bytes(b"123")
        first, _ = repo.back_up(tmp_path / "source", tags=("a",))
        second, _ = repo.back_up(tmp_path / "source")
        old, new = objects(repo, "snapshots")
        assert (old["type"], old["id"], new["id"]) == ("snapshot", first.hex(), second.hex())
        assert (old["parent"], new["parent"]) == (None, first.hex())
        assert (old["tags"], new["tags"]) == (["a"], [])
        assert (old["files"], old["bytes"], old["flagged"]) == (1, 3, 0)
        assert (old["unreadable"], old["vanished"]) == (0, 0)
        assert (old["host"], old["paths"]) == ("here", [str(tmp_path / "source")])
        assert old["program"].startswith("casfs ")

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ((), "abcd"),
            (("--host", "h1"), "abd"),
            (("--host", "h1", "--host", "h2"), "abcd"),
            (("--tag", "x"), "bc"),
            (("--tag", "x,y"), "c"),
            (("--tag", "x,y", "--tag", "z"), "cd"),
            (("--path", "/p"), "abcd"),
            (("--path", "/q"), "d"),
            (("--path", "/p", "--path", "/q/"), "d"),
            (("--latest", "1"), "bcd"),
            (("--latest", "1", "--host", "h1"), "bd"),
            (("--latest", "2"), "abcd"),
            (("--host", "h1", "--tag", "y"), ""),
        ],
        ids=str,
    )
    def test_snapshots_filters_by_host_tag_path_and_age(
        self, repo: RepositoryFixture, options: tuple[str, ...], expected: str
    ) -> None:
        ids: dict[str, str] = {}
        for name, host, tags, paths in (
            ("a", "h1", (), (b"/p",)),
            ("b", "h1", ("x",), (b"/p",)),
            ("c", "h2", ("x", "y"), (b"/p",)),
            ("d", "h1", ("z",), (b"/p", b"/q")),
        ):
            time_ns = MTIME_NS + len(ids)
            snapshot_id, _ = repo.publish({}, host=host, tags=tags, paths=paths, time_ns=time_ns)
            ids[snapshot_id.hex()] = name
        found = objects(repo, "snapshots", *options)
        assert "".join(ids[reported["id"]] for reported in found) == expected
        if not expected:
            result = run(repo, "snapshots", *options)
            assert result.stdout == ""
            assert "no snapshot matches; the repository has 4" in result.stderr


TREE: Plan = {
    b"dev": entry(b"", NodeType.BLOCK_DEVICE, mode=0o660, extra=NodeExtra(rdev=os.makedev(8, 1))),
    b"docs": {
        b"deep": {b"file": file(b"", b"x")},
        b"grown": replace(file(b"", b"12"), state=CaptureState.APPENDED),
        b"log": flagged(file(b"", b"1234", mode=0o4751, uid=1000, gid=50)),
    },
    b"fifo": entry(b"", NodeType.FIFO),
    b"link": entry(b"", NodeType.SYMLINK, content=b"to\nthere", mode=0o777),
    b"odd \xff": file(b""),
}
OWNERS: dict[str, Any] = {"users": ((0, "root"), (1000, "anna")), "groups": ((50, "staff\n"),)}


class TestLsCommand:
    @pytest.fixture(autouse=True)
    def snapshot(self, repo: RepositoryFixture) -> str:
        return repo.publish(TREE, **OWNERS)[0].hex()

    def test_ls_lists_a_directory_in_columns(self, repo: RepositoryFixture) -> None:
        assert lines(repo, "ls", "latest:/docs") == [
            f"drwxr-xr-x root 0       1 {SHOWN_TIME}          deep",
            f"-rw-r--r-- root 0       2 {SHOWN_TIME} appended grown",
            f"-rwsr-x--x anna staff\\n 4 {SHOWN_TIME} changed  log",
        ]

    def test_ls_shows_every_kind_of_entry_and_escapes_names(self, repo: RepositoryFixture) -> None:
        reported = lines(repo, "ls", "latest:")
        assert [line[0] for line in reported] == ["b", "d", "p", "l", "-"]
        assert " 8, 1 " in reported[0]
        assert " 7 " in reported[1], "all files below the directory"
        assert reported[3].endswith(" link -> to\\nthere")
        assert reported[4].endswith(" odd \\xff")

    def test_ls_of_a_snapshot_or_recursive_lists_every_path(self, repo: RepositoryFixture) -> None:
        below = ["docs/deep", "docs/deep/file", "docs/grown", "docs/log"]
        whole = lines(repo, "ls", "latest")
        assert [line.split()[-1] for line in whole[1:6]] == ["docs", *below]
        assert lines(repo, "ls", "-R", "latest:/") == whole
        part = lines(repo, "ls", "--recursive", "latest:docs")
        assert [line.split()[-1] for line in part] == below

    def test_ls_of_a_file_lists_that_file(self, repo: RepositoryFixture) -> None:
        (line,) = lines(repo, "ls", "latest:docs/log")
        assert line.endswith(" changed  docs/log")
        (reported,) = objects(repo, "ls", "latest:docs/log")
        assert reported["path"] == "docs/log"

    def test_ls_json_holds_every_field(self, repo: RepositoryFixture) -> None:
        reported = {node["path"]: node for node in objects(repo, "ls", "latest")}
        assert {node["type"] for node in reported.values()} == {"node"}
        log = reported["docs/log"]
        assert (log["kind"], log["mode"], log["size"]) == ("file", 0o4751, 4)
        assert (log["uid"], log["gid"], log["user"]) == (1000, 50, "anna")
        assert reported["docs"]["group"] is None, "the number 0 has no name in the snapshot"
        assert (log["mtime_ns"], log["ctime_ns"]) == (MTIME_NS, MTIME_NS)
        assert (log["inode"], log["nlink"]) == (1, 1)
        assert (log["state"], log["reason"], log["attempts"]) == ("changed", "rewritten", 3)
        assert log["captured"] == digest_of(b"1234").hex()
        assert log["observed"] == digest_of(b"seen when read again").hex()
        assert reported["docs/grown"]["state"] == "appended"
        assert reported["docs/deep/file"]["state"] == "stable"
        assert reported["link"]["link_target"] == "to\nthere"
        assert (reported["dev"]["kind"], reported["dev"]["rdev"]) == ("blockdev", os.makedev(8, 1))
        docs = reported["docs"]
        assert (docs["kind"], docs["entries"]) == ("dir", 4)
        assert (docs["total_bytes"], docs["flagged"]) == (7, 1)
        odd = reported["odd \udcff"]
        assert base64.b64decode(odd["path_b64"]) == b"odd \xff"

    def test_ls_json_of_a_directory_has_whole_paths(self, repo: RepositoryFixture) -> None:
        reported = [node["path"] for node in objects(repo, "ls", "latest:/docs/")]
        assert reported == ["docs/deep", "docs/grown", "docs/log"]

    def test_ls_fails_for_a_missing_path(self, repo: RepositoryFixture) -> None:
        with pytest.raises(NotFoundError, match="docs/none"):
            run(repo, "ls", "latest:docs/none")

    def test_ls_skips_a_damaged_directory_and_exits_with_5(
        self, repo: RepositoryFixture, snapshot: str
    ) -> None:
        with repo.reading() as repository:
            deep = repository.snapshots.resolve_path("latest:docs/deep")[3]
        repo.damage(reference(deep))
        result = run(repo, "ls", "latest", expect=5)
        assert "docs/log" in result.stdout
        assert "docs/deep/file" not in result.stdout
        assert "docs/deep: the directory cannot be read completely" in result.stderr
        reported = run(repo, "ls", "latest", "--json", expect=5).stdout.splitlines()
        problems = [
            reported for reported in map(json.loads, reported) if reported["type"] == "problem"
        ]
        assert [problem["path"] for problem in problems] == ["docs/deep"]


class TestFindCommand:
    @pytest.fixture(autouse=True)
    def snapshots(self, repo: RepositoryFixture) -> list[str]:
        plans: list[Plan] = [
            {b"a": {b"report.txt": b"1"}, b"report.d": {}},
            {b"a": {b"report.txt": b"1"}, b"b": {b"Report.txt": flagged(file(b""))}},
        ]
        return [
            repo.publish(plan, time_ns=MTIME_NS + number)[0].hex()
            for number, plan in enumerate(plans)
        ]

    def test_find_searches_all_snapshots_newest_first(
        self, repo: RepositoryFixture, snapshots: list[str]
    ) -> None:
        old, new = (snapshot[:12] for snapshot in snapshots)
        assert lines(repo, "find", "report.*") == [
            f"{new}:a/report.txt",
            f"{old}:a/report.txt",
            f"{old}:report.d",
        ]

    def test_find_marks_files_that_changed_during_capture(
        self, repo: RepositoryFixture, snapshots: list[str]
    ) -> None:
        found = lines(repo, "find", "R*")
        assert found[0] == f"{snapshots[1][:12]}:b/Report.txt"
        assert found[1].split() == ["changed", "while", "it", "was", "captured"]
        assert found[1].startswith("    ")
        assert lines(repo, "find", "--changed") == found
        assert lines(repo, "find", "--changed", "*.pdf") == []

    def test_find_json_has_the_snapshot_and_the_node(
        self, repo: RepositoryFixture, snapshots: list[str]
    ) -> None:
        first, second = objects(repo, "find", "-i", "report.txt", "--snapshot", snapshots[1])
        assert (first["type"], first["snapshot"]) == ("match", snapshots[1])
        assert (first["path"], first["kind"], first["size"]) == ("a/report.txt", "file", 1)
        assert (second["path"], second["state"]) == ("b/Report.txt", "changed")

    def test_find_searches_only_the_named_snapshots(
        self, repo: RepositoryFixture, snapshots: list[str]
    ) -> None:
        old, new = snapshots
        for options, expected in (
            (("--snapshot", old), [old]),
            (("--snapshot", old, "--snapshot", new), [new, old]),
            (("--snapshot", new, "--snapshot", "latest"), [new]),
            (("--snapshot", f"{old}:a"), [old]),
            (("--snapshot", f"{new}:b"), []),
        ):
            found = objects(repo, "find", "report.txt", *options)
            assert [match["snapshot"] for match in found] == expected, options

    def test_find_filters_by_type(self, repo: RepositoryFixture, snapshots: list[str]) -> None:
        assert lines(repo, "find", "report.*", "--type", "d") == [f"{snapshots[0][:12]}:report.d"]
        assert lines(repo, "find", "report.*", "--type", "l") == []

    def test_find_without_criteria_is_a_usage_error(self, repo: RepositoryFixture) -> None:
        with pytest.raises(UsageError):
            run(repo, "find")

    def test_find_skips_damage_and_exits_with_5(self, repo: RepositoryFixture) -> None:
        with repo.reading() as repository:
            folder = repository.snapshots.resolve_path("latest:b")[3]
        repo.damage(reference(folder))
        result = run(repo, "find", "-i", "report.txt", expect=5)
        assert len(result.stdout.splitlines()) == 2
        assert result.stderr.startswith("casfs: b: ")


class TestChangedCommand:
    def test_changed_lists_flagged_files_with_their_evidence(self, repo: RepositoryFixture) -> None:
        snapshot, _ = repo.publish(TREE)
        (line,) = lines(repo, "changed", "latest")
        captured = digest_of(b"1234").hex()[:12]
        observed = digest_of(b"seen when read again").hex()[:12]
        assert line.split() == [
            *("rewritten", "3", "attempts"),
            *("captured", captured, "observed", observed, "docs/log"),
        ]
        (reported,) = objects(repo, "changed", "latest")
        assert (reported["type"], reported["snapshot"]) == ("changed", snapshot.hex())
        assert (reported["path"], reported["reason"], reported["attempts"]) == (
            "docs/log",
            "rewritten",
            3,
        )
        assert reported["captured"].startswith(captured) and len(reported["captured"]) == 64
        assert reported["observed"].startswith(observed) and len(reported["observed"]) == 64

    def test_changed_of_a_path_lists_only_what_is_below_it(self, repo: RepositoryFixture) -> None:
        repo.publish({b"a": {b"x": flagged(file(b""))}, b"b": {b"y": flagged(file(b""))}})
        assert [reported["path"] for reported in objects(repo, "changed", "latest:b")] == ["b/y"]
        assert [reported["path"] for reported in objects(repo, "changed", "latest:a/x")] == ["a/x"]

    def test_changed_lists_a_flagged_file_without_evidence(self, repo: RepositoryFixture) -> None:
        repo.publish({b"f": replace(file(b"", b"1"), state=CaptureState.CHANGED)})
        (line,) = lines(repo, "changed", "latest")
        assert line.startswith("unknown ")
        assert line.endswith(" observed nothing       f")

    def test_changed_reports_that_nothing_was_flagged(self, repo: RepositoryFixture) -> None:
        repo.publish({b"f": b""})
        result = run(repo, "changed", "latest")
        assert result.stdout == ""
        assert "nothing in latest" in result.stderr
        assert run(repo, "changed", "latest", "--json").stderr == ""


class TestLatest:
    @pytest.fixture(autouse=True)
    def snapshots(self, repo: RepositoryFixture) -> list[str]:
        first: Plan = {b"a": b"1"}
        second: Plan = {b"b": b"22"}
        older, _ = repo.publish(first, time_ns=MTIME_NS, host="h1", tags=("x",), paths=(b"/p",))
        newer, _ = repo.publish(
            second, time_ns=MTIME_NS + 1, host="h2", tags=("y", "z"), paths=(b"/q",)
        )
        return [older.hex(), newer.hex()]

    @pytest.mark.parametrize(
        "options", [("--host", "h1"), ("--tag", "x"), ("--path", "/p/")], ids=" ".join
    )
    def test_latest_is_narrowed_by_host_tag_and_path(
        self, repo: RepositoryFixture, options: tuple[str, ...], snapshots: list[str]
    ) -> None:
        older, newer = snapshots
        assert lines(repo, "ls", "latest")[0].endswith(" b")
        (line,) = lines(repo, "ls", "latest", *options)
        assert line.endswith(" a")
        assert lines(repo, "dump", "latest:a", *options) == ["1"]
        assert lines(repo, "log", "latest:a", *options)[1].startswith(older[:12])
        assert "size:       1 B" in lines(repo, "stats", "latest", *options)
        assert lines(repo, "find", "*", *options) == [f"{older[:12]}:a"]
        within_latest = ("--snapshot", "latest", *options)
        assert lines(repo, "find", "*", *within_latest) == [f"{older[:12]}:a"]
        assert lines(repo, "diff", "latest", newer, *options)[:2] == ["-  a", "+  b"]

    def test_an_id_is_not_narrowed(self, repo: RepositoryFixture, snapshots: list[str]) -> None:
        (line,) = lines(repo, "ls", snapshots[1], "--host", "h1")
        assert line.endswith(" b")

    def test_a_filter_that_no_snapshot_matches_is_an_error(self, repo: RepositoryFixture) -> None:
        with pytest.raises(NotFoundError, match="no snapshot matches"):
            run(repo, "ls", "latest", "--tag", "y,x")

    def test_a_mount_of_all_snapshots_takes_no_filter(self, repo: RepositoryFixture) -> None:
        with pytest.raises(click.UsageError, match="narrow latest"):
            run(repo, "mount", "/mnt", "--host", "h1")
