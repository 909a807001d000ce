"""Standard streams that are closed, full, or without a reader."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.support.cli import Casfs, program


def run_closed(casfs: Casfs, closing: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command from a shell that has closed some of its streams."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {closing}', "sh", *program(), *arguments],
        env=casfs.environment(),
        cwd=casfs.home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=180,
    )


@pytest.mark.parametrize("closing", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_whose_streams_are_closed_does_its_work(
    repository: Casfs, source: Path, closing: str
) -> None:
    """Whatever starts it so, the files that it opens are not taken for the streams."""
    for arguments in (
        ("backup", str(source)),
        ("snapshots",),
        ("dump", f"latest:{source}/readme.txt"),
        ("restore", "latest", "--target", str(repository.home / "target")),
        ("check", "--read-data"),
        ("prune",),
    ):
        done = run_closed(repository, closing, *arguments)
        assert done.returncode == 0, (arguments, done)
        assert b"Traceback" not in done.stderr
    assert repository.json("snapshots").one("snapshot")["files"] == 4
    assert repository.json("check", "--storage").one("summary")["ok"] is True
    wanted = (source / "readme.txt").read_bytes()
    assert repository.run("dump", f"latest:{source}/readme.txt").out == wanted


@pytest.mark.parametrize("option", ["--stdin", "--files-from=-"])
def test_a_closed_stdin_cannot_be_backed_up(repository: Casfs, option: str) -> None:
    done = run_closed(repository, "<&-", "backup", option)
    assert done.returncode == 2, done
    assert b"standard input is closed" in done.stderr
    assert repository.json("snapshots").of_type("snapshot") == []


BUFFERING = pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])


def run_into(
    casfs: Casfs, out: IO[bytes] | int, unbuffered: str, *arguments: str
) -> subprocess.CompletedProcess[bytes]:
    """Run the command with another standard output."""
    return subprocess.run(
        [*program(), *arguments],
        env=casfs.environment({"PYTHONUNBUFFERED": unbuffered}),
        cwd=casfs.home,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.PIPE,
        check=False,
        timeout=180,
    )


@pytest.fixture
def deserted_pipe() -> Iterator[int]:
    """The writing end of a pipe whose reader has gone away."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@BUFFERING
@pytest.mark.parametrize("missing", [False, True])
def test_the_exit_code_of_a_backup_on_a_full_disk_says_what_was_published(
    repository: Casfs, source: Path, missing: bool, unbuffered: str
) -> None:
    """1 would mean that nothing was published."""
    sources = [str(source), "no-such-source"] if missing else [str(source)]
    with open("/dev/full", "wb") as full:
        done = run_into(repository, full, unbuffered, "backup", *sources)
    assert done.returncode == (3 if missing else 0), done
    assert b"cannot be printed: No space left" in done.stderr
    assert len(repository.json("snapshots").of_type("snapshot")) == 1


@BUFFERING
def test_a_backup_without_a_reader_publishes_its_snapshot_and_exits_with_141(
    repository: Casfs, source: Path, deserted_pipe: int, unbuffered: str
) -> None:
    done = run_into(repository, deserted_pipe, unbuffered, "backup", str(source))
    assert (done.returncode, done.stderr) == (141, b"")
    assert len(repository.json("snapshots").of_type("snapshot")) == 1
    done = run_into(repository, deserted_pipe, unbuffered, "backup", str(source), "no-such-source")
    assert done.returncode == 3, done
    assert len(repository.json("snapshots").of_type("snapshot")) == 2


@BUFFERING
def test_forget_and_prune_without_a_reader_finish_what_they_began(
    repository: Casfs, source: Path, deserted_pipe: int, unbuffered: str
) -> None:
    for number in range(4):
        (source / "new").write_bytes(os.urandom(300_000))
        repository.backup(source, "--time", f"@{number}")
    stored = repository.json("stats").of_type("stats")
    arguments = ("forget", "--keep-last", "1", "--prune")
    done = run_into(repository, deserted_pipe, unbuffered, *arguments)
    assert (done.returncode, done.stderr) == (141, b"")
    assert len(repository.json("snapshots").of_type("snapshot")) == 1
    left = repository.json("prune", "--dry-run").one("prune")
    assert left["removed_packs"] == left["marked_packs"] == 0
    if repository.repository is not None:
        assert repository.json("stats").of_type("stats") != stored
    else:  # where hosts write over a network, a prune marks what a later one removes
        assert left["waiting_packs"] > 0


