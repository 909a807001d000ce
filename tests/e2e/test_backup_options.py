"""Every option of `casfs backup`, and how paths are given."""

from __future__ import annotations

import os
import random
import select
import socket
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from casfs.format.pack import PACK_PREFIXES
from tests.support.cli import Casfs, finish, program
from tests.support.comparing import tree_differences
from tests.support.full_tree import HOSTILE_NAMES
from tests.support.mounts import tmpfs
from tests.support.stored_objects import StoredObject, StoredObjects
from tests.support.waiting import wait_until

MIB = 1 << 20


def below(casfs: Casfs, top: Path, snapshot: str = "latest") -> set[str]:
    """Return the entries of a snapshot below an absolute path, without the path itself."""
    prefix = str(top).strip("/") + "/"
    nodes = casfs.json("ls", snapshot).of_type("node")
    paths = [node["path"].strip("/") for node in nodes]
    return {path.removeprefix(prefix) for path in paths if path.startswith(prefix)}


def files(casfs: Casfs, snapshot: str = "latest") -> set[str]:
    """Return every path of a snapshot that is not a directory."""
    nodes = casfs.json("ls", snapshot).of_type("node")
    return {node["path"].lstrip("/") for node in nodes if node["kind"] != "dir"}


def german_latin1(folder: Path) -> Path:
    """Return a LOCPATH with a German locale whose characters are Latin-1; skip where none can be made."""
    made = folder / "locales"
    made.mkdir()
    command = ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(made / "de_DE")]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs localedef")
    if done.returncode != 0:
        pytest.skip(f"no German locale can be made: {os.fsdecode(done.stderr).strip()}")
    return made


