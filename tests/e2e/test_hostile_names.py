"""Names can't forge output: escaped for people, lossless for programs."""

from __future__ import annotations

import base64
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import WITHOUT_READING_EVERYTHING, Casfs, Result
from tests.support.comparing import tree_differences
from tests.support.full_tree import HOSTILE_NAMES

# What a terminal obeys: C0 but for the newlines between lines, DEL, and C1 as UTF-8.
FORGERY = re.compile(rb"[\x00-\x09\x0b-\x1f\x7f]|\xc2[\x80-\x9f]")

FORGED_LINE = b"innocent\n4 files backed up, nothing is wrong"
NAMES = (
    *(name for name in HOSTILE_NAMES if name.strip(b" ") and len(name) < 200),
    FORGED_LINE,
    b"\x1b]0;title\x07",
    b"wipe\x1b[1A\x1b[2K",
    b"\xc2\x9b31m",
    b"\xe2\x80\xaegnp.exe",
)


def name_in(line: dict[str, Any]) -> bytes:
    """Return the path of a JSON line as bytes, and insist on both ways of telling it."""
    path = os.fsencode(line["path"])
    try:
        path.decode()
    except UnicodeDecodeError:
        assert base64.b64decode(line["path_b64"]) == path
    return path


def assert_no_forgery(result: Result) -> None:
    for stream in (result.out, result.err):
        assert FORGERY.search(stream) is None, result
        assert all(not line.startswith(b"4 files backed up") for line in stream.splitlines()), (
            result
        )
        stream.decode()


@pytest.fixture
def hostile(tmp_path: Path) -> bytes:
    root = os.fsencode(tmp_path / "hostile")
    os.mkdir(root)
    for name in NAMES:
        with open(root + b"/" + name, "wb") as file:
            file.write(b"content of " + name)
    return root


def test_json_output_has_every_name_without_loss(repository: Casfs, hostile: bytes) -> None:
    repository.backup(hostile)
    result = repository.json("ls", "latest")
    assert result.out.isascii()
    found = {os.path.basename(name_in(node)) for node in result.of_type("node")}
    assert found >= set(NAMES)


def test_ls_find_and_diff_print_no_name_that_forges_output(
    repository: Casfs, hostile: bytes
) -> None:
    empty = os.path.dirname(hostile) + b"/empty"
    os.mkdir(empty)
    before = repository.backup("--host", "h", empty)["id"]
    identity = repository.backup("--host", "h", hostile)["id"]
    for arguments in (("ls", "latest"), ("find", "*"), ("diff", before, identity)):
        result = repository.run(*arguments)
        assert_no_forgery(result)
        assert len(result.out.splitlines()) >= len(NAMES)
    matches = repository.json("find", "*").of_type("match")
    assert {os.path.basename(name_in(match)) for match in matches} >= set(NAMES)
    changes = repository.json("diff", before, identity).of_type("change")
    assert {os.path.basename(name_in(change)) for change in changes} >= set(NAMES)


def test_backup_warnings_print_no_name_that_forges_output(
    repository: Casfs, hostile: bytes
) -> None:
    for name in NAMES:
        os.chmod(hostile + b"/" + name, 0)
    result = repository.run("backup", hostile, expect=3, prefix=WITHOUT_READING_EVERYTHING)
    assert_no_forgery(result)
    assert len(result.complaints) >= len(NAMES)
    reported = repository.json("backup", hostile, expect=3, prefix=WITHOUT_READING_EVERYTHING)
    problems = reported.of_type("problem")
    assert {os.path.basename(name_in(problem)) for problem in problems} == set(NAMES)


def test_a_missing_source_of_a_hostile_name_is_refused_on_one_line(repository: Casfs) -> None:
    for name in (FORGED_LINE, b"\x1b[2Jgone", b"caf\xe9\xff"):
        result = repository.run("backup", name, expect=1)
        assert_no_forgery(result)
        assert len(result.complaints) == 1, result


def test_snapshots_prints_no_path_host_or_tag_that_forges_output(
    repository: Casfs, hostile: bytes
) -> None:
    """They may be refused; what is accepted is escaped."""
    repository.backup(hostile + b"/" + FORGED_LINE)
    repository.backup(hostile + b"/" + b"\x1b]0;title\x07")
    for option in ("--host", "--tag"):
        value = b"evil\x1b[2J\n4 files backed up, nothing is wrong"
        result = repository.run("backup", option, value, hostile, expect=None)
        assert result.exit in (0, 2), result
        assert_no_forgery(result)
    assert_no_forgery(repository.run("snapshots"))
    for snapshot in repository.json("snapshots").of_type("snapshot"):
        assert snapshot["paths"]


def test_errors_about_hostile_arguments_stay_on_one_line(repository: Casfs, source: Path) -> None:
    repository.backup(source)
    for arguments in (
        ("ls", "\x1b[2Jlatest"),
        ("ls", "latest:/no\nsuch\x1b[31m"),
        ("dump", "latest:/\x9b31m"),
        ("restore", "latest:/a\nb", "--target", "t"),
        ("umount", "no\nmount\x1b[2J"),
    ):
        result = repository.run(*arguments, expect=None)
        assert result.exit in (1, 2), result
        assert_no_forgery(result)
        if result.exit == 1:
            assert len(result.complaints) == 1, result


def test_hostile_names_can_be_requested_and_are_returned(
    repository: Casfs, hostile: bytes, tmp_path: Path
) -> None:
    repository.backup(hostile)
    for name in (*NAMES[::4], FORGED_LINE):
        found = repository.run("dump", b"latest:" + hostile + b"/" + name)
        assert found.out == b"content of " + name
    repository.run("restore", "latest", "--target", tmp_path / "target")
    restored = os.fsencode(tmp_path / "target") + hostile
    assert set(os.listdir(restored)) == set(NAMES)


def test_output_in_the_c_locale_is_the_same(repository: Casfs, hostile: bytes) -> None:
    repository.backup(hostile, env={"LC_ALL": "C"})
    found = repository.json("ls", "latest", env={"LC_ALL": "C"}).of_type("node")
    assert {os.path.basename(name_in(node)) for node in found} >= set(NAMES)
    assert repository.run("ls", "latest", env={"LC_ALL": "C"}).out


@pytest.mark.parametrize("name", [b"\xff\xfe", FORGED_LINE, b"a, b\\:c"])
def test_a_repository_may_have_any_name(casfs: Casfs, source: Path, name: bytes) -> None:
    """And so may the home of who uses it."""
    home = casfs.home / os.fsdecode(name)
    home.mkdir()
    odd = Casfs(home / os.fsdecode(name), home)
    made = odd.run("init")
    assert_no_forgery(made)
    assert len(made.text.splitlines()) == 2
    odd.backup(source)
    shutil.rmtree(home / os.fsdecode(name) / "index")
    odd.run("restore", "latest", "--target", home / "target")
    assert tree_differences(source, home / "target" / str(source).lstrip("/")) == []
    odd.run("forget", "--keep-last", "1", "--prune")
    assert odd.json("check", "--read-data").one("summary")["ok"] is True
