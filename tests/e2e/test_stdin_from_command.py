"""A backup of a command's output: published only where the command succeeds."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.cli import Casfs, finish, interrupt


def backup_output(casfs: Casfs, *command: str, expect: int = 0) -> None:
    casfs.run(
        "backup", "--stdin-from-command", "--stdin-name", "out", "--", *command, expect=expect
    )


def test_the_output_of_a_command_is_backed_up(repository: Casfs) -> None:
    backup_output(repository, "sh", "-c", "head -c 5000000 /dev/zero; echo end")
    assert repository.run("dump", "latest:out").out == bytes(5_000_000) + b"end\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("sh", "-c", "echo begun; exit 3"), ["exit code 3"]),
        (("sh", "-c", "echo begun; kill -9 $$"), ["SIGKILL"]),
        (("no-such-command-here",), ["cannot be run"]),
    ],
)
def test_nothing_is_published_where_the_command_fails(
    repository: Casfs, command: tuple[str, ...], words: list[str]
) -> None:
    repository.refuses(
        "backup", "--stdin-from-command", "--", *command, mentions=[*words, "nothing was published"]
    )
    assert repository.json("snapshots").objects == []


def test_an_interrupted_backup_ends_its_command(repository: Casfs, tmp_path: Path) -> None:
    started = tmp_path / "started"
    script = f"echo $$ >{started}.new; mv {started}.new {started}; exec sleep 1000"
    process = repository.start("backup", "--stdin-from-command", "--", "sh", "-c", script)
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.01)
    pid = int(started.read_text())
    interrupt(process)
    assert finish(process).exit == 130
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    assert repository.json("snapshots").objects == []


def test_a_command_is_needed_and_other_sources_are_refused(repository: Casfs) -> None:
    repository.refuses("backup", "--stdin-from-command", expect=2)
    repository.refuses("backup", "--stdin-from-command", "--stdin", "--", "true", expect=2)
