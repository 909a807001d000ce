"""Root restores into a folder of another user, who exchanges names there while it runs."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from casfs.digest import digest_of
from casfs.format.codec import BlobKind
from casfs.format.tree import Node, NodeExtra, NodeType
from casfs.monitor import RecordingMonitor
from casfs.restore import entry_writer, metadata, staging, temporary_entries
from casfs.restore.entry_writer import Overwrite
from casfs.restore.restorer import RestoreOptions, Restorer, RestoreResult
from tests.support.builders import MTIME_NS, Plan, RepositoryFixture, entry, file
from tests.support.other_user import OTHER_USER, as_other_user, needs_root

pytestmark = needs_root

DEVICE = 7


class ForeignTarget:
    """A target that belongs to another user, and a file of root that the user wants to take over."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.repo = RepositoryFixture(folder)
        with self.repo.writing() as repository:
            writer = repository.writer()
            for data in (b"shared", b"secret"):
                writer.put(BlobKind.DATA, digest_of(data), data)
            writer.finish()
        self.repo.publish(plan)
        self.target = folder / "target"
        self.target.mkdir()
        os.chown(self.target, OTHER_USER, OTHER_USER)
        self.target_fd = os.open(self.target, os.O_RDONLY)
        self.vault = folder / "vault"
        self.vault.mkdir(mode=0o700)
        self.secret = self.vault / "first"
        self.secret.write_bytes(b"secret")
        self.secret.chmod(0o600)
        self.before = self.secret.stat()

    def restore(self, **options: Any) -> RestoreResult:
        monitor = RecordingMonitor()
        with self.repo.reading() as repository:
            _, _, path, node = repository.snapshots.resolve_path("latest")
            restorer = Restorer(repository, RestoreOptions(**options), monitor)
            result = restorer.restore(path, node, bytes(self.target), False)
        return result

    def replace_temporaries_by_symlinks(self) -> None:
        """Put a symlink to the secret in the place of every temporary entry of the restore."""
        for name in os.listdir(self.target_fd):
            if name.startswith(".casfs-restore-"):
                os.rename(name, "taken", src_dir_fd=self.target_fd, dst_dir_fd=self.target_fd)
                os.symlink(self.secret, name, dir_fd=self.target_fd)

    def is_secret_untouched(self) -> bool:
        now = self.secret.stat()
        return now == self.before and os.listdir(self.vault) == ["first"]


def after(original: Callable[..., Any], act: Callable[[], None]) -> Callable[..., Any]:
    """Return a function after which another user acts, once."""
    done: list[bool] = []

    def attacked(*arguments: Any, **named: Any) -> Any:
        result = original(*arguments, **named)
        if not done:
            done.append(as_other_user(act))
        return result

    return attacked


def before(original: Callable[..., Any], act: Callable[[], None]) -> Callable[..., Any]:
    """Return a function before which another user acts, once."""
    done: list[bool] = []

    def attacked(*arguments: Any, **named: Any) -> Any:
        if not done:
            done.append(as_other_user(act))
            assert done == [True], "the attack needs to succeed up to here"
        return original(*arguments, **named)

    return attacked


def special(kind: NodeType) -> Node:
    return entry(b"", kind, mode=0o666, uid=OTHER_USER, gid=OTHER_USER)


@pytest.mark.parametrize(
    ("kind", "call"), [(NodeType.FIFO, "mkfifo"), (NodeType.SOCKET, "mknod")], ids=str
)
def test_a_symlink_in_the_place_of_a_new_special_file_changes_no_file_of_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: NodeType, call: str
) -> None:
    scene = ForeignTarget(tmp_path, {b"p": special(kind)})
    monkeypatch.setattr(os, call, after(getattr(os, call), scene.replace_temporaries_by_symlinks))
    scene.restore()
    assert scene.is_secret_untouched()


