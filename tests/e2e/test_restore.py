"""Restoring: all of a snapshot or a part, into nothing or over what is there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.support.cli import Casfs
from tests.support.comparing import look_at, rsync_differences, tree_differences

MIB = 1 << 20


@pytest.fixture
def kept(repository: Casfs, source: Path, tmp_path: Path) -> Casfs:
    """The everyday tree, backed up as `source`."""
    repository.backup("source", cwd=tmp_path)
    return repository


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def names(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


ALL = frozenset(
    {
        *("readme.txt", "link", "documents/report.txt", "documents/letters/to-anna.txt"),
        "pictures/photo.raw",
    }
)


class TestSelection:
    def test_restore_writes_a_whole_snapshot(self, kept: Casfs, source: Path, target: Path) -> None:
        summary = kept.json("restore", "latest", "--target", target).one("summary")
        assert (summary["files"], summary["bytes"]) == (4, 8 + 9000 + 10 + MIB)
        assert tree_differences(source, target / "source") == []
        assert rsync_differences(source, target / "source") == ""
        assert os.listdir(target) == ["source"]

    def test_restore_writes_a_directory_of_a_snapshot(
        self, kept: Casfs, source: Path, target: Path
    ) -> None:
        kept.run("restore", "latest:source/documents", "--target", target)
        assert names(target) == {"report.txt", "letters/to-anna.txt"}
        assert tree_differences(source / "documents", target) == []

    def test_restore_writes_a_file_of_a_snapshot(
        self, kept: Casfs, source: Path, target: Path
    ) -> None:
        kept.run("restore", "latest:/source/documents/report.txt", "--target", target)
        assert names(target) == {"report.txt"}
        assert (target / "report.txt").read_bytes() == b"a report\n" * 1000
        state = (source / "documents/report.txt").stat()
        assert (target / "report.txt").stat().st_mtime_ns == state.st_mtime_ns

    def test_restore_writes_an_older_snapshot(
        self, kept: Casfs, source: Path, target: Path
    ) -> None:
        first = kept.json("snapshots").one("snapshot")["id"]
        (source / "readme.txt").write_bytes(b"newer")
        kept.backup("source", cwd=source.parent)
        kept.run("restore", first[:12], "--target", target)
        assert (target / "source/readme.txt").read_bytes() == b"read me\n"

    def test_restore_creates_a_target_several_levels_deep(
        self, kept: Casfs, source: Path, target: Path
    ) -> None:
        kept.run("restore", "latest", "--target", target / "a" / "b")
        assert tree_differences(source, target / "a/b/source") == []

    def test_restore_accepts_a_relative_target(self, kept: Casfs, source: Path) -> None:
        kept.run("restore", "latest", "--target", "here")
        assert tree_differences(source, kept.home / "here/source") == []

    def test_restore_refuses_a_target_that_is_a_file(self, kept: Casfs, target: Path) -> None:
        target.write_bytes(b"in the way")
        kept.refuses("restore", "latest", "--target", target, mentions=[str(target)])
        assert target.read_bytes() == b"in the way"

    def test_restore_refuses_the_repository_as_its_target(self, kept: Casfs) -> None:
        assert kept.repository is not None
        before = look_at(kept.repository / "packs")
        for place in (kept.repository, kept.repository / "packs"):
            kept.refuses("restore", "latest", "--target", place, mentions=["repository"])
        assert look_at(kept.repository / "packs") == before


class TestIncludeAndExclude:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (("--include", "report.txt"), {"documents/report.txt"}),
            (("--include", "*.txt"), {name for name in ALL if name.endswith(".txt")}),
            (("--include", "pictures"), {"pictures/photo.raw"}),
            (
                ("--include", "pictures", "--include", "readme.txt"),
                {"pictures/photo.raw", "readme.txt"},
            ),
            (("--exclude", "*.txt"), {"link", "pictures/photo.raw"}),
            (("--exclude", "documents"), {"readme.txt", "link", "pictures/photo.raw"}),
            (("--exclude", "letters/"), ALL - {"documents/letters/to-anna.txt"}),
            (
                ("--include", "documents", "--exclude", "letters"),
                {"documents/report.txt"},
            ),
            (("--exclude", "*", "--exclude", "!*/", "--exclude", "!*.raw"), {"pictures/photo.raw"}),
            (("--exclude", "/documents/**"), ALL),
            (
                ("--exclude", "**/documents/**", "--exclude", "!report.txt"),
                ALL - {"documents/letters/to-anna.txt"},
            ),
            (
                ("--exclude", "!*", "--exclude", "documents"),
                {"readme.txt", "link", "pictures/photo.raw"},
            ),
            (("--include", "[[:alpha:]]eadme.txt"), {"readme.txt"}),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
    )
    def test_include_and_exclude_choose_what_is_restored(
        self, kept: Casfs, target: Path, options: tuple[str, ...], expected: set[str]
    ) -> None:
        kept.run("restore", "latest", "--target", target, *options)
        assert names(target / "source") == expected

    def test_include_of_nothing_fails(self, kept: Casfs, target: Path) -> None:
        kept.refuses(
            *("restore", "latest", "--target", target, "--include", "no such name"),
            mentions=["nothing matches --include 'no such name'", "nothing was restored"],
        )
        assert not target.exists() or names(target) == set()

    def test_a_pattern_that_matches_nothing_is_reported(self, kept: Casfs, target: Path) -> None:
        options = ("--include", "readme.txt", "--include", "*.doc", "--exclude", "*.tmp")
        result = kept.json("restore", "latest", "--target", target, *options)
        problems = [(p["kind"], p["option"], p["pattern"]) for p in result.of_type("problem")]
        assert problems == [
            ("unmatched pattern", "--include", "*.doc"),
            ("unmatched pattern", "--exclude", "*.tmp"),
        ]
        assert "--include '*.doc'" in result.complaint
        assert names(target / "source") == {"readme.txt"}

    @pytest.mark.parametrize("option", ["--include", "--exclude"])
    def test_a_pattern_that_can_never_match_is_refused(
        self, kept: Casfs, target: Path, option: str
    ) -> None:
        kept.refuses(
            *("restore", "latest", "--target", target, option, "[a"), expect=2, mentions=["'['"]
        )
        assert not target.exists()


class TestOverwrite:
    @pytest.fixture
    def changed(self, kept: Casfs, target: Path) -> Path:
        """A restored tree in which something was changed since, and something kept."""
        kept.run("restore", "latest", "--target", target)
        tree = target / "source"
        (tree / "readme.txt").write_bytes(b"changed by hand\n")
        (tree / "documents/letters/to-anna.txt").unlink()
        (tree / "pictures/photo.raw").chmod(0o600)
        (tree / "extra").write_bytes(b"not from the snapshot")
        return tree

    def restore(self, casfs: Casfs, target: Path, *options: str) -> None:
        casfs.run("restore", "latest", "--target", target, *options)

    def test_overwrite_always_replaces_every_file(
        self, kept: Casfs, source: Path, target: Path, changed: Path
    ) -> None:
        before = (changed / "documents/report.txt").stat().st_ino
        self.restore(kept, target, "--overwrite", "always")
        (changed / "extra").unlink()
        os.utime(changed, ns=(0, source.stat().st_mtime_ns))
        assert tree_differences(source, changed) == []
        assert (changed / "documents/report.txt").stat().st_ino != before

    def test_overwrite_if_changed_leaves_equal_files_untouched(
        self, kept: Casfs, source: Path, target: Path, changed: Path
    ) -> None:
        before = (changed / "documents/report.txt").stat()
        self.restore(kept, target, "--overwrite", "if-changed")
        after = (changed / "documents/report.txt").stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        (changed / "extra").unlink()
        os.utime(changed, ns=(0, source.stat().st_mtime_ns))
        assert tree_differences(source, changed) == []

    def test_overwrite_if_changed_restores_hard_links(
        self, kept: Casfs, source: Path, target: Path
    ) -> None:
        (source / "a").write_bytes(b"one file")
        kept.backup("source", cwd=source.parent)
        kept.run("restore", "latest", "--target", target)
        os.link(source / "a", source / "b")
        kept.backup("source", cwd=source.parent)
        kept.run("restore", "latest", "--target", target, "--overwrite", "if-changed")
        assert tree_differences(source, target / "source") == []

    def test_overwrite_never_keeps_existing_files_and_adds_missing_ones(
        self, kept: Casfs, target: Path, changed: Path
    ) -> None:
        self.restore(kept, target, "--overwrite", "never")
        assert (changed / "readme.txt").read_bytes() == b"changed by hand\n"
        assert (changed / "pictures/photo.raw").stat().st_mode & 0o777 == 0o600
        assert (changed / "documents/letters/to-anna.txt").read_bytes() == b"Dear Anna\n"
        assert (changed / "extra").read_bytes() == b"not from the snapshot"

    def test_restore_replaces_changed_files_by_default(
        self, kept: Casfs, target: Path, changed: Path
    ) -> None:
        self.restore(kept, target)
        assert (changed / "readme.txt").read_bytes() == b"read me\n"
        assert (changed / "extra").read_bytes() == b"not from the snapshot"

    @pytest.mark.parametrize("kind", ["directory", "full directory", "symlink", "fifo"])
    def test_restore_replaces_an_entry_of_another_kind(
        self, kept: Casfs, source: Path, target: Path, kind: str
    ) -> None:
        tree = target / "source"
        tree.mkdir(parents=True)
        for name in ("readme.txt", "link"):
            if kind == "symlink":
                (tree / name).symlink_to("nowhere")
            elif kind == "fifo":
                os.mkfifo(tree / name)
            else:
                (tree / name).mkdir()
                if kind == "full directory":
                    (tree / name / "inside").write_bytes(b"would be lost")
        if kind == "full directory":
            result = kept.run("restore", "latest", "--target", target, expect=None)
            # It may refuse to; but it must not say that all is well and be wrong.
            if result.exit != 0:
                assert (tree / "readme.txt" / "inside").read_bytes() == b"would be lost"
                assert "readme.txt" in result.complaint
                assert (tree / "documents/report.txt").exists(), "the others are restored"
                return
        else:
            kept.run("restore", "latest", "--target", target)
        assert tree_differences(source, tree) == []

    def test_restore_replaces_a_file_by_a_directory(
        self, kept: Casfs, source: Path, target: Path
    ) -> None:
        (target / "source").mkdir(parents=True)
        (target / "source/documents").write_bytes(b"a file in the way")
        kept.run("restore", "latest", "--target", target)
        assert tree_differences(source, target / "source") == []


class TestDelete:
    def test_delete_removes_what_the_snapshot_does_not_hold(
        self, kept: Casfs, source: Path, target: Path
    ) -> None:
        kept.run("restore", "latest", "--target", target)
        tree = target / "source"
        (tree / "extra").write_bytes(b"x")
        (tree / "documents/extra directory").mkdir()
        (tree / "documents/extra directory/inside").write_bytes(b"x")
        os.mkfifo(tree / "pictures/extra fifo")
        (tree / "extra link").symlink_to(source)
        kept.run("restore", "latest", "--target", target, "--delete")
        assert tree_differences(source, tree) == []
        assert (source / "readme.txt").exists()

    def test_restore_deletes_nothing_by_default(self, kept: Casfs, target: Path) -> None:
        (target / "source").mkdir(parents=True)
        (target / "source/extra").write_bytes(b"x")
        kept.run("restore", "latest", "--target", target)
        assert (target / "source/extra").read_bytes() == b"x"

    def test_delete_in_a_dry_run_removes_nothing(self, kept: Casfs, target: Path) -> None:
        (target / "source").mkdir(parents=True)
        (target / "source/extra").write_bytes(b"x")
        kept.run("restore", "latest", "--target", target, "--delete", "--dry-run")
        assert names(target) == {"source/extra"}

    def test_delete_keeps_what_was_excluded(self, kept: Casfs, target: Path) -> None:
        """Excluded means: not touched, neither written nor removed."""
        kept.run("restore", "latest", "--target", target)
        (target / "source/documents/notes.txt").write_bytes(b"mine")
        kept.run(
            *("restore", "latest", "--target", target),
            *("--exclude", "documents", "--delete"),
        )
        assert (target / "source/documents/notes.txt").read_bytes() == b"mine"
        assert (target / "source/documents/report.txt").exists()

    def test_delete_keeps_what_was_not_included(self, kept: Casfs, target: Path) -> None:
        kept.run("restore", "latest", "--target", target)
        (target / "source/documents/notes.txt").write_bytes(b"mine")
        (target / "source/pictures/extra").write_bytes(b"to be removed")
        kept.run(
            *("restore", "latest", "--target", target),
            *("--include", "pictures", "--delete"),
        )
        assert (target / "source/documents/notes.txt").read_bytes() == b"mine"
        assert (target / "source/readme.txt").exists()
        assert not (target / "source/pictures/extra").exists()


class TestDryRunAndVerify:
    def test_a_restore_dry_run_writes_nothing_and_reports_what_it_would(
        self, kept: Casfs, target: Path
    ) -> None:
        printed = kept.json("restore", "latest", "--target", target, "--dry-run").one("summary")
        assert (printed["files"], printed["bytes"]) == (4, 8 + 9000 + 10 + MIB)
        assert not target.exists()
        people = kept.run("restore", "latest", "--target", target, "--dry-run")
        assert "dry" in people.text.lower() or "would" in people.text.lower(), people

    def test_verify_reads_back_what_was_written(
        self, kept: Casfs, source: Path, target: Path
    ) -> None:
        kept.run("restore", "latest", "--target", target, "--verify")
        assert tree_differences(source, target / "source") == []

    def test_nothing_but_the_restored_names_is_left_in_the_target(
        self, kept: Casfs, source: Path, target: Path
    ) -> None:
        kept.run("restore", "latest", "--target", target)
        assert names(target / "source") == ALL
        assert set(os.listdir(target)) == {"source"}


def test_the_root_of_the_file_system_gives_the_target_its_metadata(
    repository: Casfs, target: Path
) -> None:
    """As `.` does; the root above any other source has no metadata of its own."""
    repository.run("backup", "/", "--exclude", "/*")
    repository.run("restore", "latest", "--target", target)
    assert target.stat().st_mtime_ns == Path("/").stat().st_mtime_ns


WITHOUT_CAPABILITIES = (
    *("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"),
)


class TestWithoutPrivileges:
    def test_restore_overwrites_a_tree_that_its_owner_may_not_write_into(
        self, kept: Casfs, source: Path, target: Path, superuser: None
    ) -> None:
        """A restore leaves directories write-protected as they were; the next one gets into them."""
        (source / "documents/report.txt").chmod(0)
        (source / "documents").chmod(0o555)
        (source / "pictures").chmod(0o300)
        source.chmod(0o500)
        kept.backup(".", cwd=source)
        for how in (
            (),
            (),
            ("--verify",),
            ("--overwrite", "if-changed"),
            ("--delete",),
        ):
            if "--delete" in how:
                (target / "documents/more").touch()
            kept.run(*("restore", "latest", "--target", target, *how), prefix=WITHOUT_CAPABILITIES)
            assert tree_differences(source, target) == [], how
        kept.run(
            *("restore", "latest", "--target", target, "--include", "documents/letters/*"),
            prefix=WITHOUT_CAPABILITIES,
        )
        assert stat.S_IMODE((target / "documents").stat().st_mode) == 0o555
        assert stat.S_IMODE(target.stat().st_mode) == 0o500

    def test_delete_removes_a_tree_that_its_owner_may_not_write_into(
        self, kept: Casfs, source: Path, target: Path, superuser: None
    ) -> None:
        deep = target / "extra/more/below"
        deep.mkdir(parents=True)
        (deep / "file").touch()
        (target / "outside").mkdir()
        (deep / "link").symlink_to(target / "outside")
        for closed, mode in ((deep, 0), (deep.parent, 0o555), (deep.parent.parent, 0o311)):
            closed.chmod(mode)
        (target / "outside").chmod(0o555)
        reported = kept.json(
            *("restore", f"latest:{source.name}", "--target", target, "--delete"),
            *("--exclude", "outside"),
            prefix=WITHOUT_CAPABILITIES,
        )
        assert reported.one("summary")["deleted"] == 5  # extra, more, below, file, link
        assert not (target / "extra").exists()
        assert stat.S_IMODE((target / "outside").stat().st_mode) == 0o555

    def test_restore_gives_no_setuid_bit_to_a_file_of_another_owner(
        self, kept: Casfs, source: Path, target: Path, superuser: None
    ) -> None:
        for name, owner, group in (("both", 12345, 54321), ("group", 12345, 0), ("own", 0, 0)):
            (source / name).touch()
            os.chown(source / name, owner, group)
            (source / name).chmod(0o6755)
        kept.backup("source", cwd=source.parent)
        kept.run("restore", "latest", "--target", target, prefix=WITHOUT_CAPABILITIES)
        modes = {
            name: stat.S_IMODE((target / "source" / name).stat().st_mode)
            for name in ("both", "group", "own")
        }
        assert modes == {"both": 0o755, "group": 0o2755, "own": 0o6755}
        kept.run("restore", "latest", "--target", target)
        assert stat.S_IMODE((target / "source/both").stat().st_mode) == 0o6755

    def test_restore_sets_the_attributes_of_files_that_their_owner_may_not_write(
        self, kept: Casfs, source: Path, target: Path, superuser: None
    ) -> None:
        """Their owner cannot set any once the mode is set."""
        for name, mode in (("report.txt", 0o444), ("closed.txt", 0)):
            path = source / "documents" / name
            path.touch()
            os.setxattr(path, "user.open", b"1")
            path.chmod(mode)
        kept.backup(".", cwd=source)
        kept.run("restore", "latest", "--target", target, prefix=WITHOUT_CAPABILITIES)
        assert tree_differences(source, target) == []

    def test_an_unprivileged_user_restores_everything_but_owners_and_trusted_attributes(
        self, kept: Casfs, source: Path, target: Path, superuser: None
    ) -> None:
        """Owners and trusted attributes are out of reach: said or passed over, never the end.

        The user is root without any capability, who owns what is here and can do nothing more.
        """
        os.chown(source / "readme.txt", 12345, 54321)
        os.setxattr(source / "readme.txt", "trusted.secret", b"1")
        os.setxattr(source / "readme.txt", "user.open", b"1")
        os.mknod(source / "device", 0o20600, os.makedev(1, 3))
        kept.backup("source", cwd=source.parent)
        result = kept.run(
            *("restore", "latest", "--target", target),
            prefix=WITHOUT_CAPABILITIES,
            expect=None,
        )
        assert (target / "source/documents/report.txt").exists(), result
        assert (target / "source/readme.txt").read_bytes() == b"read me\n"
        assert os.getxattr(target / "source/readme.txt", "user.open") == b"1"
        assert result.exit in (0, 1, 3), result
        assert "device" in result.complaint, "what could not be made is named"
        assert not (target / "source/device").exists()
