"""A random tree, random edits, backups and restores; the real directory is the oracle.

One repository and one tree live through a whole run: edits of every kind, backups that build on
each other, restores of any snapshot into nothing and over what an earlier restore left. What the
tree looked like at each backup is remembered, and every restore must look like that again.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from casfs.cli.app import casfs
from tests.support.comparing import Look, differences, look_at

KIB = 1 << 10
MIB = 1 << 20

NAMES = st.one_of(
    st.binary(min_size=1, max_size=12).filter(
        lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..")
    ),
    st.sampled_from([b"a", b"b", b"c", b"\xff", b"two\nlines", b"-r", b"x" * 255]),
)
SIZES = st.one_of(
    st.integers(0, 300),
    st.sampled_from([4095, 4096, 64 * KIB, 256 * KIB - 1, 256 * KIB, 256 * KIB + 1]),
    st.sampled_from([MIB, 2 * MIB + 1, 5 * MIB]),
)
TIMES_NS = st.one_of(
    st.integers(-(2**31) * 10**9, 2**34 * 10**9 - 1),
    st.sampled_from([0, -1, 1, 10**18 + 1]),
)
CHOICES = st.integers(0, 1 << 16)


@dataclass(frozen=True, slots=True)
class Published:
    """A snapshot and what the tree looked like when it was made."""

    identity: str
    looks: dict[bytes, Look]


class Trees(RuleBasedStateMachine):
    """The rules pick existing entries by number, so that each of them always means something."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.source = self.folder / "source"
        self.target = self.folder / "target"
        self.repository = self.folder / "repository"
        self.published: list[Published] = []
        self.source.mkdir()

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def run(self, verb: str, *arguments: str | Path) -> list[dict[str, object]]:
        return run(self.repository, verb, *arguments)

    @initialize()
    def init(self) -> None:
        self.run("init")

    def entries(self, keep: Callable[[os.stat_result], bool]) -> list[bytes]:
        top = os.fsencode(self.source)
        found = [
            os.path.join(folder, name)
            for folder, directories, files in os.walk(top)
            for name in directories + files
        ]
        return sorted(path for path in found if keep(os.lstat(path)))

    def pick(
        self, choice: int, keep: Callable[[os.stat_result], bool] = lambda state: True
    ) -> bytes | None:
        found = self.entries(keep)
        return found[choice % len(found)] if found else None

    def place(self, choice: int, name: bytes) -> bytes | None:
        """Return a path that is still free, in any directory."""
        folders = [os.fsencode(self.source), *self.entries(_is_directory)]
        path = os.path.join(folders[choice % len(folders)], name)
        return None if os.path.lexists(path) or len(path) > 3000 else path

    @rule(choice=CHOICES, name=NAMES, size=SIZES, seed=st.integers(0, 3))
    def write(self, choice: int, name: bytes, size: int, seed: int) -> None:
        if (path := self.place(choice, name)) is not None:
            with open(path, "wb") as file:
                file.write(random.Random(seed).randbytes(size))

    @rule(choice=CHOICES, name=NAMES, holes=st.lists(st.booleans(), min_size=1, max_size=6))
    def write_sparse(self, choice: int, name: bytes, holes: list[bool]) -> None:
        if (path := self.place(choice, name)) is not None:
            with open(path, "wb") as file:
                for hole in holes:
                    if hole:
                        file.seek(512 * KIB, os.SEEK_CUR)
                    else:
                        file.write(b"data" * (32 * KIB))
                file.truncate()

    @rule(choice=CHOICES, name=NAMES)
    def make_directory(self, choice: int, name: bytes) -> None:
        if (path := self.place(choice, name)) is not None:
            os.mkdir(path)

    @rule(choice=CHOICES, name=NAMES, content=NAMES)
    def make_symlink(self, choice: int, name: bytes, content: bytes) -> None:
        if (path := self.place(choice, name)) is not None:
            os.symlink(content, path)

    @rule(choice=CHOICES, name=NAMES)
    def make_fifo(self, choice: int, name: bytes) -> None:
        if (path := self.place(choice, name)) is not None:
            os.mkfifo(path)

    @rule(choice=CHOICES, other=CHOICES, name=NAMES)
    def link(self, choice: int, other: int, name: bytes) -> None:
        path, existing = self.place(choice, name), self.pick(other, _is_no_directory)
        if path is not None and existing is not None:
            os.link(existing, path, follow_symlinks=False)

    @rule(choice=CHOICES, other=CHOICES, name=NAMES)
    def rename(self, choice: int, other: int, name: bytes) -> None:
        path, existing = self.place(choice, name), self.pick(other)
        if path is not None and existing is not None and not path.startswith(existing + b"/"):
            os.rename(existing, path)

    @rule(choice=CHOICES)
    def remove(self, choice: int) -> None:
        if (path := self.pick(choice)) is not None:
            if _is_directory(os.lstat(path)):
                shutil.rmtree(path)
            else:
                os.unlink(path)

    @rule(choice=CHOICES, offset=SIZES, data=st.binary(min_size=1, max_size=50))
    def overwrite_a_part(self, choice: int, offset: int, data: bytes) -> None:
        if (path := self.pick(choice, _is_file)) is not None:
            with open(path, "r+b") as file:
                file.seek(min(offset, os.fstat(file.fileno()).st_size))
                file.write(data)

    @rule(choice=CHOICES)
    def change_behind_the_same_size_and_mtime(self, choice: int) -> None:
        if (path := self.pick(choice, _is_file)) is not None:
            state = os.stat(path)
            with open(path, "r+b") as file:
                first = file.read(1)
                file.seek(0)
                file.write(bytes([first[0] ^ 1]) if first else b"")
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))

    @rule(choice=CHOICES, size=SIZES)
    def truncate(self, choice: int, size: int) -> None:
        if (path := self.pick(choice, _is_file)) is not None:
            os.truncate(path, size)

    @rule(choice=CHOICES, mode=st.integers(0, 0o7777))
    def change_mode(self, choice: int, mode: int) -> None:
        if (path := self.pick(choice, _is_no_symlink)) is not None:
            # As an ordinary user one must still be able to walk through what one made.
            os.chmod(path, mode | (0o700 if os.geteuid() else 0))

    @rule(choice=CHOICES, when=TIMES_NS)
    def change_time(self, choice: int, when: int) -> None:
        if (path := self.pick(choice)) is not None:
            os.utime(path, ns=(when, when), follow_symlinks=False)

    @rule(choice=CHOICES, name=st.sampled_from(["user.a", "user.b"]), value=st.binary(max_size=40))
    def set_attribute(self, choice: int, name: str, value: bytes) -> None:
        if (path := self.pick(choice, _bears_attributes)) is not None:
            os.setxattr(path, name, value)

    @precondition(lambda self: os.geteuid() == 0)
    @rule(choice=CHOICES, uid=st.integers(0, 2**31), gid=st.integers(0, 2**31))
    def change_owner(self, choice: int, uid: int, gid: int) -> None:
        if (path := self.pick(choice)) is not None:
            os.chown(path, uid, gid, follow_symlinks=False)

    @rule()
    def back_up(self) -> None:
        looks = look_at(self.source)
        (snapshot,) = self.run("backup", self.source)
        assert snapshot["type"] == "snapshot"
        assert snapshot["files"] == sum(stat.S_ISREG(look.kind) for look in looks.values())
        self.published.append(Published(str(snapshot["id"]), looks))
        self.restore(self.published[-1], "--delete")

    @precondition(lambda self: self.published)
    @rule(choice=CHOICES)
    def restore_into_nothing(self, choice: int) -> None:
        shutil.rmtree(self.target)
        self.restore(self.published[choice % len(self.published)])

    @precondition(lambda self: self.published)
    @rule(choice=CHOICES, options=st.sampled_from([("--verify",), ("--overwrite", "always")]))
    def restore_over_what_is_there(self, choice: int, options: tuple[str, ...]) -> None:
        self.restore(self.published[choice % len(self.published)], "--delete", *options)

    def restore(self, snapshot: Published, *options: str) -> None:
        self.run("restore", snapshot.identity, "--target", self.target, *options)
        found = look_at(self.target / str(self.source).lstrip("/"))
        assert differences(snapshot.looks, found) == []

    @precondition(lambda self: self.published)
    @rule()
    def check(self) -> None:
        lines = self.run("check", "--read-data")
        assert [line["ok"] for line in lines if line["type"] == "summary"] == [True]
        listed = self.run("snapshots")
        assert [line["id"] for line in listed] == [kept.identity for kept in self.published]


def _is_directory(state: os.stat_result) -> bool:
    return stat.S_ISDIR(state.st_mode)


def _is_no_directory(state: os.stat_result) -> bool:
    return not stat.S_ISDIR(state.st_mode)


def _is_file(state: os.stat_result) -> bool:
    return stat.S_ISREG(state.st_mode)


def _is_no_symlink(state: os.stat_result) -> bool:
    return not stat.S_ISLNK(state.st_mode)


def _bears_attributes(state: os.stat_result) -> bool:
    return _is_file(state) or _is_directory(state)


def run(repository: Path, verb: str, *arguments: str | Path) -> list[dict[str, object]]:
    """Run a command in this process, which is much faster; it must succeed."""
    words = ["--json", "--repo", str(repository), verb, *map(str, arguments)]
    result = CliRunner().invoke(casfs, words, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    assert result.return_value in (None, 0), f"exit {result.return_value}\n{result.output}"
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_restore_looks_like_the_tree_did_at_its_backup(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    class TreesHere(Trees):
        def __init__(self) -> None:
            super().__init__(tmp_path_factory.mktemp("trees"))

    run_state_machine_as_test(TreesHere, settings=settings(stateful_step_count=50))
