"""How the command is called: usage errors, help, and where its output goes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from casfs.format.pack import PACK_PREFIXES
from tests.support.cli import Casfs, program


class TestUsage:
    @pytest.mark.parametrize(
        "arguments",
        [
            (),
            ("no-such-verb",),
            ("--no-such-option",),
            ("backup",),
            ("backup", "--no-such-option", "."),
            ("backup", "--time", "the day before yesterday", "."),
            ("backup", "--time", "@nan", "."),
            ("backup", "--time", "@1e999999999", "."),
            ("backup", "--time", "@-9300000000", "."),
            ("backup", "--time", "1677-01-01", "."),
            ("backup", "--time", "9999-12-31T23:59:59+14:00", "."),
            ("backup", "--tag", "", "."),
            ("backup", "--tag", "a,,b", "."),
            ("backup", "--host", "", "."),
            ("tag", "latest", "--add", ""),
            ("backup", "--compression", "999", "."),
            ("backup", "--compression", "much", "."),
            ("backup", "--spool", "tape", "."),
            ("backup", "--exclude-larger-than", "enormous", "."),
            ("backup", "--parent", "latest", "--no-parent", "."),
            ("backup", "--stdin", "--stdin-name", "name", "."),
            ("backup", "--stdin", "--stdin-name", "../outside"),
            ("backup", "--attempts", "0", "."),
            ("ls",),
            ("find",),
            ("diff", "latest"),
            ("dump",),
            ("dump", "latest:/", "surplus"),
            ("mount",),
            ("mount", "--owner", "me", "latest", "."),
            ("mount", "--cache-size", "lots", "latest", "."),
            ("umount",),
            ("restore", "latest"),
            ("restore", "latest", "--target", ""),
            ("restore", "--target", "target"),
            ("restore", "latest", "--target", "target", "--overwrite", "sometimes"),
            ("check", "--read-data-subset", "200%"),
            ("check", "--read-data-subset", "some"),
            ("tag",),
            ("completion",),
            ("completion", "tcl"),
            ("run",),
            ("run", "home", "surplus"),
            ("config", "hide"),
            ("schedule", "install"),
            ("schedule", "install", "home", "--scheduler", "at"),
        ],
        ids=lambda arguments: " ".join(arguments) or "nothing",
    )
    def test_a_usage_error_exits_with_2_and_reports_what_is_wrong(
        self, repository: Casfs, arguments: tuple[str, ...]
    ) -> None:
        (repository.home / "file").touch()
        repository.backup(".")
        result = repository.run(*arguments, expect=2)
        assert result.complaints, result
        assert len(repository.json("snapshots").objects) == 1
        if len(arguments) > 1:
            reported = repository.json(*arguments, expect=2)
            assert reported.one("error")["exit"] == 2
            assert reported.one("error")["message"]

    def test_help_shows_the_usage_of_every_command(self, casfs: Casfs) -> None:
        shown = casfs.run("--help").text
        for verb in (
            *("init", "backup", "snapshots", "ls", "find", "diff", "dump", "mount", "umount"),
            *("restore", "check", "stats", "tag", "version", "completion", "run", "config"),
            "schedule",
        ):
            assert verb in shown
            assert "--help" in casfs.run(verb, "--help").text
            assert "--json" in casfs.run(verb, "--help").text

    def test_an_option_without_its_value_is_a_usage_error(self, repository: Casfs) -> None:
        assert repository.run("backup", "--tag", expect=2).complaints

    def test_the_module_runs_like_the_command(self, repository: Casfs) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "casfs", "snapshots", "--json"],
            env=repository.environment(),
            capture_output=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, b"")


def test_a_closed_stdout_causes_no_traceback(repository: Casfs, source: Path) -> None:
    """As in `casfs ls latest | head -1`."""
    for number in range(3000):
        (source / f"file with a long name to fill the pipe {number}").touch()
    repository.backup(source)
    process = repository.start("ls", "latest")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    complaint = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 141
    assert complaint == b""


def test_a_full_stdout_is_an_error(repository: Casfs, source: Path) -> None:
    repository.backup(source)
    with open("/dev/full", "wb") as full:
        process = subprocess.run(
            [*program(), "ls", "latest"],
            env=repository.environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert process.returncode == 1
    assert b"Traceback" not in process.stderr
    assert b"No space left" in process.stderr


def test_a_repository_copied_without_its_empty_folders_works(
    repository: Casfs, source: Path, tmp_path: Path
) -> None:
    assert repository.repository is not None
    for name in ("tmp", "locks", "condemned", "snapshots", *PACK_PREFIXES):
        (repository.repository / name).rmdir()
    repository.backup(source)
    (source / "more").write_bytes(b"more")
    repository.backup(source)
    repository.run("forget", "--keep-last", "1", "--prune")
    assert repository.json("check", "--read-data").one("summary")["ok"] is True