@BUFFERING
@pytest.mark.parametrize("as_json", [False, True])
def test_every_verb_without_a_reader_exits_with_141_and_prints_no_message(
    repository: Casfs, source: Path, deserted_pipe: int, as_json: bool, unbuffered: str
) -> None:
    repository.backup(source)
    for number, arguments in enumerate(
        (
            ("snapshots",),
            ("ls", "latest"),
            ("find", "readme.txt"),
            ("stats",),
            ("log", f"latest:{source}/readme.txt"),
            ("version",),
            ("check",),
            ("prune",),
            ("restore", "latest", "--target", str(repository.home / "target")),
            ("tag", "latest", "--add", "a"),
            ("init", str(repository.home / f"other {as_json}")),
            ("--help",),
            ("backup", "--help"),
        )
    ):
        words = [*arguments, "--json"] if as_json and "--help" not in arguments else arguments
        done = run_into(repository, deserted_pipe, unbuffered, *words)
        assert (done.returncode, done.stderr) == (141, b""), (number, done)
    assert repository.json("snapshots").one("snapshot")["tags"] == ["a"]


@BUFFERING
def test_every_verb_reports_a_full_disk_behind_its_output(
    repository: Casfs, source: Path, unbuffered: str
) -> None:
    repository.backup(source)
    with open("/dev/full", "wb") as full:
        for arguments in (
            ("snapshots",),
            ("ls", "latest"),
            ("stats",),
            ("version",),
            ("check",),
            ("prune",),
            ("dump", f"latest:{source}/readme.txt"),
            ("snapshots", "--json"),
            ("--help",),
        ):
            done = run_into(repository, full, unbuffered, *arguments)
            assert done.returncode == 1, done
            assert done.stderr.decode().splitlines() == [
                "casfs: the result cannot be printed: No space left on device"
            ]


@BUFFERING
def test_a_dump_into_a_pipe_that_does_not_block_is_complete(
    repository: Casfs, source: Path, unbuffered: str
) -> None:
    """Another process may make a shared pipe non-blocking: a write then takes a part, or nothing."""
    content = os.urandom(3_000_000)
    (source / "large").write_bytes(content)
    repository.backup(source)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    process = subprocess.Popen(
        [*program(), "dump", f"latest:{source}/large"],
        env=repository.environment({"PYTHONUNBUFFERED": unbuffered}),
        stdout=writing,
        stderr=subprocess.PIPE,
    )
    os.close(writing)
    with open(reading, "rb") as pipe:
        dumped = pipe.read()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert dumped == content


@BUFFERING
def test_a_full_disk_behind_standard_error_stops_no_command(
    repository: Casfs, source: Path, unbuffered: str
) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*program(), "backup", "--json", str(source), "no-such-source"],
            env=repository.environment({"PYTHONUNBUFFERED": unbuffered}),
            cwd=repository.home,
            stdout=subprocess.PIPE,
            stderr=full,
            check=False,
        )
    assert done.returncode == 3, done
    assert b'"type": "snapshot"' in done.stdout


def test_a_target_that_is_a_file_is_named_as_it_was_typed(repository: Casfs, source: Path) -> None:
    repository.backup(source)
    target = source / "readme.txt"
    reported = repository.refuses("restore", "latest", "--target", target)
    assert reported == f"casfs: --target {target} is not a folder; name a folder"


def test_a_closed_stdin_is_not_asked_for_a_passphrase(casfs: Casfs, tmp_path: Path) -> None:
    (tmp_path / "passphrase").write_text("open sesame")
    locked = casfs.at(tmp_path / "locked")
    locked.run("init", "--passphrase", "--passphrase-file", tmp_path / "passphrase")
    done = run_closed(locked, "<&-", "ls", "latest")
    assert done.returncode == 1, done
    assert b"is encrypted and no key was given" in done.stderr
    assert b"Traceback" not in done.stderr
