"""Looking at snapshots without mounting them: snapshots, ls, find, diff, dump, stats, tag."""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
import tarfile
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Casfs, finish, interrupt, program
from tests.support.stored_objects import StoredObjects

MIB = 1 << 20


def by_path(nodes: list[dict[str, Any]], top: str | Path) -> dict[str, dict[str, Any]]:
    """Index lines by their path below `top`."""
    prefix = str(top).strip("/") + "/"
    return {
        node["path"].strip("/").removeprefix(prefix): node
        for node in nodes
        if node["path"].strip("/").startswith(prefix)
    }


class TestSnapshots:
    def test_snapshots_are_listed_from_the_oldest_to_the_newest(
        self, repository: Casfs, source: Path
    ) -> None:
        ids = [
            repository.backup("--time", f"20{year}-01-01T00:00:00Z", source)["id"]
            for year in (22, 20, 21)
        ]
        listed = repository.json("snapshots").of_type("snapshot")
        assert [snapshot["id"] for snapshot in listed] == [ids[1], ids[2], ids[0]]
        for snapshot in listed:
            assert len(snapshot["id"]) == 64
            assert snapshot["paths"] == [str(source)]
            assert (snapshot["files"], snapshot["flagged"]) == (4, 0)
            assert snapshot["bytes"] == 8 + 9000 + 10 + MIB
            assert datetime.fromisoformat(snapshot["time"]).tzinfo is not None
        lines = repository.run("snapshots").text
        places = [lines.index(identity[:12]) for identity in (ids[1], ids[2], ids[0])]
        assert places == sorted(places)
        assert str(source) in lines

    def test_snapshots_of_an_empty_repository_prints_nothing(self, repository: Casfs) -> None:
        assert repository.json("snapshots").objects == []
        repository.run("snapshots")


class TestLs:
    def test_ls_lists_the_whole_snapshot(self, repository: Casfs, source: Path) -> None:
        repository.backup(source)
        nodes = by_path(repository.json("ls", "latest").of_type("node"), source)
        assert nodes.keys() == {
            *("readme.txt", "link", "documents", "documents/report.txt", "documents/letters"),
            *("documents/letters/to-anna.txt", "pictures", "pictures/photo.raw"),
        }
        report = nodes["documents/report.txt"]
        state = (source / "documents/report.txt").stat()
        assert (report["kind"], report["size"]) == ("file", 9000)
        assert (report["uid"], report["gid"]) == (state.st_uid, state.st_gid)
        assert stat.S_IMODE(report["mode"]) == stat.S_IMODE(state.st_mode)
        assert report["mtime_ns"] == state.st_mtime_ns
        assert nodes["documents"]["kind"] == "dir"
        assert nodes["link"]["kind"] == "symlink"
        assert "documents/report.txt" in nodes["link"].values()
        shown = repository.run("ls", "latest").text
        for path in nodes:
            assert path in shown

    def test_ls_lists_one_directory_or_one_file(self, repository: Casfs, source: Path) -> None:
        identity = repository.backup(source)["id"]
        for snapshot in ("latest", identity, identity[:10]):
            found = repository.json("ls", f"{snapshot}:{source}/documents").of_type("node")
            names = {node["path"].rpartition("/")[2] for node in found}
            assert {"report.txt", "letters"} <= names
            assert names.isdisjoint({"readme.txt", "photo.raw"})
        (file,) = repository.json("ls", f"latest:{source}/readme.txt").of_type("node")
        assert file["path"].endswith("readme.txt")

    def test_ls_accepts_a_path_with_a_colon(self, repository: Casfs, tmp_path: Path) -> None:
        (tmp_path / "a:b").mkdir()
        (tmp_path / "a:b" / "c:d").write_bytes(b"colons")
        repository.backup("a:b", cwd=tmp_path)
        assert repository.json("ls", "latest:a:b/c:d").one("node")["size"] == 6
        assert repository.run("dump", "latest:a:b/c:d").out == b"colons"

    def test_dump_accepts_a_path_with_and_without_a_leading_slash(
        self, repository: Casfs, source: Path
    ) -> None:
        repository.backup("documents", cwd=source)
        for path in ("documents/report.txt", "/documents/report.txt", "//documents//report.txt"):
            assert repository.run("dump", f"latest:{path}").out == b"a report\n" * 1000


