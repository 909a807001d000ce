"""A user who may run one process only: each command ends with one sentence, and changes nothing by halves."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import Casfs, Result
from tests.support.other_user import needs_root

USER = 54_321 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
"""No other process on the machine belongs to this user, so the limit counts only those of the test."""

pytestmark = needs_root

AS_USER = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
ALONE = ("prlimit", "--nproc=1:1", *AS_USER)


class Alone:
    """A repository of an ordinary user who can start neither a thread nor a process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "source"
        self.source.mkdir()
        for number in range(20):
            (self.source / f"file {number}").write_bytes(os.urandom(30_000))
        self.casfs = Casfs(repository=folder / "repository", home=folder)
        for root, _, files in os.walk(folder):
            for name in (root, *(os.path.join(root, file) for file in files)):
                os.chown(name, USER, USER)
        for arguments in (("init",), ("backup", "source"), ("backup", "source", "--tag", "second")):
            self.run(AS_USER, *arguments)

    def run(self, prefix: tuple[str, ...], *arguments: str, expect: int | None = 0) -> Result:
        return self.casfs.run(*arguments, expect=expect, cwd=self.folder, prefix=prefix)


@pytest.fixture(scope="module")
def alone() -> Iterator[Alone]:
    # Not below pytest's folder: an ordinary user may not enter it.
    folder = Path(tempfile.mkdtemp(prefix="casfs-alone-"))
    try:
        yield Alone(folder)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "arguments",
    [
        ("backup", "source", "--reread"),
        ("backup", "--stdin-from-command", "--", "true"),
        ("restore", "latest", "--target", "restored"),
        ("check", "--read-data"),
        ("check", "--storage"),
        ("prune", "--max-unused", "0"),
        ("rewrite", "latest", "--exclude", "file 1"),
        ("mirror", "mirrored"),
        ("dump", "latest:source", "--output", "dumped.tar"),
        ("recompress", "--compression", "9"),
        ("find", "file*"),
        ("stats", "latest"),
        ("snapshots",),
        ("repair", "index"),
        ("tag", "latest", "--add", "more"),
        ("forget", "latest"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_command_that_may_start_no_thread_ends_with_one_sentence(
    alone: Alone, arguments: tuple[str, ...]
) -> None:
    done = alone.run(ALONE, *arguments, expect=None)
    assert done.exit in (0, 1), done
    if done.exit:
        assert len(done.complaints) == 1, done
        assert "ulimit -u" in done.complaint, done


@pytest.mark.parametrize(
    "arguments",
    [("backup", "source"), ("restore", "latest", "--target", "never"), ("check", "--read-data")],
    ids=lambda arguments: arguments[0],
)
def test_a_command_that_needs_threads_fails_without_them(
    alone: Alone, arguments: tuple[str, ...]
) -> None:
    before = alone.run(AS_USER, "snapshots", "--json").objects
    done = alone.run(ALONE, *arguments, "--json", expect=1)
    assert "ulimit -u" in done.one("error")["message"]
    assert alone.run(AS_USER, "snapshots", "--json").objects == before
    alone.run(AS_USER, "check", "--read-data")
