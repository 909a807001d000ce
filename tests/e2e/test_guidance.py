"""Messages that name the next step: suggestions, hints, help by command, and numbers with their nouns."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
from pathlib import Path

import pytest

from tests.support.cli import Casfs, program
from tests.support.stored_objects import StoredObjects


class TestUnknownCommand:
    @pytest.mark.parametrize(
        ("typed", "meant"),
        [
            ("bakcup", "backup"),
            ("snapshot", "snapshots"),
            ("unmount", "umount"),
            ("Restore", "restore"),
            ("extract", "restore"),
            ("verify", "check"),
        ],
    )
    def test_an_unknown_command_is_answered_with_the_command_that_was_meant(
        self, casfs: Casfs, typed: str, meant: str
    ) -> None:
        sentence = casfs.refuses(typed, expect=2, mentions=["did you mean"])
        assert meant in sentence.partition("did you mean")[2]

    def test_an_unknown_command_without_a_likeness_gets_no_suggestion(self, casfs: Casfs) -> None:
        assert "did you mean" not in casfs.refuses("qqqqqq", expect=2)

    @pytest.mark.parametrize("line", ["snapshots -r dsk", "init -r dsk", "mirror -r disk dsk"])
    def test_a_mistyped_repository_is_answered_with_the_one_of_the_configuration(
        self, casfs: Casfs, tmp_path: Path, line: str
    ) -> None:
        casfs.run("init")
        config = tmp_path / "config.toml"
        config.write_text(f'[repositories.disk]\nurl = "{casfs.where}"\n')
        config.chmod(0o600)
        sentence = casfs.at(None).refuses(*line.split(), "--config", config, cwd=tmp_path)
        assert "did you mean disk?" in sentence and "./dsk" in sentence
        assert not (tmp_path / "dsk").exists()

    def test_an_unknown_subcommand_is_answered_with_the_one_that_was_meant(
        self, casfs: Casfs
    ) -> None:
        sentence = casfs.run("key", "lst", expect=2).complaint
        assert "did you mean list?" in sentence
        assert "(casfs key --help)" in sentence

    def test_mount_8_without_its_helper_is_answered_with_where_the_helper_belongs(
        self, casfs: Casfs
    ) -> None:
        sentence = casfs.refuses("/srv/backup", "/mnt", "-o", "rw", expect=2)
        assert "mount.fuse.casfs" in sentence and "/sbin" in sentence


class TestHelp:
    def test_help_prints_what_the_option_prints(self, casfs: Casfs) -> None:
        assert casfs.run("help").out == casfs.run("--help").out
        assert casfs.run("help", "backup").out == casfs.run("backup", "--help").out
        assert casfs.run("help", "key", "add").out == casfs.run("key", "add", "--help").out
        assert casfs.json("help", "ls").one("help")["command"] == "casfs ls"

    def test_help_of_an_unknown_command_suggests_one(self, casfs: Casfs) -> None:
        assert "did you mean backup?" in casfs.refuses("help", "bakup", expect=2)
        assert "did you mean list?" in casfs.refuses("help", "key", "lst", expect=2)
        casfs.refuses("help", "ls", "latest", expect=2)

    def test_the_hint_of_a_usage_error_names_the_whole_command(self, casfs: Casfs) -> None:
        assert "(casfs key add --help)" in casfs.refuses("key", "add", "--nonsense", expect=2)


class TestHints:
    def test_a_path_without_a_snapshot_is_answered_with_snap_and_path(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        repository.backup(source)
        name = str(source / "readme.txt")
        told = repository.refuses("restore", name, "--target", tmp_path / "target")
        assert f"did you mean latest:{name}?" in told
        told = repository.refuses("ls", f"latest{source}")
        assert f"did you mean latest:{source}?" in told

    def test_a_target_that_is_a_file_is_refused_by_name(
        self, repository: Casfs, source: Path
    ) -> None:
        repository.backup(source)
        target = source / "readme.txt"
        repository.refuses("restore", "latest", "--target", target, mentions=["not a folder"])
        assert target.read_bytes() == b"read me\n"

    def test_a_repository_whose_snapshots_were_forgotten_is_not_called_new(
        self, repository: Casfs, source: Path
    ) -> None:
        repository.backup(source)
        repository.run("forget", "latest", "--unsafe-allow-remove-all")
        assert "yet" not in repository.refuses("ls", "latest", mentions=["no snapshots"])
        assert "yet" not in repository.run("snapshots").complaint

    def test_mount_warns_of_entries_that_it_hides(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        repository.backup(source)
        mountpoint = tmp_path / "mountpoint"
        mountpoint.mkdir()
        assert repository.run("mount", mountpoint).complaint == ""
        repository.run("umount", mountpoint)
        (mountpoint / "hidden").touch()
        told = repository.run("mount", mountpoint).complaint
        repository.run("umount", mountpoint)
        assert "not empty" in told and "casfs umount" in told
        assert (mountpoint / "hidden").exists()


class TestCheck:
    def test_check_says_what_it_did_not_read(self, repository: Casfs, source: Path) -> None:
        repository.backup(source)
        assert "casfs check --read-data" in repository.run("check").text
        assert "not read" not in repository.run("check", "--read-data").text
        assert "not checked" in repository.run("check", "--storage").text

    def test_check_of_old_packs_alone_reads_data(self, repository: Casfs, source: Path) -> None:
        repository.backup(source)
        assert repository.json("check", "--older-than", "0s").one("summary")["packs_read"] > 0
        assert repository.json("check", "--older-than", "30d").one("summary")["packs_read"] >= 0

    def test_check_names_the_next_step_where_it_finds_damage(
        self, repository: Casfs, source: Path
    ) -> None:
        repository.backup(source)
        objects = StoredObjects(repository)
        pack = objects.largest_pack()
        objects.flip(pack.name, pack.size // 3)
        told = repository.run("check", "--read-data", expect=5).text
        assert "blob blob" not in told and "pack pack" not in told
        assert "casfs backup" in told and "casfs repair" in told


def test_a_number_stands_with_the_noun_that_fits_it(repository: Casfs, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "file").write_text("one")
    told = repository.run("backup", folder.name, cwd=tmp_path).text
    assert "1 file (1 new, 0 modified, 0 unchanged) in 1 directory," in told
    told = repository.run("restore", "latest", "--target", tmp_path / "target").text
    assert "1 file, 1 directory, 0 others" in told
    assert "checked 1 snapshot," in repository.run("check").text
    (folder / "second").write_text("two")
    assert (
        "2 files (1 new, 0 modified, 1 unchanged) in 1 directory,"
        in repository.run("backup", folder.name, cwd=tmp_path).text
    )


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_a_table_fits_the_terminal(repository: Casfs, tmp_path: Path, columns: int) -> None:
    deep = tmp_path / "a-folder-with-a-long-name" / "and-another-one-below-it" / "deep"
    deep.mkdir(parents=True)
    repository.backup(deep, "--tag", "monthly,offsite,verified", "--host", "a-host-with-a-name")
    printed = run_on_terminal(repository, columns, "snapshots")
    assert max(map(len, printed.splitlines())) <= columns
    head = printed.splitlines()[0]
    begin, end = head.index("paths"), head.index("tags")
    assert "".join(line[begin:end].strip() for line in printed.splitlines()[1:]) == str(deep)
    piped = repository.run("snapshots").text
    assert len(piped.splitlines()) == 2 and str(deep) in piped


def test_the_table_of_versions_fits_80_columns(repository: Casfs, source: Path) -> None:
    repository.backup(source)
    (source / "readme.txt").write_bytes(b"more to read\n")
    repository.backup(source)
    printed = run_on_terminal(repository, 80, "log", f"latest:{source}/readme.txt")
    assert max(map(len, printed.splitlines())) <= 80
    assert printed.splitlines()[0].split()[:4] == ["snapshot", "first", "last", "count"]


def run_on_terminal(casfs: Casfs, columns: int, *arguments: str) -> str:
    """Return what a command prints on a terminal of so many columns."""
    terminal, command_side = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = casfs.environment()
    del environment["COLUMNS"]
    process = subprocess.Popen(
        [*program(), *arguments], stdin=command_side, stdout=command_side, env=environment
    )
    os.close(command_side)
    printed = b""
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # the other end of the terminal is closed
            break
        if not piece:
            break
        printed += piece
    os.close(terminal)
    assert process.wait(60) == 0, printed
    return printed.decode().replace("\r\n", "\n")