class TestFind:
    @pytest.fixture(autouse=True)
    def snapshots(self, repository: Casfs, source: Path) -> list[str]:
        first = repository.backup(source)["id"]
        (source / "pictures" / "report.pdf").write_bytes(b"%PDF")
        second = repository.backup(source)["id"]
        return [first, second]

    def found(self, casfs: Casfs, source: Path, *arguments: str) -> set[tuple[str, str]]:
        prefix = str(source).lstrip("/") + "/"
        return {
            (match["snapshot"], match["path"].lstrip("/").removeprefix(prefix))
            for match in casfs.json("find", *arguments).of_type("match")
        }

    def test_find_searches_for_a_name_in_every_snapshot(
        self, repository: Casfs, source: Path, snapshots: list[str]
    ) -> None:
        assert self.found(repository, source, "report.*") == {
            (snapshots[0], "documents/report.txt"),
            (snapshots[1], "documents/report.txt"),
            (snapshots[1], "pictures/report.pdf"),
        }
        shown = repository.run("find", "report.*").text
        assert "pictures/report.pdf" in shown
        assert snapshots[1][:12] in shown

    def test_find_finds_directories_and_links(
        self, repository: Casfs, source: Path, snapshots: list[str]
    ) -> None:
        assert self.found(repository, source, "letters") == {
            (identity, "documents/letters") for identity in snapshots
        }
        assert len(self.found(repository, source, "link")) == 2

    def test_find_reports_the_size_and_the_kind(self, repository: Casfs) -> None:
        match = repository.json("find", "report.pdf").one("match")
        assert (match["kind"], match["size"]) == ("file", 4)

    def test_find_without_matches_prints_nothing(self, repository: Casfs) -> None:
        result = repository.run("find", "no such name", expect=None)
        assert result.exit in (0, 1)
        assert result.out == b""


class TestDiff:
    def test_diff_distinguishes_added_removed_modified_and_metadata(
        self, repository: Casfs, source: Path
    ) -> None:
        first = repository.backup(source)["id"]
        (source / "new.txt").write_bytes(b"new")
        (source / "readme.txt").unlink()
        (source / "documents/report.txt").write_bytes(b"another report\n" * 1000)
        (source / "documents/letters/to-anna.txt").chmod(0o600)
        (source / "link").unlink()
        (source / "link").mkdir()
        second = repository.backup(source)["id"]
        result = repository.json("diff", first, second)
        changes = by_path(result.of_type("change"), source)
        kinds = {path: change["change"] for path, change in changes.items()}
        assert kinds.pop("new.txt") == "added"
        assert kinds.pop("readme.txt") == "removed"
        assert kinds.pop("documents/report.txt") == "modified"
        assert kinds.pop("documents/letters/to-anna.txt") == "metadata"
        assert kinds.pop("link") == "type"
        # Directories whose own mtime moved may be reported as well, and nothing else.
        assert set(kinds.values()) <= {"metadata"}
        assert kinds.keys() <= {"documents", "documents/letters", "pictures"}
        assert "pictures" not in kinds, "nothing changed there"
        result.one("summary")
        shown = repository.run("diff", first[:12], second[:12]).text
        for path in ("new.txt", "readme.txt", "documents/report.txt", "to-anna.txt", "link"):
            assert path in shown

    def test_diff_of_a_snapshot_with_itself_is_empty(self, repository: Casfs, source: Path) -> None:
        repository.backup(source)
        result = repository.json("diff", "latest", "latest")
        assert result.of_type("change") == []

    def test_diff_of_unchanged_backups_is_empty(self, repository: Casfs, source: Path) -> None:
        first = repository.backup(source)["id"]
        second = repository.backup(source)["id"]
        assert repository.json("diff", first, second).of_type("change") == []

    def test_diff_backwards_swaps_added_and_removed(self, repository: Casfs, source: Path) -> None:
        first = repository.backup(source)["id"]
        (source / "folder").mkdir()
        (source / "folder" / "new").touch()
        second = repository.backup(source)["id"]
        for pair, word in (((first, second), "added"), ((second, first), "removed")):
            changes = by_path(repository.json("diff", *pair).of_type("change"), source)
            assert changes["folder"]["change"] == word
            assert changes["folder/new"]["change"] == word

    def test_diff_of_a_path_compares_only_that_path(self, repository: Casfs, source: Path) -> None:
        """SNAP:PATH names something inside a snapshot wherever a snapshot is named."""
        first = repository.backup(source)["id"]
        (source / "new.txt").touch()
        (source / "pictures" / "new.txt").touch()
        second = repository.backup(source)["id"]
        part = f"{source}/pictures"
        result = repository.run("diff", f"{first}:{part}", f"{second}:{part}", expect=None)
        assert result.exit in (0, 2), result
        if result.exit == 0:
            assert result.text.count("new.txt") == 1


