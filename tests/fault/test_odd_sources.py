"""Sources that break rules: names, links and attributes that a file system should not have, and has.

One such entry costs no other: it is stored whole, or it is reported and the rest of its directory is stored.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from casfs.backup.capture import Capturer
from casfs.format.tree import Node, NodeType
from casfs.monitor import ProblemKind
from tests.support.capturing import BackupFixture, open_backup_fixture
from tests.support.cli import Casfs
from tests.support.loop_devices import fresh_disk
from tests.support.mounts import mounted
from tests.support.scripted_source import ScriptedSource, content

XATTR_ERRORS = (errno.E2BIG, errno.EINVAL, errno.EIO, errno.ENAMETOOLONG)
BESIDE = {"seed": "beside", "size": 4000}


@pytest.mark.fuse
@pytest.mark.parametrize("length", [255, 256, 304, 765, 1024])
def test_a_name_longer_than_most_file_systems_allow_is_stored_with_all_its_siblings(
    backups: BackupFixture, scripted: ScriptedSource, length: int
) -> None:
    name = "n" * length
    folder = scripted.scene({"a": BESIDE, name: {"seed": "long", "size": 5000}, "z": BESIDE})
    found = backups.back_up(folder)
    assert (found.exit, found.problems) == (0, [])
    for entry in ("a", name, "z"):
        assert found.file(folder / entry).size == (5000 if entry == name else 4000)
    shown = found.shown(folder / name)
    assert shown is not None and shown[0] == content("long", 5000)
    backups.assert_is_intact()


@pytest.mark.fuse
@pytest.mark.parametrize("kind", ["ntfs", "exfat"])
def test_names_of_255_utf_16_units_come_back_to_a_file_system_that_allows_them(
    backups: BackupFixture, tmp_path: Path, kind: str
) -> None:
    with fresh_disk(tmp_path, kind, 64 << 20) as disk:
        source = disk / "source"
        (source / ("€" * 255)).mkdir(parents=True)
        (source / ("€" * 255) / ("ä" * 255)).write_bytes(b"in a long name")
        (source / "beside").write_bytes(b"beside it")
        found = backups.back_up(source)
        assert (found.exit, found.problems) == (0, [])
        restored = found.restore(disk / "restored") / str(source).lstrip("/")
        assert (restored / ("€" * 255) / ("ä" * 255)).read_bytes() == b"in a long name"
        assert (restored / "beside").read_bytes() == b"beside it"
        backups.assert_is_intact()


@pytest.mark.fuse
def test_a_symlink_with_an_empty_target_is_reported_and_costs_no_sibling(
    backups: BackupFixture, scripted: ScriptedSource
) -> None:
    link = {"seed": "", "size": 0, "mode": stat.S_IFLNK | 0o777, "target": ""}
    folder = scripted.scene({"a": BESIDE, "link": link, "z": BESIDE})
    found = backups.back_up(folder)
    assert found.exit == 3
    problem = found.problem(folder / "link")
    assert problem is not None and problem.kind == ProblemKind.UNREADABLE
    assert "empty target" in problem.message
    assert found.node(folder / "link") is None
    assert found.file(folder / "a").size == found.file(folder / "z").size == 4000
    backups.assert_is_intact()


@pytest.mark.fuse
def test_a_name_that_is_listed_twice_is_stored_once(
    backups: BackupFixture, scripted: ScriptedSource
) -> None:
    folder = scripted.scene({"a": BESIDE, "twice": {**BESIDE, "twice": True}, "z": BESIDE})
    assert sorted(os.listdir(folder)) == ["a", "twice", "twice", "z"]
    found = backups.back_up(folder)
    assert (found.exit, found.problems) == (0, [])
    tree = found.file(folder).tree
    assert tree is not None and tree.nodes == 3
    backups.assert_is_intact()


@pytest.mark.fuse
@pytest.mark.parametrize("call", ["list_error", "get_error"])
@pytest.mark.parametrize("error", XATTR_ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("kind", ["file", "directory", "fifo"])
def test_an_entry_whose_xattrs_cannot_be_read_is_stored_and_reported_at_each_backup(
    backups: BackupFixture, scripted: ScriptedSource, kind: str, error: int, call: str
) -> None:
    mode = {"file": stat.S_IFREG, "directory": stat.S_IFDIR, "fifo": stat.S_IFIFO}[kind] | 0o755
    odd = {"seed": "odd", "size": 5000, "mode": mode, "xattrs": ["trusted.a"], call: error}
    folder = scripted.scene({"a": BESIDE, "odd": odd, "z": BESIDE})
    for _ in range(2):
        found = backups.back_up(folder)
        assert found.exit == 3
        problem = found.problem(folder / "odd")
        assert problem is not None and problem.kind == ProblemKind.METADATA
        assert "extended attributes" in problem.message
        assert os.strerror(error) in problem.message
        if kind == "file":
            shown = found.shown(folder / "odd")
            assert shown is not None and shown[0] == content("odd", 5000)
        elif kind == "directory":
            shown = found.shown(folder / "odd" / "inside")
            assert shown is not None and shown[0] == content("odd", 5000)
        else:
            assert found.file(folder / "odd").kind == NodeType.FIFO
        assert found.file(folder / "z").size == 4000
    backups.assert_is_intact()


def test_more_names_of_xattrs_than_a_list_of_them_holds_cost_no_content(
    backups: BackupFixture, tmp_path: Path
) -> None:
    with fresh_disk(tmp_path, "xfs") as disk:
        (disk / "many").write_bytes(b"the content")
        for number in range(270):
            os.setxattr(disk / "many", f"user.{number:0250}", b"")
        with pytest.raises(OSError, match="too long"):
            os.listxattr(disk / "many")
        found = backups.back_up(disk / "many")
        assert found.exit == 3
        assert found.file(disk / "many").size == len(b"the content")


@pytest.mark.fuse
def test_names_of_a_file_that_changes_between_their_visits_are_two_files_in_the_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_bytes(b"before " * 1000)
    os.link(source / "a", source / "z")
    (source / "between").write_bytes(b"x")
    real = Capturer.capture

    def capture(self: Capturer, dir_fd: int, name: bytes, **options: Any) -> Node:
        if name == b"between":
            (source / "a").write_bytes(b"afterwards " * 1000)
        return real(self, dir_fd, name, **options)

    monkeypatch.setattr(Capturer, "capture", capture)
    home = tmp_path / "home"
    home.mkdir()
    with open_backup_fixture(tmp_path / "repository") as backups:
        found = backups.back_up(source)
        nodes = [found.file(source / name) for name in ("a", "z")]
        assert nodes[0].inode == nodes[1].inode and nodes[0].nlink == 2
    with mounted(Casfs(tmp_path / "repository", home), "latest", at=tmp_path / "mount") as mount:
        shown = mount / str(source).lstrip("/")
        assert (shown / "a").read_bytes() == b"before " * 1000
        assert (shown / "z").read_bytes() == b"afterwards " * 1000
        assert (shown / "a").read_bytes() == b"before " * 1000
        assert (shown / "a").stat().st_ino != (shown / "z").stat().st_ino