def test_special_files_and_symlinks_arrive_with_their_metadata_in_a_foreign_folder(
    tmp_path: Path,
) -> None:
    link = entry(b"", NodeType.SYMLINK, content=b"x", size=1, uid=OTHER_USER, gid=OTHER_USER)
    scene = ForeignTarget(tmp_path, {b"p": special(NodeType.FIFO), b"l": link})
    assert scene.restore().failed == 0
    for name, mode in (("p", stat.S_IFIFO | 0o666), ("l", stat.S_IFLNK | 0o777)):
        found = (scene.target / name).lstat()
        assert (found.st_mode, found.st_uid, found.st_gid) == (mode, OTHER_USER, OTHER_USER)
        assert found.st_mtime_ns == MTIME_NS
    assert sorted(os.listdir(scene.target)) == ["l", "p"]


def test_metadata_of_an_entry_that_became_another_type_are_not_set(tmp_path: Path) -> None:
    scene = ForeignTarget(tmp_path, {b"f": b""})
    (scene.target / "p").symlink_to(scene.secret)
    with pytest.raises(OSError, match="another process replaced it"):
        metadata.set_entry_metadata(scene.target_fd, b"p", special(NodeType.FIFO))
    assert scene.is_secret_untouched()


def linked(uid: int = OTHER_USER) -> Node:
    return file(b"", b"shared", inode=9, nlink=2, uid=uid, gid=uid, extra=NodeExtra(device=DEVICE))


def test_a_symlink_in_the_place_of_a_folder_links_no_file_of_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = ForeignTarget(tmp_path, {b"d": {b"first": linked()}, b"e": {b"second": linked()}})

    def replace_folder() -> None:
        os.rename("d", "moved", src_dir_fd=scene.target_fd, dst_dir_fd=scene.target_fd)
        os.symlink(scene.vault, "d", dir_fd=scene.target_fd)

    monkeypatch.setattr(
        entry_writer.EntryWriter, "_link", before(entry_writer.EntryWriter._link, replace_folder)
    )
    scene.restore()
    assert scene.is_secret_untouched()
    assert (scene.target / "e" / "second").read_bytes() == b"shared"


def test_a_file_in_the_place_of_a_restored_name_is_not_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = ForeignTarget(tmp_path, {b"a": linked(), b"b": linked()})

    def replace_first() -> None:
        os.unlink("a", dir_fd=scene.target_fd)
        os.close(os.open("a", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=scene.target_fd))

    monkeypatch.setattr(
        entry_writer.EntryWriter, "_link", before(entry_writer.EntryWriter._link, replace_first)
    )
    scene.restore()
    assert (scene.target / "b").read_bytes() == b"shared"
    assert (scene.target / "b").stat().st_nlink == 1


def test_a_hard_link_in_the_place_of_an_unchanged_file_keeps_its_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = file(b"", b"secret", mode=0o666, uid=OTHER_USER, gid=OTHER_USER)
    scene = ForeignTarget(tmp_path, {b"f": node})
    scene.restore()
    is_alike = entry_writer._is_linked_alike

    def replace_by_link(*arguments: Any) -> bool:
        found = is_alike(*arguments)
        (scene.target / "f").unlink()
        os.link(scene.secret, scene.target / "f")
        return found

    monkeypatch.setattr(entry_writer, "_is_linked_alike", replace_by_link)
    assert scene.restore(overwrite=Overwrite.IF_CHANGED).failed == 1
    (scene.target / "f").unlink()
    now = scene.secret.stat()
    assert (now.st_mode, now.st_uid) == (scene.before.st_mode, scene.before.st_uid)


RIGHTS = {
    "root": {"mode": 0o644},
    "setuid of root": {"mode": 0o4755},
    "setgid": {"mode": 0o2755, "uid": OTHER_USER},
    "capability": {
        "mode": 0o755,
        "uid": OTHER_USER,
        "extra": NodeExtra(
            xattrs=((b"security.capability", bytes.fromhex("01000002" + "00" * 16)),)
        ),
    },
}


