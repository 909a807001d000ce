"""New directories that only the restore can reach: what it need not ask there, and where it has to."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from casfs.monitor import RecordingMonitor
from casfs.restore import target_fs
from casfs.restore.restorer import RestoreOptions, Restorer, RestoreResult
from tests.support.builders import Plan, RepositoryFixture, file

DEFAULT_ACL = "system.posix_acl_default"
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER = 1, 2, 4, 16, 32
_NOBODY = 0xFFFFFFFF

CONTENT = b"content"


def acl(user: int) -> bytes:
    """Return an ACL that gives one more user every permission."""
    entries = [
        (_USER_OBJ, 7, _NOBODY),
        (_USER, 7, user),
        (_GROUP_OBJ, 5, _NOBODY),
        (_MASK, 7, _NOBODY),
        (_OTHER, 5, _NOBODY),
    ]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *one) for one in entries)


def give_default_acl(folder: Path) -> None:
    """Give a folder an ACL that new entries inherit; skip the test where its file system has none."""
    try:
        os.setxattr(folder, DEFAULT_ACL, acl(4242))
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        pytest.skip("the file system has no ACLs")


@pytest.fixture
def mask() -> Iterator[None]:
    """A mask that gives new files no permission for others; restored ones have theirs all the same."""
    before = os.umask(0o077)
    yield
    os.umask(before)


def restore(folder: Path, plan: Plan) -> tuple[RestoreResult, list[str]]:
    """Restore a tree into the folder `target`; return the result and the messages of all problems.

    The content of files that the plan gives as nodes is CONTENT.
    """
    repo = RepositoryFixture(folder)
    repo.store(CONTENT)
    repo.publish(plan)
    monitor = RecordingMonitor()
    with repo.reading() as repository:
        _, snapshot = repository.snapshots.resolve("latest")
        restorer = Restorer(repository, RestoreOptions(), monitor)
        result = restorer.restore(b"", snapshot.root, bytes(folder / "target"), False)
    return result, [problem.message for problem in monitor.problems]


def test_a_restored_file_keeps_no_acl_that_it_inherits_in_a_new_directory(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    give_default_acl(target)
    assert restore(tmp_path, {b"d": {b"e": {b"f": file(b"", CONTENT, mode=0o640)}}})[1] == []
    for path in (target / "d", target / "d" / "e", target / "d" / "e" / "f"):
        assert [name for name in os.listxattr(path) if name.startswith("system.")] == []
    assert stat.S_IMODE((target / "d" / "e" / "f").stat().st_mode) == 0o640


def test_restored_files_in_new_directories_have_their_modes_under_any_umask(
    tmp_path: Path, mask: None
) -> None:
    modes = (0o644, 0o666, 0o600, 0o444, 0o000, 0o755, 0o4755, 0o2711)
    plan: Plan = {b"%o" % mode: file(b"", CONTENT, mode=mode) for mode in modes}
    assert restore(tmp_path, {b"d": plan})[1] == []
    found = {int(path.name, 8): path.lstat() for path in (tmp_path / "target" / "d").iterdir()}
    assert {mode: stat.S_IMODE(st.st_mode) for mode, st in found.items()} == dict(
        zip(modes, modes, strict=True)
    )


def test_a_directory_is_fresh_only_where_no_other_user_gets_in_and_nothing_is_inherited(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o700)
    fd = os.open(folder, os.O_RDONLY)
    try:
        assert target_fs.is_fresh(fd)
        for mode in (0o710, 0o701, 0o1733, 0o770):
            os.fchmod(fd, mode)
            assert not target_fs.is_fresh(fd)
        os.fchmod(fd, 0o700)
        give_default_acl(folder)
        assert not target_fs.is_fresh(fd)
        os.removexattr(fd, DEFAULT_ACL)
        assert target_fs.is_fresh(fd)
        if os.geteuid() == 0:
            os.fchown(fd, 4242, -1)
            assert not target_fs.is_fresh(fd)
    finally:
        os.close(fd)


def test_a_file_replaces_an_empty_directory_in_its_place_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "target"
    (target / "empty").mkdir(parents=True)
    (target / "full").mkdir()
    (target / "full" / "kept").touch()
    result, messages = restore(tmp_path, {b"empty": b"1", b"full": b"2"})
    assert (result.files, result.failed) == (1, 1)
    assert "a non-empty directory is in its place" in messages[0]
    assert (target / "empty").read_bytes() == b"1"
    assert os.listdir(target / "full") == ["kept"]
    assert sorted(os.listdir(target)) == ["empty", "full"]
