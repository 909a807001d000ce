"""Mounts in a source that never answer or stop: the rest is published, and signals end the backup."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cli import Casfs, finish
from tests.support.other_user import needs_root
from tests.support.silent_mounts import (
    GETATTR,
    OPEN,
    READ,
    READDIR,
    silent_mount,
)
from tests.support.waiting import wait_until

pytestmark = [needs_root, pytest.mark.fuse]

STUCK = """
import os, sys
from casfs import interruption
interruption.install()
interruption.begin()
interruption.end_stuck_process(0.2)
print("begins", flush=True)
os.stat(sys.argv[1])
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("before", "zzz after"):
        (source / name).write_bytes(name.encode())
    return source


@pytest.fixture
def casfs(tmp_path: Path) -> Casfs:
    home = tmp_path / "home"
    home.mkdir()
    return Casfs(tmp_path / "repository", home).init()


def listed(casfs: Casfs, source: Path) -> list[str]:
    shown = casfs.json("ls", f"latest:{source}", "-R").of_type("node")
    return [Path(str(one["path"])).name for one in shown]


def back_up(
    casfs: Casfs, *sources: Path, expect: int = 3, timeout: str = "3"
) -> list[dict[str, object]]:
    """Back up while a mount does not answer, and return the problems."""
    result = casfs.json("backup", "--mount-timeout", timeout, *sources, expect=expect)
    return result.of_type("problem")


@pytest.mark.parametrize(
    ("last", "kept"),
    [((0, 0), []), ((GETATTR, 1), []), ((READDIR, 1), []), ((OPEN, 2), []), ((READ, 3), ["a"])],
    ids=["never", "getattr", "readdir", "open", "second file"],
)
def test_a_backup_publishes_the_rest_beside_a_mount_that_stops_answering(
    casfs: Casfs, source: Path, last: tuple[int, int], kept: list[str]
) -> None:
    with silent_mount(source / "mount", last):
        (problem,) = back_up(casfs, source)
        assert "did not answer for 3 s" in str(problem["message"])
        assert str(problem["path"]).startswith(str(source / "mount").lstrip("/"))
        names = listed(casfs, source)
    assert [name for name in names if name != "mount"] == ["before", *kept, "zzz after"]
    casfs.run("check", "--read-data")


@pytest.mark.parametrize("how", ["by name", "inside", "through a symlink"])
def test_a_named_source_in_a_mount_that_never_answers_costs_no_other_source(
    casfs: Casfs, source: Path, tmp_path: Path, how: str
) -> None:
    mount = tmp_path / "mount"
    link = tmp_path / "link"
    link.symlink_to(mount)
    named = {"by name": mount, "inside": mount / "a", "through a symlink": link / "a"}[how]
    with silent_mount(mount):
        back_up(casfs, source, named)
        assert listed(casfs, source) == ["before", "zzz after"]
        sentence = casfs.run("backup", "--mount-timeout", "3", named, expect=1).complaint
        assert "did not answer" in sentence and "nothing was published" in sentence


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("last", [(0, 0), (READ, 2)], ids=["never", "first file"])
def test_a_signal_ends_a_backup_that_waits_for_a_mount(
    casfs: Casfs, source: Path, number: signal.Signals, last: tuple[int, int]
) -> None:
    with silent_mount(source / "mount", last) as server:
        process = casfs.start("backup", "--mount-timeout", "86400", source)
        try:
            if last != (0, 0):
                assert server.stdout is not None
                assert server.stdout.readline() == "silent\n"
            else:
                wait_until(lambda: waits_for_another_process(process.pid), "the backup waits")
            process.send_signal(number)
            assert finish(process, timeout=30).exit == 130
        finally:
            process.kill()
            process.wait()
    assert casfs.json("snapshots").of_type("snapshot") == []
    assert back_up(casfs, source, expect=0) == []
    casfs.run("check", "--read-data")


def test_a_signal_ends_a_process_that_is_in_the_kernel(tmp_path: Path) -> None:
    """Where a command waits for a mount itself, as for that of its repository."""
    with silent_mount(tmp_path / "mount"):
        process = subprocess.Popen(
            [sys.executable, "-c", STUCK, str(tmp_path / "mount")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begins\n"
            state = Path(f"/proc/{process.pid}/stat")
            wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] in "SD", "it waits")
            process.send_signal(signal.SIGTERM)
            _, message = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 130
    assert b"interrupted; the repository is as intact as before" in message


def waits_for_another_process(pid: int) -> bool:
    """Return whether a process has started the process that reads a mount."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return any(
        b"source_server" in Path(f"/proc/{child}/cmdline").read_bytes() for child in children
    )
