"""Standard streams that are closed, full, or without a reader."""

from __future__ import annotations

import subprocess
from pathlib import Path

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
    assert repository.json("snapshots").objects == []


@pytest.mark.parametrize("wanted", [0, 3])
def test_a_backup_that_cannot_print_its_result_exits_like_one_that_can(
    repository: Casfs, source: Path, wanted: int
) -> None:
    """1 would mean that nothing was published."""
    sources = [str(source)] if wanted == 0 else [str(source), "no-such-source"]
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    assert reader.stdin is not None
    reader.wait(60)
    with open("/dev/full", "wb") as full:
        for number, out in enumerate((full, reader.stdin), 1):
            done = subprocess.run(
                [*program(), "backup", *sources],
                env=repository.environment(),
                cwd=repository.home,
                stdout=out,
                stderr=subprocess.PIPE,
                check=False,
            )
            assert done.returncode == wanted, done
            assert (b"cannot be printed: No space left" in done.stderr) == (out is full)
            assert len(repository.json("snapshots").objects) == number
    reader.stdin.close()


def test_a_target_that_is_a_file_is_named_as_it_was_typed(repository: Casfs, source: Path) -> None:
    repository.backup(source)
    target = source / "readme.txt"
    reported = repository.refuses("restore", "latest", "--target", target)
    assert reported == f"casfs: {target}: Not a directory"


def test_a_closed_stdin_is_not_asked_for_a_passphrase(casfs: Casfs, tmp_path: Path) -> None:
    (tmp_path / "passphrase").write_text("open sesame")
    locked = casfs.at(tmp_path / "locked")
    locked.run("init", "--passphrase", "--passphrase-file", tmp_path / "passphrase")
    done = run_closed(locked, "<&-", "ls", "latest")
    assert done.returncode == 1, done
    assert b"is encrypted and no key was given" in done.stderr
    assert b"Traceback" not in done.stderr
