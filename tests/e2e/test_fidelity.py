"""What survives a backup and a restore, and is shown by the mount: everything."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.conftest import Kept, forget
from tests.support.cli import Casfs
from tests.support.comparing import (
    Look,
    differences,
    extents,
    look_at,
    rsync_differences,
    stored_bytes,
    tree_differences,
)
from tests.support.full_tree import CROWD, bind
from tests.support.mounts import mounted

GIB = 1 << 30

# One worker makes the tree that holds everything.
pytestmark = pytest.mark.xdist_group("everything")


@pytest.fixture(scope="module")
def shown(everything_kept: Kept, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The everything tree as a mount of its snapshot shows it."""
    at = tmp_path_factory.mktemp("shown") / "mount"
    with mounted(everything_kept.casfs, "latest", at=at) as mount:
        yield everything_kept.below(mount)


@pytest.fixture(scope="module")
def restored(everything_kept: Kept, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The everything tree restored from its snapshot."""
    target = tmp_path_factory.mktemp("restored") / "target"
    everything_kept.casfs.run("restore", "latest", "--target", target)
    yield everything_kept.below(target)
    forget(target)


def test_the_full_tree_fixture_leaves_nothing_out(everything_kept: Kept) -> None:
    assert everything_kept.left_out == {}


@pytest.mark.fuse
def test_rsync_finds_no_difference_between_the_source_and_the_mount(
    everything_kept: Kept, shown: Path
) -> None:
    assert rsync_differences(everything_kept.source, shown) == ""


@pytest.mark.fuse
def test_the_mount_shows_every_attribute_to_the_nanosecond(
    everything_kept: Kept, shown: Path
) -> None:
    assert tree_differences(everything_kept.source, shown) == []


@pytest.mark.fuse
def test_cp_out_of_the_mount_equals_the_source(
    everything_kept: Kept, shown: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-a", str(shown), str(copy)], check=True)
    try:
        assert rsync_differences(everything_kept.source, copy) == ""
        assert tree_differences(everything_kept.source, copy) == []
    finally:
        forget(copy)


@pytest.mark.fuse
def test_rsync_out_of_the_mount_equals_the_source(
    everything_kept: Kept, shown: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    subprocess.run(
        # -1: compare nanoseconds, so that a copy made within the second of its source gets them too.
        ["rsync", "-aHAX", "--modify-window=-1", "--exclude=/crowd", f"{shown}/", f"{copy}/"],
        check=True,
        capture_output=True,
    )
    try:
        expected = look_at(everything_kept.source)
        expected = {path: e for path, e in expected.items() if not path.startswith(b"crowd")}
        assert differences(expected, look_at(copy)) == []
    finally:
        forget(copy)


def test_rsync_finds_no_difference_between_the_source_and_a_restore(
    everything_kept: Kept, restored: Path
) -> None:
    assert rsync_differences(everything_kept.source, restored) == ""


def test_a_restore_keeps_every_attribute_to_the_nanosecond(
    everything_kept: Kept, restored: Path
) -> None:
    assert tree_differences(everything_kept.source, restored) == []


def test_holes_are_holes_again_after_a_restore(everything_kept: Kept, restored: Path) -> None:
    for name in sorted(os.listdir(everything_kept.source / "sparse")):
        original, copy = everything_kept.source / "sparse" / name, restored / "sparse" / name
        assert extents(copy) == extents(original), name
        assert stored_bytes(copy) <= stored_bytes(original) + 65536, name


def test_file_capabilities_are_those_of_the_source_after_a_restore(
    everything_kept: Kept, restored: Path
) -> None:
    def capabilities(root: Path) -> bytes:
        return subprocess.run(
            ["getcap", "-r", "."], cwd=root / "capabilities", check=True, capture_output=True
        ).stdout

    assert capabilities(everything_kept.source).count(b"cap_net") >= 2
    assert capabilities(restored) == capabilities(everything_kept.source)


def test_a_dump_as_tar_extracts_to_everything(everything_kept: Kept, tmp_path: Path) -> None:
    """But for sockets, which a tar stream cannot hold."""
    target = tmp_path / "target"
    target.mkdir()
    archive = tmp_path / "dump.tar"
    archive.write_bytes(everything_kept.casfs.run("dump", f"latest:/{everything_kept.inside}").out)
    subprocess.run(
        ["tar", "-x", "-p", "--numeric-owner", "--same-owner", "-f", archive, "-C", target],
        check=True,
        capture_output=True,
    )
    try:
        expected = plain(look_at(everything_kept.source))
        assert differences(expected, plain(look_at(target))) == []
    finally:
        forget(target)
        archive.unlink()


def plain(looks: dict[bytes, Look]) -> dict[bytes, Look]:
    """Keep what every tar keeps: no sockets, no attributes, and the top's own entry not at all."""
    sockets = {path for path, look in looks.items() if stat.S_ISSOCK(look.kind)}
    return {
        path: replace(look, attributes=(), links=0)
        for path, look in looks.items()
        if path and path not in sockets
    }


@pytest.mark.fuse
def test_getfattr_getfacl_and_getcap_agree_on_the_mount_and_the_source(
    everything_kept: Kept, shown: Path
) -> None:
    for folder, command in (
        ("attributes", ["getfattr", "-Rhd", "-m", "-", "-e", "hex", "."]),
        ("access lists", ["getfacl", "-Rpn", "."]),
        ("capabilities", ["getcap", "ping", "owned by a stranger"]),
    ):
        printed = [
            subprocess.run(command, cwd=root / folder, check=True, capture_output=True).stdout
            for root in (everything_kept.source, shown)
        ]
        assert printed[0].strip(), command
        assert sorted(printed[0].split(b"\n\n")) == sorted(printed[1].split(b"\n\n")), command


@pytest.mark.fuse
def test_hard_links_are_one_inode_with_the_right_count_in_the_mount(shown: Path) -> None:
    for names in (
        ("first", "second", "other directory/third"),
        ("big first", "other directory/big second"),
        ("empty first", "empty second"),
        ("symlink first", "other directory/symlink second"),
        ("fifo first", "other directory/fifo second"),
    ):
        states = [os.lstat(shown / "hard links" / name) for name in names]
        assert len({(state.st_dev, state.st_ino) for state in states}) == 1, names
        assert {state.st_nlink for state in states} == {len(names)}, names
    twin = os.lstat(shown / "hard links" / "twin")
    assert twin.st_ino != os.lstat(shown / "hard links" / "first").st_ino
    assert twin.st_nlink == 1


@pytest.mark.fuse
def test_no_two_files_of_a_mount_share_an_inode_number_unless_they_are_links(shown: Path) -> None:
    seen: dict[int, tuple[str, int]] = {}
    for folder, directories, files in os.walk(shown):
        for name in directories + files:
            path = os.path.join(folder, name)
            state = os.lstat(path)
            if state.st_nlink > 1 and not stat.S_ISDIR(state.st_mode):
                continue
            other = seen.setdefault(state.st_ino, (path, state.st_dev))
            assert other[0] == path, f"{path!r} and {other[0]!r} are both {state.st_ino}"


@pytest.mark.fuse
def test_a_directory_of_many_entries_is_listed_whole_and_once(shown: Path) -> None:
    listed = os.listdir(shown / "crowd")
    assert len(listed) == len(set(listed)) == CROWD


@pytest.mark.fuse
def test_the_holes_of_a_file_take_no_room_in_the_mount(shown: Path) -> None:
    assert stored_bytes(shown / "sparse" / "wholly a hole") <= 1 << 20
    assert stored_bytes(shown / "sparse" / "several holes") <= 8 << 20


@pytest.mark.fuse
def test_a_large_file_of_the_mount_reads_correctly_at_any_offset(
    everything_kept: Kept, shown: Path
) -> None:
    original = (everything_kept.source / "contents" / "random-several").read_bytes()
    handle = os.open(shown / "contents" / "random-several", os.O_RDONLY)
    try:
        for offset in (0, 1, 4095, 131071, 1 << 20, (9 << 20) - 3, len(original) - 1):
            for length in (1, 4097, 200_000, 2 << 20):
                assert os.pread(handle, length, offset) == original[offset : offset + length]
        assert os.pread(handle, 10, len(original)) == b""
    finally:
        os.close(handle)


@pytest.mark.fuse
def test_the_mount_refuses_every_change(shown: Path) -> None:
    file, folder = shown / "contents" / "random-1", shown / "contents"
    attempts: list[Callable[[], object]] = [
        partial(file.write_bytes, b"x"),
        partial((folder / "new").touch),
        partial(file.unlink),
        partial((shown / "new").mkdir),
        partial(folder.rename, shown / "elsewhere"),
        partial(os.chmod, folder, 0o700),
        partial(os.utime, folder),
        partial(os.setxattr, folder, "user.x", b"y"),
    ]
    for attempt in attempts:
        with pytest.raises(OSError, match="Read-only file system"):
            attempt()


def test_the_listing_shows_the_numbers_of_lstat(everything_kept: Kept) -> None:
    nodes = everything_kept.casfs.json("ls", f"latest:/{everything_kept.inside}/times").objects
    entries = [node for node in nodes if node["type"] == "node"]
    by_name = {os.path.basename(os.fsencode(node["path"])): node for node in entries}
    for name in os.listdir(os.fsencode(everything_kept.source / "times")):
        state = os.lstat(os.fsencode(everything_kept.source / "times") + b"/" + name)
        node = by_name[name]
        assert node["mtime_ns"] == state.st_mtime_ns, name
        assert (node["uid"], node["gid"]) == (state.st_uid, state.st_gid), name
        assert stat.S_IMODE(node["mode"]) == stat.S_IMODE(state.st_mode), name


def test_a_hard_link_whose_other_name_is_not_backed_up_is_restored_as_a_file(
    repository: Casfs, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "outside").write_bytes(b"two names, one inside")
    os.link(tmp_path / "outside", source / "inside")
    repository.backup("source", cwd=tmp_path)
    repository.run("restore", "latest", "--target", tmp_path / "target")
    assert (tmp_path / "target/source/inside").read_bytes() == b"two names, one inside"
    assert (tmp_path / "target/source/inside").stat().st_nlink == 1


def test_paths_longer_than_the_system_allows_in_one_call_survive(
    repository: Casfs, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    _dig(source, levels=60, content=b"deeper than PATH_MAX")
    repository.backup("source", cwd=tmp_path)
    repository.run("restore", "latest", "--target", tmp_path / "target")
    try:
        assert _dug_up(tmp_path / "target/source", levels=60) == b"deeper than PATH_MAX"
    finally:
        for tree in (source, tmp_path / "target"):
            subprocess.run(["rm", "-rf", str(tree)], check=True)


_LONG = "a directory with a name of which sixty are longer than a path may be, " + "x" * 40


def _dig(top: Path, levels: int, content: bytes) -> None:
    handle = os.open(top, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir(_LONG, dir_fd=handle)
        below = os.open(_LONG, os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = below
    file = os.open("bottom", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=handle)
    os.write(file, content)
    os.close(file)
    os.close(handle)


def _dug_up(top: Path, levels: int) -> bytes:
    handle = os.open(top, os.O_RDONLY)
    try:
        for _ in range(levels):
            below = os.open(_LONG, os.O_RDONLY, dir_fd=handle)
            os.close(handle)
            handle = below
        file = os.open("bottom", os.O_RDONLY, dir_fd=handle)
        try:
            return os.read(file, 1000)
        finally:
            os.close(file)
    finally:
        os.close(handle)


@pytest.mark.slow
@pytest.mark.fuse
def test_a_file_of_twenty_gigabytes_of_holes_stays_one(repository: Casfs, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with (source / "disk image").open("wb") as file:
        file.truncate(20 * GIB)
        for offset in (0, 7 * GIB, 20 * GIB - 4096):
            file.seek(offset)
            file.write(b"island" * 600)
        file.flush()
        os.fsync(file.fileno())
    snapshot = repository.backup("source", cwd=tmp_path)
    assert snapshot["new_bytes"] < 1 << 20
    repository.run("restore", "latest", "--target", tmp_path / "target")
    copy = tmp_path / "target/source/disk image"
    assert copy.stat().st_size == 20 * GIB
    assert stored_bytes(copy) <= stored_bytes(source / "disk image") + 65536
    assert extents(copy) == extents(source / "disk image")
    with mounted(repository, "latest", at=tmp_path / "mount") as mount:
        handle = os.open(mount / "source/disk image", os.O_RDONLY)
        try:
            for offset in (0, 7 * GIB, 20 * GIB - 4096):
                assert os.pread(handle, 3600, offset) == b"island" * 600
                assert os.pread(handle, 100, max(0, offset - 50)).strip(b"\0")
            assert os.pread(handle, 1 << 20, 3 * GIB) == bytes(1 << 20)
        finally:
            os.close(handle)


@pytest.mark.fuse
def test_a_socket_in_the_source_stays_usable_after_a_backup(
    repository: Casfs, source: Path
) -> None:
    """A backup neither connects to a socket nor opens a FIFO, where it would wait for ever."""
    os.mkfifo(source / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        bind(listener, source, "socket")
        listener.listen(1)
        listener.settimeout(0)
        repository.backup(source)
        with pytest.raises(BlockingIOError):
            listener.accept()
    kinds = {node["kind"] for node in repository.json("ls", "latest").of_type("node")}
    assert {"fifo", "socket"} <= kinds