@pytest.fixture
def garden(tmp_path: Path) -> Path:
    """A tree with much in it that one may not want."""
    root = tmp_path / "garden"
    for name, size in (
        ("keep.txt", 10),
        ("noise.log", 10),
        ("important.log", 10),
        ("small.bin", 1000),
        ("limit.bin", 1024),
        ("large.bin", 3000),
        ("huge.bin", 2 * MIB),
        ("build/output.o", 10),
        ("build/keep.txt", 10),
        ("src/build/output.o", 10),
        ("src/main.c", 10),
        ("src/main.o", 10),
        ("src/deep/er/still.log", 10),
        ("docs/a.md", 10),
        ("docs/b.md", 10),
        ("docs/drafts/c.md", 10),
        ("cache/CACHEDIR.TAG", 0),
        ("cache/thing", 10),
        ("fake-cache/CACHEDIR.TAG", 0),
        ("fake-cache/thing", 10),
        ("private/.nobackup", 0),
        ("private/diary", 10),
        ("private/more/diary", 10),
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    signature = b"Signature: 8a477f597d28d172789f06886806bc55\n# a cache\n"
    (root / "cache/CACHEDIR.TAG").write_bytes(signature)
    (root / "fake-cache/CACHEDIR.TAG").write_bytes(b"not the signature\n")
    return root


class TestSourcePaths:
    def test_an_absolute_path_is_kept_whole(self, repository: Casfs, source: Path) -> None:
        repository.backup(source)
        assert files(repository) == {
            f"{str(source).lstrip('/')}/{name}"
            for name in (
                *("readme.txt", "link", "documents/report.txt"),
                *("documents/letters/to-anna.txt", "pictures/photo.raw"),
            )
        }

    def test_a_relative_path_is_kept_as_given(self, repository: Casfs, source: Path) -> None:
        repository.backup("documents", "readme.txt", cwd=source)
        assert files(repository) == {
            "documents/report.txt",
            "documents/letters/to-anna.txt",
            "readme.txt",
        }

    def test_a_relative_path_of_several_parts_is_kept_as_given(
        self, repository: Casfs, source: Path
    ) -> None:
        repository.backup("source/documents/letters", cwd=source.parent)
        assert files(repository) == {"source/documents/letters/to-anna.txt"}

    def test_the_current_directory_becomes_the_root_of_the_snapshot(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        repository.backup(".", cwd=source)
        assert "readme.txt" in files(repository)
        repository.run("restore", "latest", "--target", tmp_path / "target")
        assert tree_differences(source, tmp_path / "target") == []

    @pytest.mark.parametrize("path", ["../source/documents", "../../{top}/source/documents"])
    def test_two_dots_in_a_source_path_are_resolved_first(
        self, repository: Casfs, source: Path, path: str
    ) -> None:
        """What `..` leads out to has no place below the root but its own, from the top."""
        repository.backup(path.format(top=source.parent.name), cwd=source)
        found = files(repository)
        assert found
        assert not any(".." in name.split("/") for name in found)
        assert all(
            name.endswith(("documents/report.txt", "documents/letters/to-anna.txt"))
            for name in found
        )

    def test_dots_within_a_source_path_are_resolved_first(
        self, repository: Casfs, source: Path
    ) -> None:
        repository.backup("pictures/../documents/./letters/", cwd=source)
        assert files(repository) == {"documents/letters/to-anna.txt"}
        repository.backup(f"{source}/pictures/../readme.txt")
        assert files(repository) == {str(source / "readme.txt").lstrip("/")}

    def test_source_paths_within_each_other_are_kept_once(
        self, repository: Casfs, source: Path
    ) -> None:
        snapshot = repository.backup(source, source / "documents", source / "readme.txt")
        assert snapshot["files"] == 4
        assert len(files(repository)) == 5

    def test_a_source_with_a_leading_dash_is_accepted_after_two_dashes(
        self, repository: Casfs, tmp_path: Path
    ) -> None:
        (tmp_path / "-rf").write_bytes(b"harmless")
        repository.backup("--", "-rf", cwd=tmp_path)
        assert files(repository) == {"-rf"}

    def test_a_source_name_that_is_not_utf8_is_accepted(
        self, repository: Casfs, tmp_path: Path
    ) -> None:
        for name in (b"caf\xe9\xff", b"two\nlines"):
            with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
                file.write(name)
            repository.backup(name, cwd=tmp_path)
            assert repository.run("dump", b"latest:" + name).out == name

    def test_a_source_that_is_a_symbolic_link_is_kept_as_a_link(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "to-source").symlink_to(source)
        repository.backup("to-source", cwd=tmp_path)
        (node,) = repository.json("ls", "latest").of_type("node")
        assert (node["path"].lstrip("/"), node["kind"]) == ("to-source", "symlink")

    def test_directories_above_an_absolute_source_keep_their_modes(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        (source / "documents").chmod(0o750)
        repository.backup(source / "documents" / "letters")
        repository.run("restore", "latest", "--target", tmp_path / "target")
        restored = tmp_path / "target" / str(source / "documents").lstrip("/")
        assert restored.stat().st_mode & 0o7777 == 0o750


class TestSnapshotDetails:
    def test_tags_host_and_time_are_taken_from_the_options(
        self, repository: Casfs, source: Path
    ) -> None:
        printed = repository.backup(
            *("--tag", "daily", "--tag", "before the move", "--host", "attic"),
            *("--time", "2020-02-03T04:05:06+00:00", source),
        )
        listed = repository.json("snapshots").one("snapshot")
        for snapshot in (printed, listed):
            assert sorted(snapshot["tags"]) == ["before the move", "daily"]
            assert snapshot["host"] == "attic"
            when = datetime.fromisoformat(snapshot["time"])
            assert when == datetime(2020, 2, 3, 4, 5, 6, tzinfo=UTC)
        assert listed["id"] == printed["id"]
        shown = repository.run("snapshots").text
        for word in ("2020-02-03", "attic", "daily", "before the move", printed["id"][:12]):
            assert word in shown

    def test_one_tag_option_accepts_several_tags(self, repository: Casfs, source: Path) -> None:
        snapshot = repository.backup("--tag", "home,daily", "--tag", "first", source)
        assert snapshot["tags"] == ["daily", "first", "home"]
        assert repository.json("snapshots", "--tag", "home,daily").one("snapshot")
        repository.run("tag", "latest", "--remove", "first,daily", "--add", "a,b")
        assert repository.json("snapshots").one("snapshot")["tags"] == ["a", "b", "home"]

    def test_host_and_time_default_to_those_of_the_machine(
        self, repository: Casfs, source: Path
    ) -> None:
        before = datetime.now(UTC).replace(microsecond=0)
        snapshot = repository.backup(source)
        assert snapshot["host"] == socket.gethostname()
        assert before <= datetime.fromisoformat(snapshot["time"]) <= datetime.now(UTC)
        assert snapshot["tags"] == []

    @pytest.mark.parametrize("given", ["2019-12-31 23:59:58", "2019-12-31T23:59:58", "2019-12-31"])
    def test_a_time_without_a_zone_is_local_time(
        self, repository: Casfs, source: Path, given: str
    ) -> None:
        snapshot = repository.backup("--time", given, source, env={"TZ": "Etc/GMT-5"})
        shown = datetime.fromisoformat(snapshot["time"]).astimezone(UTC)
        midnight = (31, 18, 59) if ":" in given else (30, 19, 0)
        assert (shown.day, shown.hour, shown.minute) == midnight

    def test_latest_is_the_snapshot_with_the_newest_time(
        self, repository: Casfs, source: Path
    ) -> None:
        (source / "now").touch()
        repository.backup("--time", "2022-01-01T00:00:00Z", source)
        (source / "now").unlink()
        repository.backup("--time", "2021-01-01T00:00:00Z", source)
        assert "now" in below(repository, source)


class TestExclusion:
    EVERYTHING = frozenset(
        {
            *("keep.txt", "noise.log", "important.log", "small.bin", "limit.bin", "large.bin"),
            *("huge.bin", "build/output.o", "build/keep.txt", "src/build/output.o", "src/main.c"),
            *("src/main.o", "src/deep/er/still.log", "docs/a.md", "docs/b.md"),
            *("docs/drafts/c.md", "cache/CACHEDIR.TAG", "cache/thing"),
            *("fake-cache/CACHEDIR.TAG", "fake-cache/thing"),
            *("private/.nobackup", "private/diary", "private/more/diary"),
        }
    )

    def left_out(
        self, casfs: Casfs, garden: Path, *options: str | Path, stdin: bytes = b""
    ) -> set[str]:
        casfs.backup(*options, garden, stdin=stdin)
        kept = below(casfs, garden)
        return set(self.EVERYTHING) - kept

    def test_a_backup_excludes_nothing_by_default(self, repository: Casfs, garden: Path) -> None:
        assert self.left_out(repository, garden) == set()

    def test_exclude_matches_a_pattern_at_any_depth(self, repository: Casfs, garden: Path) -> None:
        assert self.left_out(repository, garden, "--exclude", "*.log") == {
            "noise.log",
            "important.log",
            "src/deep/er/still.log",
        }

    def test_exclude_accepts_several_patterns(self, repository: Casfs, garden: Path) -> None:
        gone = self.left_out(repository, garden, "--exclude", "*.o", "--exclude", "*.md")
        assert gone == {
            *("build/output.o", "src/build/output.o", "src/main.o"),
            *("docs/a.md", "docs/b.md", "docs/drafts/c.md"),
        }

    def test_exclude_of_a_directory_leaves_out_everything_below_it(
        self, repository: Casfs, garden: Path
    ) -> None:
        gone = self.left_out(repository, garden, "--exclude", "build/")
        assert gone == {"build/output.o", "build/keep.txt", "src/build/output.o"}
        assert "build" not in below(repository, garden)

    def test_exclude_of_a_directory_pattern_keeps_a_file_of_that_name(
        self, repository: Casfs, garden: Path
    ) -> None:
        (garden / "docs" / "build").write_bytes(b"a file")
        self.left_out(repository, garden, "--exclude", "build/")
        assert "docs/build" in below(repository, garden)

    def test_exclude_of_an_absolute_path_matches_only_that_path(
        self, repository: Casfs, garden: Path
    ) -> None:
        gone = self.left_out(repository, garden, "--exclude", str(garden / "build"))
        assert gone == {"build/output.o", "build/keep.txt"}

    def test_exclude_file_uses_gitignore_syntax(
        self, repository: Casfs, garden: Path, tmp_path: Path
    ) -> None:
        rules = tmp_path / "rules"
        rules.write_bytes(
            b"# a comment\n"
            b"\n"
            b"*.log\n"
            b"!important.log\n"
            b"docs/*\n"
            b"!docs/b.md\n"
            b"**/deep/**\n"
            b"\\!surprise\n"
            b"main.?\n"
            b"[sl]*.bin\n"
        )
        (garden / "!surprise").write_bytes(b"x")
        gone = self.left_out(repository, garden, "--exclude-file", rules)
        assert gone >= {"noise.log", "src/deep/er/still.log", "src/main.c", "src/main.o"}
        assert gone >= {"small.bin", "limit.bin", "large.bin"}
        assert gone.isdisjoint({"important.log", "huge.bin", "keep.txt", "build/output.o"})
        assert "!surprise" not in below(repository, garden)

    def test_exclude_file_accepts_patterns_that_are_not_utf8(
        self, repository: Casfs, garden: Path, tmp_path: Path
    ) -> None:
        for name in (b"caf\xe9", b"\xff\xfe"):
            with open(os.fsencode(garden) + b"/" + name, "wb"):
                pass
        rules = tmp_path / "rules"
        rules.write_bytes(b"caf\xe9\n")
        self.left_out(repository, garden, "--exclude-file", rules)
        kept = {os.fsencode(name) for name in below(repository, garden)}
        assert b"caf\xe9" not in kept
        assert b"\xff\xfe" in kept

    def test_a_missing_exclude_file_ends_the_backup(self, repository: Casfs, garden: Path) -> None:
        result = repository.run("backup", "--exclude-file", "nowhere", garden, expect=None)
        assert result.exit in (1, 2), result
        assert "nowhere" in result.complaint
        assert repository.json("snapshots").objects == []

    @pytest.mark.parametrize(
        ("patterns", "kept"),
        [
            (["*", "!*/", "!*.c"], {"src/main.c"}),
            (
                ["build/**", "!build/keep.txt"],
                {"build/keep.txt", "src/build/output.o", "src/main.c", "src/main.o"},
            ),
            (["!*", "src"], {"build/output.o", "build/keep.txt"}),
            (["[[:alpha:]]*"], set()),
            (["./build", "./main.c"], {"src/build/output.o", "src/main.c", "src/main.o"}),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_excludes_mean_what_git_means(
        self, repository: Casfs, garden: Path, patterns: list[str], kept: set[str]
    ) -> None:
        options = [word for pattern in patterns for word in ("--exclude", pattern)]
        repository.backup(*options, ".", cwd=garden)
        found = files(repository)
        assert {name for name in found if name.startswith(("src/", "build/"))} - {
            "src/deep/er/still.log"
        } == kept

    @pytest.mark.parametrize("pattern", ["garden", "/garden/", "garden/build"])
    def test_a_source_that_is_excluded_fails_the_backup(
        self, repository: Casfs, garden: Path, pattern: str
    ) -> None:
        repository.refuses(
            *("backup", "--exclude", pattern, "garden/build"),
            cwd=garden.parent,
            mentions=["garden/build is left out", f"'{pattern}'", "nothing was published"],
        )
        assert repository.json("snapshots").objects == []

    def test_excluded_sources_among_others_are_reported(
        self, repository: Casfs, garden: Path
    ) -> None:
        options = ("--exclude", "build", "--exclude-larger-than", "1M")
        found = repository.json("backup", *options, "build", "src", "huge.bin", cwd=garden)
        problems = {problem["path"]: problem["message"] for problem in found.of_type("problem")}
        assert problems == {
            "build": "this source is left out: the pattern 'build' matches it",
            "huge.bin": "this source is left out: it is larger than 1048576 bytes",
        }
        assert files(repository) == {"src/main.c", "src/main.o", "src/deep/er/still.log"}

    def test_many_excluded_sources_are_summed_up(self, repository: Casfs, garden: Path) -> None:
        names = [f"{number}.o" for number in range(15)]
        for name in names:
            (garden / name).write_bytes(b"x")
        found = repository.json("backup", "--exclude", "*.o", *names, "keep.txt", cwd=garden)
        messages = [problem["message"] for problem in found.of_type("problem")]
        assert len(messages) == 11
        assert messages[-1] == "5 more named sources are left out"
        assert files(repository) == {"keep.txt"}

    @pytest.mark.parametrize(
        "locale",
        [
            {"LC_ALL": "C.UTF-8"},
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            {"LC_ALL": "de_DE", "PYTHONUTF8": "0"},
        ],
        ids=["UTF-8", "ASCII", "Latin-1"],
    )
    def test_patterns_with_umlauts_match_in_every_locale(
        self, repository: Casfs, garden: Path, tmp_path: Path, locale: dict[str, str]
    ) -> None:
        if locale["LC_ALL"] == "de_DE":
            locale = locale | {"LOCPATH": str(german_latin1(tmp_path))}
        for name in ("bücher", "bücher.txt", "größe.o", "büro"):
            (garden / name).write_bytes(b"x")
        rules = tmp_path / "rules"
        rules.write_bytes("bü*er*\n[g]röße.o\n".encode())
        options = ("--exclude-file", rules, "--exclude", "büro")
        repository.run("backup", *options, garden, env=locale)
        assert not [name for name in below(repository, garden) if "ü" in name or "ö" in name]

    @pytest.mark.parametrize(
        ("rules", "mentions"),
        [
            (b"*.o\n[a\n", ["line 2 of", "'['"]),
            ("*.o\n".encode("utf-16"), ["UTF-8"]),
            (b"a\\\n", ["line 1 of", "backslash"]),
        ],
        ids=["bracket", "UTF-16", "backslash"],
    )
    def test_exclude_file_that_cannot_mean_anything_ends_the_backup(
        self,
        repository: Casfs,
        garden: Path,
        tmp_path: Path,
        rules: bytes,
        mentions: list[str],
    ) -> None:
        (tmp_path / "rules").write_bytes(rules)
        options = ("--exclude-file", tmp_path / "rules", garden)
        repository.refuses("backup", *options, expect=2, mentions=mentions)
        assert repository.json("snapshots").objects == []

    def test_exclude_takes_a_name_that_begins_like_a_comment(
        self, repository: Casfs, garden: Path
    ) -> None:
        (garden / "#recycle").mkdir()
        self.left_out(repository, garden, "--exclude", "#recycle")
        assert "#recycle" not in below(repository, garden)

    def test_exclude_caches_checks_the_signature(self, repository: Casfs, garden: Path) -> None:
        gone = self.left_out(repository, garden, "--exclude-caches")
        assert gone - {"cache/CACHEDIR.TAG"} == {"cache/thing"}

    def test_exclude_if_present_checks_for_a_name(self, repository: Casfs, garden: Path) -> None:
        gone = self.left_out(repository, garden, "--exclude-if-present", ".nobackup")
        assert gone - {"private/.nobackup"} == {"private/diary", "private/more/diary"}

    def test_exclude_if_present_with_a_directory_keeps_it_empty(
        self, repository: Casfs, garden: Path
    ) -> None:
        (garden / "docs" / ".git" / "objects").mkdir(parents=True)
        (garden / "docs" / ".git" / "config").write_bytes(b"x")
        gone = self.left_out(repository, garden, "--exclude-if-present", ".git")
        assert gone == {"docs/a.md", "docs/b.md", "docs/drafts/c.md"}
        kept = below(repository, garden)
        assert {name for name in kept if name.startswith("docs")} == {"docs", "docs/.git"}

    def test_exclude_if_present_in_a_source_itself_is_reported(
        self, repository: Casfs, garden: Path
    ) -> None:
        found = repository.json(
            "backup", "--exclude-if-present", ".nobackup", "private", cwd=garden
        )
        assert [problem["path"] for problem in found.of_type("problem")] == ["private"]
        assert files(repository) == {"private/.nobackup"}

    @pytest.mark.parametrize("name", ["", ".git/", "a/b", ".."])
    def test_exclude_if_present_refuses_what_is_no_name(
        self, repository: Casfs, garden: Path, name: str
    ) -> None:
        repository.refuses(
            *("backup", "--exclude-if-present", name, garden),
            expect=2,
            mentions=["plain file name"],
        )

    def test_exclude_larger_than_checks_the_size(self, repository: Casfs, garden: Path) -> None:
        assert self.left_out(repository, garden, "--exclude-larger-than", "1024") == {
            "large.bin",
            "huge.bin",
        }
        assert self.left_out(repository, garden, "--exclude-larger-than", "1M") == {"huge.bin"}

    def test_one_file_system_leaves_out_mounted_file_systems(
        self, repository: Casfs, garden: Path, superuser: None
    ) -> None:
        with tmpfs(garden / "mnt") as other:
            (other / "elsewhere").write_bytes(b"on another file system")
            repository.backup("--one-file-system", garden)
            kept = below(repository, garden)
            assert "mnt/elsewhere" not in kept
            assert "mnt" in kept, "the mountpoint itself is an empty directory of this one"
            assert kept >= self.EVERYTHING
            repository.backup(garden)
            assert "mnt/elsewhere" in below(repository, garden)

    def test_one_file_system_stays_on_the_file_system_of_each_source(
        self, repository: Casfs, garden: Path, superuser: None
    ) -> None:
        with tmpfs(garden / "mnt") as other:
            (other / "elsewhere").write_bytes(b"on another file system")
            repository.backup("--one-file-system", garden / "docs", other)
            assert files(repository) == {
                str(garden / name).lstrip("/")
                for name in ("docs/a.md", "docs/b.md", "docs/drafts/c.md", "mnt/elsewhere")
            }

    def test_excluded_entries_are_never_opened(self, repository: Casfs, garden: Path) -> None:
        """A FIFO would block for ever, and a name left out may not be readable."""
        os.mkfifo(garden / "pipe.log")
        (garden / "closed").mkdir(mode=0)
        repository.backup("--exclude", "*.log", "--exclude", "closed", garden)
        assert below(repository, garden).isdisjoint({"pipe.log", "closed"})


class TestSourcesFromStreams:
    def test_files_from_reads_one_path_a_line(
        self, repository: Casfs, garden: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "list").write_bytes(b"keep.txt\ndocs\n\nsrc/main.c\n")
        repository.backup("--files-from", tmp_path / "list", cwd=garden)
        assert files(repository) == {
            *("keep.txt", "docs/a.md", "docs/b.md", "docs/drafts/c.md", "src/main.c"),
        }

    def test_files_from_reads_paths_from_stdin(self, repository: Casfs, garden: Path) -> None:
        repository.backup("--files-from", "-", cwd=garden, stdin=b"keep.txt\nsmall.bin")
        assert files(repository) == {"keep.txt", "small.bin"}

    def test_files_from_with_nul_separators_accepts_every_name(
        self, repository: Casfs, tmp_path: Path
    ) -> None:
        names = [name for name in HOSTILE_NAMES if name != b"-"]
        (tmp_path / "names").mkdir()
        for name in names:
            with open(os.fsencode(tmp_path / "names") + b"/" + name, "wb") as file:
                file.write(name)
        snapshot = repository.backup(
            "--files-from", "-", "-0", cwd=tmp_path / "names", stdin=b"\0".join(names) + b"\0"
        )
        assert snapshot["files"] == len(names)
        assert {os.fsencode(name) for name in files(repository)} == set(names)

    def test_files_from_adds_to_the_given_paths(self, repository: Casfs, garden: Path) -> None:
        repository.backup("--files-from", "-", "keep.txt", cwd=garden, stdin=b"small.bin\n")
        assert files(repository) == {"keep.txt", "small.bin"}

    def test_files_from_reports_a_missing_path(self, repository: Casfs, garden: Path) -> None:
        result = repository.run(
            "backup", "--files-from", "-", cwd=garden, stdin=b"keep.txt\nnowhere\n", expect=3
        )
        assert "nowhere" in result.complaint
        assert files(repository) == {"keep.txt"}

    def test_files_from_has_no_comments(self, repository: Casfs, garden: Path) -> None:
        (garden / "# c").write_bytes(b"x")
        repository.backup("--files-from", "-", cwd=garden, stdin=b"# c\nkeep.txt\n")
        assert files(repository) == {"# c", "keep.txt"}
        words = repository.run("backup", "--help").text.split()
        assert "A line that begins with # is a path too." in " ".join(words)

    def test_files_from_may_begin_with_a_byte_order_mark(
        self, repository: Casfs, garden: Path
    ) -> None:
        repository.backup("--files-from", "-", cwd=garden, stdin=b"\xef\xbb\xbfkeep.txt\n")
        assert files(repository) == {"keep.txt"}

    def test_files_from_may_have_the_line_ends_of_windows(
        self, repository: Casfs, garden: Path
    ) -> None:
        (garden / "odd\r").write_bytes(b"x")
        repository.backup("--files-from", "-", cwd=garden, stdin=b"keep.txt\r\nsmall.bin\r\n\r\n")
        assert files(repository) == {"keep.txt", "small.bin"}
        repository.backup("--files-from", "-", cwd=garden, stdin=b"keep.txt\nodd\r\n")
        assert files(repository) == {"keep.txt", "odd\r"}

    def test_files_from_an_endless_file_is_refused(self, repository: Casfs, garden: Path) -> None:
        repository.refuses(
            "backup", "-0", "--files-from", "/dev/zero", expect=2, mentions=["/dev/zero", "bytes"]
        )

    def test_files_from_waits_for_a_pipe_that_does_not_block(
        self, repository: Casfs, garden: Path
    ) -> None:
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        with open(reader, "rb") as source, open(writer, "wb", 0) as paths:
            process = subprocess.Popen(
                [*program(), "backup", "--files-from", "-"],
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=garden,
                env=repository.environment(),
            )
            paths.write(b"keep.txt\nsmall")
            wait_until(lambda: not select.select([reader], [], [], 0)[0], "the command reads")
            paths.write(b".bin\n")
        assert finish(process).exit == 0
        assert files(repository) == {"keep.txt", "small.bin"}

    def test_files_from_with_nul_suggests_the_option_for_it(
        self, repository: Casfs, garden: Path
    ) -> None:
        repository.refuses(
            *("backup", "--files-from", "-"),
            cwd=garden,
            stdin=b"keep.txt\0docs\0",
            expect=2,
            mentions=["NUL", "-0", "standard input"],
        )
        repository.refuses(
            *("backup", "-0", "docs"), cwd=garden, expect=2, mentions=["--files-from"]
        )

    def test_more_paths_than_a_snapshot_can_hold_are_refused_before_anything_is_stored(
        self, repository: Casfs, garden: Path
    ) -> None:
        before = StoredObjects(repository).packs()
        paths = b"".join(b"docs/%08d" % n + b"x" * 200 + b"\n" for n in range(60_000))
        repository.refuses(
            *("backup", "--files-from", "-"),
            cwd=garden,
            stdin=b"docs/a.md\n" + paths,
            expect=2,
            mentions=["name fewer paths"],
        )
        assert StoredObjects(repository).packs() == before

    def test_an_empty_files_from_list_publishes_nothing(
        self, repository: Casfs, garden: Path
    ) -> None:
        result = repository.run("backup", "--files-from", "-", cwd=garden, expect=None)
        assert result.exit in (1, 2), result
        assert result.complaints
        assert repository.json("snapshots").objects == []

    @pytest.mark.parametrize("size", [0, 1, 70_000, 9 * MIB + 7])
    def test_stdin_becomes_a_file_of_the_given_name(self, repository: Casfs, size: int) -> None:
        data = random.Random(size).randbytes(size)
        snapshot = repository.backup("--stdin", "--stdin-name", "dump.sql", stdin=data)
        assert (snapshot["files"], snapshot["bytes"]) == (1, size)
        assert files(repository) == {"dump.sql"}
        assert repository.run("dump", "latest:dump.sql").out == data

    def test_stdin_becomes_a_file_named_stdin_by_default(self, repository: Casfs) -> None:
        repository.backup("--stdin", stdin=b"SELECT 1;\n")
        assert files(repository) == {"stdin"}
        assert repository.run("dump", "latest:/stdin").out == b"SELECT 1;\n"


class TestBackupDryRun:
    def test_a_backup_dry_run_stores_nothing_and_reports_what_it_would(
        self, repository: Casfs, source: Path
    ) -> None:
        before = tree_of(repository)
        printed = repository.backup("--dry-run", source)
        assert printed["dry_run"] is True
        assert (printed["files"], printed["bytes"]) == (4, 8 + 9000 + 10 + MIB)
        assert tree_of(repository) == before
        assert repository.json("snapshots").objects == []
        people = repository.run("backup", "--dry-run", source)
        assert "dry" in people.text.lower() or "would" in people.text.lower(), people
        real = repository.backup(source)
        assert real["dry_run"] is False
        assert (real["files"], real["bytes"]) == (printed["files"], printed["bytes"])

    def test_a_backup_dry_run_distinguishes_unchanged_and_stored_data(
        self, repository: Casfs, source: Path
    ) -> None:
        repository.backup(source)
        (source / "copy of the photo").write_bytes((source / "pictures/photo.raw").read_bytes())
        (source / "new").write_bytes(os.urandom(100_000))
        printed = repository.backup("--dry-run", source)
        assert 100_000 <= printed["new_bytes"] < 200_000
        assert len(repository.json("snapshots").objects) == 1


def tree_of(casfs: Casfs) -> list[StoredObject]:
    """Return the stored objects without the locks and the index's bookkeeping."""
    return StoredObjects(casfs).below(*PACK_PREFIXES, "deltas", "drafts", "snapshots", "tmp")


class TestBackupStorage:
    def test_a_higher_compression_level_stores_less(
        self, repository: Casfs, tmp_path: Path
    ) -> None:
        dice = random.Random(5)
        words = [dice.randbytes(4).hex() for _ in range(2000)]
        text = " ".join(dice.choice(words) for _ in range(400_000)).encode()
        (tmp_path / "text").write_bytes(text)
        stored = {}
        for level in ("1", "19"):
            other = repository.beside(f"level-{level}").init()
            snapshot = other.backup("--compression", level, "text", cwd=tmp_path)
            assert other.run("dump", "latest:text").out == text
            stored[level] = snapshot["new_bytes"]
        assert stored["19"] < stored["1"] < len(text)

    @pytest.mark.parametrize("spool", ["memory", "disk"])
    def test_both_spools_store_the_same(
        self, repository: Casfs, source: Path, tmp_path: Path, spool: str
    ) -> None:
        (source / "big").write_bytes(random.Random(6).randbytes(12 * MIB))
        snapshot = repository.backup("--spool", spool, source)
        assert snapshot["files"] == 5
        assert repository.json("check", "--read-data").one("summary")["ok"] is True
        repository.run("restore", "latest", "--target", tmp_path / "target")
        assert tree_differences(source, tmp_path / "target" / str(source).lstrip("/")) == []

    def test_a_backup_prints_the_snapshot_id_and_its_counts(
        self, repository: Casfs, source: Path
    ) -> None:
        result = repository.run("backup", source)
        snapshot = repository.json("snapshots").one("snapshot")
        assert snapshot["id"][:12] in result.text
        assert "4" in result.text
        assert result.complaint == "", "nothing is drawn where there is no terminal"

    def test_two_concurrent_backups_both_succeed(
        self, repository: Casfs, source: Path, garden: Path
    ) -> None:
        first = repository.start("backup", source)
        second = repository.start("backup", garden)
        for process in (first, second):
            _, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
        assert len(repository.json("snapshots").objects) == 2
        assert repository.json("check", "--read-data").one("summary")["ok"] is True


@pytest.mark.fuse
def test_a_time_that_no_snapshot_can_hold_does_not_end_a_backup(
    repository: Casfs, tmp_path: Path
) -> None:
    with tmpfs(tmp_path / "memory") as memory:
        far = memory / "far"
        far.write_text("from the year 33658")
        os.utime(far, ns=(10**21, 10**21))
        assert far.stat().st_mtime_ns == 10**21
        repository.backup(memory)
        repository.backup(memory)
    (node,) = repository.json("ls", f"latest:{far}").of_type("node")
    assert node["mtime_ns"] == (1 << 63) - 1
    repository.run("ls", "latest")
    target = tmp_path / "target"
    repository.run("restore", f"latest:{memory}", "--target", target)
    assert (target / "far").read_text() == "from the year 33658"