class TestDump:
    @pytest.mark.parametrize("size", [0, 1, 1 << 20, 5 * MIB + 3])
    def test_dump_of_a_file_prints_its_bytes(
        self, repository: Casfs, tmp_path: Path, size: int
    ) -> None:
        data = os.urandom(size)
        (tmp_path / "file").write_bytes(data)
        repository.backup("file", cwd=tmp_path)
        assert repository.run("dump", "latest:file").out == data

    def test_dump_of_a_directory_prints_a_tar_of_its_entries(
        self, repository: Casfs, source: Path
    ) -> None:
        repository.backup(source)
        stream = repository.run("dump", f"latest:{source}/documents").out
        with tarfile.open(fileobj=io.BytesIO(stream)) as tar:
            names = {name.removeprefix("./") for name in tar.getnames()} - {"", "."}
            assert names == {"report.txt", "letters", "letters/to-anna.txt"}
            member = next(m for m in tar if m.name.endswith("report.txt"))
            content = tar.extractfile(member)
            assert content is not None
            assert content.read() == b"a report\n" * 1000

    def test_dump_of_a_symbolic_link_or_a_fifo_is_refused(
        self, repository: Casfs, source: Path
    ) -> None:
        os.mkfifo(source / "fifo")
        repository.backup(source)
        for name in ("link", "fifo"):
            repository.refuses("dump", f"latest:{source}/{name}", mentions=[name])

    def test_dump_of_a_directory_does_not_write_to_a_terminal(
        self, repository: Casfs, source: Path
    ) -> None:
        repository.backup(source)
        command = " ".join([*program(), "dump", "latest:/"])
        done = subprocess.run(
            ["script", "-qec", command, "/dev/null"],
            env=repository.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        assert b"ustar" not in done.stdout
        assert done.returncode != 0


class TestStats:
    def test_stats_report_what_is_stored(self, repository: Casfs, source: Path) -> None:
        empty = repository.json("stats").one("stats")
        repository.backup(source)
        full = repository.json("stats").one("stats")
        assert empty.keys() <= full.keys()
        numbers = {name for name, value in full.items() if isinstance(value, int) and value}
        assert numbers, full
        assert any(full[name] > empty.get(name, 0) for name in numbers)
        assert repository.run("stats").text.strip()

    def test_stats_of_requests_are_refused_for_a_local_repository(self, repository: Casfs) -> None:
        repository.refuses("stats", "--requests", expect=2, mentions=["local"])

    def test_stats_of_a_snapshot_report_its_size(self, repository: Casfs, source: Path) -> None:
        identity = repository.backup(source)["id"]
        reported = repository.json("stats", "latest").one("stats")
        assert reported["snapshot"] == identity
        assert reported["bytes"] == 8 + 9000 + 10 + MIB
        assert repository.run("stats", "latest").text.strip()


class TestTag:
    def test_tag_adds_and_removes_tags(self, repository: Casfs, source: Path) -> None:
        repository.backup("--tag", "first", source)
        tagged = repository.json("tag", "latest", "--add", "keep").one("snapshot")
        assert sorted(tagged["tags"]) == ["first", "keep"]
        listed = repository.json("snapshots").one("snapshot")
        assert sorted(listed["tags"]) == ["first", "keep"]
        assert (listed["files"], listed["paths"]) == (4, [str(source)])
        repository.run("tag", "latest", "--remove", "first")
        assert repository.json("snapshots").one("snapshot")["tags"] == ["keep"]
        assert repository.run("dump", f"latest:{source}/readme.txt").out == b"read me\n"
        assert repository.json("check", "--read-data").one("summary")["ok"] is True

    def test_tag_leaves_the_other_snapshots_unchanged(
        self, repository: Casfs, source: Path
    ) -> None:
        first = repository.backup(source)["id"]
        repository.backup(source)
        repository.run("tag", first, "--add", "old")
        tags = [snapshot["tags"] for snapshot in repository.json("snapshots").objects]
        assert tags == [["old"], []]

    def test_a_tagged_snapshot_is_the_parent_of_the_next_backup(
        self, repository: Casfs, source: Path
    ) -> None:
        repository.backup(source)
        tagged = repository.json("tag", "latest", "--add", "x").one("snapshot")["id"]
        again = repository.backup(source)
        assert again["parent"] == tagged


class TestFindConditions:
    def test_find_selects_by_size(self, repository: Casfs, source: Path) -> None:
        repository.backup(source)

        def found(*arguments: str) -> set[str]:
            lines = repository.json("find", *arguments).of_type("match")
            return {line["path"].rpartition("/")[2] for line in lines}

        assert found("--size", "+1M") == set()
        assert found("--size", "1M") == {"photo.raw"}
        assert found("--size", "+8K") == {"photo.raw", "report.txt"}
        assert found("--size", "-11") == {"readme.txt", "to-anna.txt"}
        assert found("--size", "-11", "*.txt", "--type", "d") == set()
        repository.refuses("find", "--size", "much", expect=2)

    def test_find_selects_by_time(self, repository: Casfs, source: Path) -> None:
        os.utime(source / "readme.txt", (2_000_000_000, 2_000_000_000))
        repository.backup(source)
        later = repository.json("find", "--newer", "@1999999999").of_type("match")
        assert [line["path"].rpartition("/")[2] for line in later] == ["readme.txt"]
        assert repository.json("find", "--newer", "@2000000000").objects == []
        repository.refuses("find", "--newer", "yesterday", expect=2, mentions=["--newer"])

    def test_find_prints_a_long_listing(self, repository: Casfs, source: Path) -> None:
        identity = repository.backup(source)["id"]
        line = repository.run("find", "-l", "report.txt").text.rstrip("\n")
        assert line.startswith("-rw") and " 9000 " in line
        assert line.endswith(f"{identity[:12]}:{str(source).lstrip('/')}/documents/report.txt")

    def test_find_without_a_condition_is_refused(self, repository: Casfs) -> None:
        repository.refuses("find", expect=2)
        repository.refuses("find", "-i", expect=2)


def test_ls_prints_sizes_with_units(repository: Casfs, source: Path) -> None:
    repository.backup(source)
    where = f"latest:{source}/documents/report.txt"
    assert " 9000 " in repository.run("ls", where).text
    assert " 8.8 KiB " in repository.run("ls", "-h", where).text


class TestLocks:
    def test_locks_lists_who_uses_the_repository_and_since_when(
        self, repository: Casfs, source: Path
    ) -> None:
        assert repository.json("locks").objects == []
        process = repository.start("backup", "--stdin-from-command", "--", "sh", "-c", "sleep 1000")
        try:
            while not (found := repository.json("locks").of_type("lock")):
                assert process.poll() is None
            assert [(one["activity"], one["command"]) for one in found] == [("writes", "backup")]
            assert found[0]["pid"] == process.pid and found[0]["host"]
            shown = repository.run("locks").text
            assert "backup" in shown and str(process.pid) in shown
        finally:
            interrupt(process)
            finish(process)
        assert "no command" in repository.run("locks").text

    def test_locks_changes_nothing(self, repository: Casfs) -> None:
        assert repository.repository is not None
        stale = repository.repository / "locks" / "0123456789abcdef"
        stale.parent.mkdir(exist_ok=True)
        stale.write_text("{}")
        assert repository.json("locks").objects == []
        assert stale.exists()


class TestWithoutRepository:
    def test_version_prints_the_version_as_text_and_as_json(self, casfs: Casfs) -> None:
        none = casfs.at(None)
        printed = none.json("version").one("version")
        version = printed["casfs"]
        assert version.count(".") >= 1
        assert version in none.run("version").text

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_completion_prints_a_script_of_the_shell(self, casfs: Casfs, shell: str) -> None:
        script = casfs.at(None).run("completion", shell).out
        assert b"casfs" in script
        assert script.count(b"\n") > 3
        if shutil.which(shell):
            subprocess.run([shell, "-n"], input=script, check=True, capture_output=True)
        assert casfs.at(None).json("completion", shell).objects

    def test_completion_of_bash_completes_commands_and_options(self, casfs: Casfs) -> None:
        """Loads the script into a real shell and presses Tab there, so to speak."""
        if len(program()) > 1:
            pytest.skip("casfs is not installed as a command, only as a module")
        script = casfs.run("completion", "bash").text
        typed = script + (
            "\nCOMP_WORDS=(casfs sna); COMP_CWORD=1; COMP_LINE='casfs sna'; COMP_POINT=9\n"
            "completed=$(complete -p casfs | sed -n 's/.*-F \\([^ ]*\\).*/\\1/p')\n"
            '"$completed" casfs sna casfs; printf \'%s\\n\' "${COMPREPLY[@]}"\n'
        )
        folder = str(Path(program()[0]).parent)
        done = subprocess.run(
            ["bash", "--norc", "-c", typed],
            env=casfs.environment({"PATH": f"{folder}:{os.environ['PATH']}"}),
            capture_output=True,
            check=True,
        )
        assert "snapshots" in done.stdout.decode()


class TestRepositoryOption:
    def test_the_repository_is_named_before_or_after_the_command_or_in_the_environment(
        self, repository: Casfs, source: Path
    ) -> None:
        identity = repository.backup(source)["id"]
        where = repository.where
        none = repository.at(None)
        for arguments in (
            ("-r", where, "snapshots", "--json"),
            ("--repo", where, "snapshots", "--json"),
            (f"--repo={where}", "snapshots", "--json"),
            ("snapshots", "-r", where, "--json"),
            ("snapshots", "--repo", where, "--json"),
            ("snapshots", "--json", "-r", where),
        ):
            assert none.run(*arguments).one("snapshot")["id"] == identity
        assert none.run("ls", "latest", "-r", where).out
        if repository.repository is not None:
            assert none.run("-r", "repository", "ls", "latest", cwd=source.parent).out

    def test_the_repository_option_overrides_the_environment(
        self, repository: Casfs, source: Path
    ) -> None:
        identity = repository.backup(source)["id"]
        elsewhere = repository.beside("elsewhere")
        where = repository.where
        assert elsewhere.json("snapshots", "-r", where).one("snapshot")["id"] == identity
        assert elsewhere.run("-r", where, "snapshots", "--json").objects

    def test_a_repository_option_after_the_command_overrides_one_before_it(
        self, repository: Casfs, source: Path
    ) -> None:
        repository.backup(source)
        where = repository.where
        result = repository.at(None).run("-r", "/nowhere", "snapshots", "--json", "-r", where)
        assert result.of_type("snapshot")


class TestInit:
    def test_init_creates_the_repository_that_it_reports(self, casfs: Casfs) -> None:
        made = casfs.json("init").one("repository")
        assert (made["address"], made["format"]) == (casfs.where, 2)
        assert int(made["id"], 16)
        config = StoredObjects(casfs).read("config")
        assert config.startswith(b"casfs repository, format 2\n")
        assert made["id"].encode() in config

    def test_init_accepts_an_existing_empty_directory(self, casfs: Casfs) -> None:
        assert casfs.repository is not None
        casfs.repository.mkdir()
        assert str(casfs.repository) in casfs.run("init").text

    def test_init_gives_every_repository_its_own_id(self, casfs: Casfs) -> None:
        ids = {casfs.beside(name).json("init").one("repository")["id"] for name in ("one", "two")}
        assert len(ids) == 2

    def test_init_keeps_stored_data_private_to_its_owner(
        self, repository: Casfs, source: Path
    ) -> None:
        """A backup holds files that only their owners may read."""
        repository.backup(source)
        assert repository.repository is not None
        for folder, _, names in os.walk(repository.repository):
            for name in names:
                mode = os.stat(os.path.join(folder, name)).st_mode
                closed = not mode & 0o077 or not os.stat(repository.repository).st_mode & 0o077
                assert closed, f"{name} of mode {mode:o} can be read by others"
