"""Progress on a real terminal, as JSON lines, and nowhere else."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from tests.support.cli import Casfs, program
from tests.support.stored_objects import StoredObjects
from tests.support.waiting import wait_until

MIB = 1 << 20
LINE = re.compile(r"backup: .*?(\d+\.\d) MiB")


class Terminal:
    """A terminal of a certain width, and everything that was written to it."""

    def __init__(self, columns: int) -> None:
        self.screen = bytearray()
        self._reading, self.fd = pty.openpty()
        size = struct.pack("HHHH", 24, columns, 0, 0)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, size)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def lines(self) -> list[str]:
        """Return what was written at the beginning of a line, one after the other."""
        return re.split(r"[\r\n]+", self.screen.decode())

    def close(self) -> None:
        os.close(self.fd)
        self._reader.join()
        os.close(self._reading)

    def _read(self) -> None:
        while True:
            try:
                self.screen += os.read(self._reading, 65536)
            except OSError:  # the last process has closed the terminal
                return


@contextmanager
def terminal(columns: int) -> Iterator[Terminal]:
    opened = Terminal(columns)
    try:
        yield opened
    finally:
        opened.close()


def start(
    casfs: Casfs, *arguments: str, stdin: int | IO[bytes] | None = None, stderr: int
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*program(), *arguments],
        env=casfs.environment(),
        cwd=casfs.home,
        stdin=stdin if stdin is not None else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )


def shown_mib(screen: Terminal) -> list[float]:
    return [float(found[1]) for line in screen.lines() if (found := LINE.match(line))]


@pytest.mark.parametrize("columns", [80, 120])
def test_progress_moves_inside_a_large_file_and_uses_the_width_of_the_terminal(
    repository: Casfs, columns: int
) -> None:
    """The file is a pipe that the test fills, so that it never ends before the progress was seen."""
    with terminal(columns) as screen:
        process = start(
            repository,
            *("backup", "--stdin", "--stdin-name", "dump"),
            stdin=subprocess.PIPE,
            stderr=screen.fd,
        )
        assert process.stdin is not None and process.stdout is not None
        for _ in range(2):
            before = max(shown_mib(screen), default=0.0)
            process.stdin.write(os.urandom(12 * MIB))
            process.stdin.flush()
            wait_until(
                lambda before=before: max(shown_mib(screen), default=0.0) > before,  # type: ignore[misc]
                "the progress moves",
            )
        process.stdin.close()
        out = process.stdout.read()
        process.stdout.close()
        assert process.wait(60) == 0
        assert b"1 file (1 new, 0 modified, 0 unchanged)" in out
    assert max(map(len, screen.lines())) < columns
    # The line is cleared at the end.
    assert re.search(rb"\r +\r$", bytes(screen.screen))


def test_problems_are_printed_on_lines_of_their_own_beside_the_progress(
    repository: Casfs, source: Path
) -> None:
    with terminal(100) as screen:
        process = start(repository, "backup", str(source), "no-such-source", stderr=screen.fd)
        process.communicate(timeout=60)
        assert process.returncode == 3
    complaints = [line for line in screen.lines() if line.startswith("casfs: ")]
    assert complaints == ["casfs: no-such-source: this source does not exist"]


@pytest.mark.parametrize(
    "option", ["--quiet", "--progress=never"], ids=["quiet", "without progress"]
)
def test_no_progress_is_shown_where_none_is_wanted(repository: Casfs, option: str) -> None:
    with terminal(100) as screen:
        process = start(
            repository, "backup", option, "--stdin", stdin=subprocess.PIPE, stderr=screen.fd
        )
        out, _ = process.communicate(os.urandom(24 * MIB), timeout=60)
        assert process.returncode == 0
    assert not screen.screen
    assert (out == b"") == (option == "--quiet")


def test_nothing_is_shown_without_a_terminal(repository: Casfs, source: Path) -> None:
    for arguments in (
        ("backup", source),
        ("check", "--read-data"),
        ("prune",),
        ("restore", "latest", "--target", repository.home / "target"),
    ):
        result = repository.run(*arguments)
        assert result.err == b""
        assert b"\r" not in result.out


def test_progress_is_printed_as_json_lines_on_request(repository: Casfs) -> None:
    process = subprocess.Popen(
        [*program(), "backup", "--json", "--progress", "json", "--stdin"],
        env=repository.environment(),
        cwd=repository.home,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdin.write(os.urandom(12 * MIB))
    process.stdin.flush()
    line = json.loads(process.stdout.readline())
    while not line["done_bytes"]:
        assert line["type"] == "progress"
        line = json.loads(process.stdout.readline())
    assert line["verb"] == "backup"
    assert line["unit"] == "files"
    assert (line["stage"], line["total_bytes"]) == (None, None)
    process.stdin.close()
    *_, last = (json.loads(line) for line in process.stdout)
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()
    assert (last["type"], last["new"], last["modified"], last["unchanged"]) == ("snapshot", 1, 0, 0)


def test_json_progress_needs_json_and_verbose_excludes_quiet(
    repository: Casfs, source: Path
) -> None:
    refused = repository.run("backup", "--progress", "json", source, expect=2)
    assert refused.complaints == ["casfs: --progress json needs --json"]
    repository.refuses(
        "backup", "-v", "-q", source, expect=2, mentions=("--verbose", "--quiet", "exclude")
    )


def test_verbose_lists_what_is_backed_up_and_restored(repository: Casfs, source: Path) -> None:
    first = repository.run("backup", "-v", source)
    listed = [line for line in first.text.splitlines() if line.startswith("new ")]
    assert f"new       {source}/readme.txt" in listed
    assert len(listed) == 4
    (source / "readme.txt").write_bytes(b"other")
    (source / "added").write_bytes(b"added")
    second = repository.run("backup", "-v", source)
    assert f"modified  {source}/readme.txt" in second.text.splitlines()
    assert f"new       {source}/added" in second.text.splitlines()
    assert "5 files (1 new, 1 modified, 3 unchanged)" in second.text
    objects = repository.json("backup", "--verbose", "--no-parent", source).of_type("entry")
    assert {entry["change"] for entry in objects} == {"new"}
    target = repository.home / "target"
    restored = repository.run("restore", "latest", "--target", target, "-v")
    assert f"restore   {str(source).lstrip('/')}/added" in restored.text.splitlines()


def test_quiet_prints_problems_and_damage_only(repository: Casfs, source: Path) -> None:
    assert repository.run("backup", "-q", source).out == b""
    assert repository.run("check", "-q", "--read-data").out == b""
    assert repository.run("prune", "-q").out == b""
    objects = StoredObjects(repository)
    (pack,) = objects.data_packs()
    objects.flip(pack.name, pack.size // 2)
    assert repository.run("check", "-q", "--read-data", expect=5).out


def test_quiet_may_come_before_the_command_and_hides_what_forget_removed(
    repository: Casfs, source: Path
) -> None:
    for _ in range(2):
        assert repository.run("--quiet", "backup", source).out == b""
    rules = ("forget", "--keep-last", "1")
    assert len(repository.run(*rules, "--quiet", "--dry-run").text.splitlines()) == 3
    assert repository.run(*rules, "--quiet").out == b""
    assert len(repository.json("snapshots").objects) == 1