@pytest.mark.parametrize("fields", RIGHTS.values(), ids=RIGHTS)
def test_a_file_of_another_user_with_the_same_size_and_time_gets_no_rights(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    scene = ForeignTarget(tmp_path, {b"f": file(b"", b"shared", **fields)})
    planted = scene.target / "f"

    def plant() -> None:
        fd = os.open("f", os.O_WRONLY | os.O_CREAT, 0o755, dir_fd=scene.target_fd)
        os.write(fd, b"evil!!")
        os.utime(fd, ns=(MTIME_NS, MTIME_NS))

    assert as_other_user(plant)
    assert planted.stat().st_mtime_ns == MTIME_NS
    result = scene.restore(overwrite=Overwrite.IF_CHANGED)
    assert planted.read_bytes() == b"shared"
    assert (result.files, result.skipped) == (1, 0)
    assert stat.S_IMODE(planted.stat().st_mode) == fields["mode"]
    # What the restore itself wrote is unchanged for the next one, unless the other user may write to it.
    again = scene.restore(overwrite=Overwrite.IF_CHANGED)
    assert again.skipped == ("uid" not in fields)


def test_a_hard_link_to_a_file_of_root_is_not_taken_for_an_unchanged_file_of_another_user(
    tmp_path: Path,
) -> None:
    # Where fs.protected_hardlinks is off, any user can make it, and have a file like it backed up before.
    owner = {"uid": OTHER_USER, "gid": OTHER_USER, "mode": 0o666}
    node = file(b"", b"secret", inode=9, nlink=2, extra=NodeExtra(device=DEVICE), **owner)
    scene = ForeignTarget(tmp_path, {b"a": node, b"b": node})
    os.utime(scene.secret, ns=(MTIME_NS, MTIME_NS))
    for name in ("a", "b"):
        os.link(scene.secret, scene.target / name)
    before = scene.secret.stat()
    scene.restore(overwrite=Overwrite.IF_CHANGED)
    now = scene.secret.stat()
    assert (now.st_mode, now.st_uid, now.st_nlink) == (before.st_mode, before.st_uid, 1)
    again = scene.restore(overwrite=Overwrite.IF_CHANGED)
    assert again.skipped == 2


def test_a_file_of_its_owner_in_the_snapshot_is_taken_for_unchanged(tmp_path: Path) -> None:
    node = file(b"", b"shared", uid=OTHER_USER, gid=OTHER_USER)
    scene = ForeignTarget(tmp_path, {b"f": node})
    scene.restore()
    assert scene.restore(overwrite=Overwrite.IF_CHANGED).skipped == 1


def test_a_new_file_with_the_inode_number_of_an_unchanged_one_gets_no_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = ForeignTarget(tmp_path, {b"f": file(b"", b"shared", mode=0o4755)})
    scene.restore()
    is_alike = entry_writer._is_linked_alike
    planted = scene.target / "f"

    def write_into_it(*arguments: Any) -> bool:
        # As if the name led to a new file that has the number of the one before.
        found = is_alike(*arguments)
        planted.write_bytes(b"evil!!")
        os.chown(planted, OTHER_USER, OTHER_USER)
        return found

    monkeypatch.setattr(entry_writer, "_is_linked_alike", write_into_it)
    assert scene.restore(overwrite=Overwrite.IF_CHANGED).failed == 1
    assert planted.stat().st_uid == OTHER_USER
    assert not planted.stat().st_mode & stat.S_ISUID


def test_an_ordinary_user_gets_the_xattrs_of_a_write_protected_file_that_exists(
    tmp_path: Path,
) -> None:
    existing = tmp_path / "file"
    existing.write_bytes(b"shared")
    for name in ("user.old", "user.other"):
        os.setxattr(existing, name, b"before")
    existing.chmod(0o444)
    os.chown(existing, OTHER_USER, OTHER_USER)
    fd = os.open(existing, os.O_RDONLY)
    extra = NodeExtra(xattrs=((b"user.new", b"1"), (b"user.other", b"after")))
    node = file(b"file", b"shared", mode=0o444, uid=OTHER_USER, gid=OTHER_USER, extra=extra)
    try:
        assert as_other_user(lambda: metadata.set_metadata(fd, node))
        found = {name: os.getxattr(fd, name) for name in os.listxattr(fd) if "user." in name}
        assert found == {"user.new": b"1", "user.other": b"after"}
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o444
        assert os.fstat(fd).st_mtime_ns == MTIME_NS
    finally:
        os.close(fd)


def test_a_target_of_another_user_gets_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scene = ForeignTarget(tmp_path, {b"f": b"1"})
    scene.restore()
    assert f"belongs to user {OTHER_USER}" in caplog.text
    caplog.clear()
    os.chown(scene.target, 0, 0)
    scene.restore()
    assert "belongs to" not in caplog.text


def test_a_folder_is_private_only_without_write_permission_for_others(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    for mode, expected in ((0o700, True), (0o755, True), (0o775, False), (0o1777, False)):
        os.fchmod(fd, mode)
        assert staging.is_private(fd) is expected
    os.fchmod(fd, 0o755)
    os.chown(tmp_path, OTHER_USER, OTHER_USER)
    assert not staging.is_private(fd)
    os.close(fd)


def test_a_private_directory_of_a_restore_that_was_killed_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = ForeignTarget(tmp_path, {b"f": b""})
    monkeypatch.setattr(temporary_entries, "_is_abandoned", lambda fd, name: True)
    left = scene.target / ".casfs-restore-left"
    left.mkdir()
    os.mkfifo(left / ".casfs-restore-inside")
    scene.restore()
    assert os.listdir(scene.target) == ["f"]


def test_nested_folders_with_the_names_of_temporaries_do_not_end_a_restore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = ForeignTarget(tmp_path, {b"f": b""})
    monkeypatch.setattr(temporary_entries, "_is_abandoned", lambda fd, name: True)

    def nest() -> None:
        fd = scene.target_fd
        for _ in range(600):
            os.mkdir(".casfs-restore-left", dir_fd=fd)
            below = os.open(".casfs-restore-left", os.O_RDONLY, dir_fd=fd)
            if fd != scene.target_fd:
                os.close(fd)
            fd = below

    assert as_other_user(nest)
    assert scene.restore().files == 1
    # What a restore never leaves is not its to remove.
    assert sorted(os.listdir(scene.target)) == [".casfs-restore-left", "f"]


def test_an_exchanged_folder_for_new_entries_is_not_replaced_by_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target itself serves only where no file system records owners."""
    scene = ForeignTarget(tmp_path, {b"p": special(NodeType.FIFO)})

    def exchange() -> None:
        for name in os.listdir(scene.target_fd):
            os.rename(name, "taken", src_dir_fd=scene.target_fd, dst_dir_fd=scene.target_fd)
            os.mkdir(name, dir_fd=scene.target_fd)

    monkeypatch.setattr(os, "mkdir", after(os.mkdir, exchange))
    assert scene.restore().failed == 1
    assert not (scene.target / "p").exists()


@pytest.mark.parametrize("below", ["", "new/folder"])
def test_a_symlink_of_another_user_above_the_target_leads_to_no_folder_of_root(
    tmp_path: Path, below: str
) -> None:
    scene = ForeignTarget(tmp_path, {b"p": special(NodeType.FIFO)})
    assert as_other_user(lambda: os.symlink(scene.vault, "link", dir_fd=scene.target_fd))
    scene.target = scene.target / "link" / below
    with pytest.raises(OSError, match="a symbolic link of another user leads to a folder"):
        scene.restore(delete=True)
    assert scene.is_secret_untouched()


def test_a_symlink_of_another_user_leads_to_that_users_folder(tmp_path: Path) -> None:
    scene = ForeignTarget(tmp_path, {b"p": special(NodeType.FIFO)})
    own = scene.target / "own"
    own.mkdir()
    os.chown(own, OTHER_USER, OTHER_USER)
    assert as_other_user(lambda: os.symlink("own", "link", dir_fd=scene.target_fd))
    scene.target = scene.target / "link"
    assert scene.restore().failed == 0
    assert os.listdir(own) == ["p"]
