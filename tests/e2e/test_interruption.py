"""Commands interrupted at any time leave the repository intact and keep finished work."""

from __future__ import annotations

import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from casfs.format.pack import PACK_PREFIXES
from tests.e2e.conftest import forget
from tests.support.cli import Casfs, finish, interrupt
from tests.support.comparing import tree_differences
from tests.support.mounts import is_mounted, unmount_by_force
from tests.support.processes import children_of, has_ended
from tests.support.stored_objects import StoredObject, StoredObjects
from tests.support.waiting import wait_until

MIB = 1 << 20
SIZE = 384 * MIB

# One worker makes the big source, and the disk has to do with one of these tests at a time.
pytestmark = pytest.mark.xdist_group("interruption")


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Some hundred megabytes that do not shrink: several packs."""
    source = tmp_path_factory.mktemp("heavy") / "source"
    source.mkdir()
    dice = random.Random(1954)
    for number in range(SIZE // (16 * MIB)):
        (source / f"part{number:02d}").write_bytes(dice.randbytes(16 * MIB))
    yield source
    forget(source.parent)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """A place to restore to, emptied at once: pytest would keep it for three runs."""
    yield tmp_path / "target"
    if (tmp_path / "target").exists():
        forget(tmp_path / "target")


@pytest.fixture
def roomy(repository: Casfs) -> Iterator[Casfs]:
    """A repository that grows big and does not stay after the test."""
    yield repository
    if repository.repository is not None:
        forget(repository.repository)
    else:
        objects = StoredObjects(repository)
        for pack in objects.packs():
            objects.delete(pack.name)


def finished_packs(casfs: Casfs) -> list[StoredObject]:
    return StoredObjects(casfs).packs()


def wait_while_running(
    process: subprocess.Popen[bytes], condition: Callable[[], bool], what: str
) -> None:
    def reached() -> bool:
        assert process.poll() is None, f"it ended before: {what}"
        return condition()

    wait_until(reached, what, every=0.001)


def assert_intact(casfs: Casfs, snapshots: int) -> None:
    """The repository needs no repair, nothing published is lost and nothing half is published."""
    assert len(casfs.json("snapshots").of_type("snapshot")) == snapshots
    summary = casfs.json("check", "--read-data").one("summary")
    assert summary["ok"] is True


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name
)
def test_a_backup_stopped_in_the_middle_leaves_finished_packs_for_the_next(
    roomy: Casfs, heavy: Path, source: Path, how: signal.Signals
) -> None:
    roomy.backup(source)
    before = len(finished_packs(roomy))
    process = roomy.start("backup", heavy)
    wait_while_running(process, lambda: len(finished_packs(roomy)) >= before + 2, "two new packs")
    if how is signal.SIGINT:
        interrupt(process)
    else:
        process.send_signal(how)
    result = finish(process)
    if how is signal.SIGINT:
        assert result.exit == 130, result
        assert len(result.complaints) == 1, result
    else:
        assert result.exit != 0, result
    kept = StoredObjects(roomy).stored_bytes()
    assert kept > 64 * MIB
    assert_intact(roomy, snapshots=1)
    again = roomy.backup(heavy)
    # Everything that had been finished is used again; the slack is trees and pack directories.
    assert again["new_bytes"] <= SIZE - kept + 4 * MIB
    assert_intact(roomy, snapshots=2)
    assert StoredObjects(roomy).below("tmp") == []


def test_an_interrupted_backup_prints_a_json_error(roomy: Casfs, heavy: Path) -> None:
    process = roomy.start("backup", "--json", heavy)
    wait_while_running(process, lambda: len(finished_packs(roomy)) >= 1, "a pack")
    interrupt(process)
    result = finish(process)
    assert result.exit == 130, result
    assert result.one("error")["exit"] == 130
    assert result.of_type("snapshot") == []


def test_ctrl_c_at_the_very_beginning_of_a_backup_leaves_an_intact_repository(
    roomy: Casfs, heavy: Path
) -> None:
    """As soon as anything of the backup can be seen in the repository."""
    objects = StoredObjects(roomy)

    def seen() -> set[str]:
        return {one.name for one in objects.below("locks", "presence", "tmp", *PACK_PREFIXES)}

    before = seen()
    process = roomy.start("backup", heavy)
    wait_while_running(process, lambda: bool(seen() - before), "a lock or a temporary file")
    interrupt(process)
    assert finish(process).exit == 130
    assert_intact(roomy, snapshots=0)


def test_a_second_ctrl_c_does_not_bring_a_traceback(roomy: Casfs, heavy: Path) -> None:
    process = roomy.start("backup", heavy)
    wait_while_running(process, lambda: len(finished_packs(roomy)) >= 1, "a pack")
    interrupt(process)
    interrupt(process)
    interrupt(process)
    assert finish(process).exit in (130, -signal.SIGINT)
    assert_intact(roomy, snapshots=0)


def test_an_interrupted_restore_leaves_whole_files_only_and_can_be_finished(
    roomy: Casfs, heavy: Path, target: Path
) -> None:
    roomy.backup(heavy)
    process = roomy.start("restore", "latest", "--target", target)
    place = target / str(heavy).lstrip("/")

    def present() -> list[Path]:
        return list(place.glob("part*")) if place.is_dir() else []

    wait_while_running(process, lambda: len(present()) >= 2, "two restored files")
    interrupt(process)
    result = finish(process)
    assert result.exit == 130, result
    assert 2 <= len(present()) < SIZE // (16 * MIB)
    for file in present():
        assert file.read_bytes() == (heavy / file.name).read_bytes(), file.name
    roomy.run("restore", "latest", "--target", target)
    assert tree_differences(heavy, place) == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_a_restore_of_many_files_ends_with_its_processes_and_leaves_whole_files_only(
    repository: Casfs, tmp_path: Path, target: Path, how: signal.Signals
) -> None:
    source = tmp_path / "many"
    for number in range(6000):
        folder = source / f"{number // 500:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:04d}").write_bytes(b"%d " % number * 300)
    repository.backup(source)
    place = target / str(source).lstrip("/")
    process = repository.start("restore", "latest", "--target", target)
    wait_while_running(process, (place / "04").is_dir, "four restored folders")
    children = children_of(process.pid)
    process.send_signal(how)
    assert finish(process).exit == (130 if how == signal.SIGINT else -how)
    wait_until(lambda: all(map(has_ended, children)), "the end of the restore's processes")
    files = [path for path in place.rglob("*") if path.is_file()]
    named = [path for path in files if not path.name.startswith(".casfs-restore-")]
    assert how == signal.SIGKILL or named == files
    assert 0 < len(named) < 6000
    for path in named:
        assert path.read_bytes() == (source / path.relative_to(place)).read_bytes(), path
    repository.run("restore", "latest", "--target", target, "--delete")
    assert tree_differences(source, place) == []


def test_an_interrupted_check_exits_with_130(roomy: Casfs, heavy: Path) -> None:
    roomy.backup(heavy)
    process = roomy.start("check", "--read-data")
    wait_while_running(
        process,
        lambda: _has_open(process.pid, "packs/"),
        "a pack is being read",
    )
    interrupt(process)
    assert finish(process).exit == 130
    assert_intact(roomy, snapshots=1)


def _has_open(pid: int, part: str) -> bool:
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
        return any(part in str(descriptor.readlink()) for descriptor in descriptors)
    except OSError:  # it was closed while we looked
        return False


@pytest.mark.fuse
def test_ctrl_c_ends_a_mount_in_the_foreground_and_unmounts_it(
    repository: Casfs, source: Path, tmp_path: Path
) -> None:
    repository.backup(source)
    at = tmp_path / "mount"
    at.mkdir()
    process = repository.start("mount", "--foreground", "latest", at)
    try:
        wait_until(lambda: is_mounted(at), "the mount")
        assert process.poll() is None
        interrupt(process)
        result = finish(process)
        assert result.exit in (0, 130), result
        assert not is_mounted(at)
    finally:
        unmount_by_force(at)
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.mark.fuse
def test_a_killed_mount_can_be_unmounted_and_mounted_again(
    repository: Casfs, source: Path, tmp_path: Path
) -> None:
    repository.backup(source)
    at = tmp_path / "mount"
    at.mkdir()
    process = repository.start("mount", "--foreground", "latest", at)
    try:
        wait_until(lambda: is_mounted(at), "the mount")
        process.kill()
        process.communicate(timeout=30)
        repository.run("umount", at)
        assert not is_mounted(at)
        repository.run("mount", "latest", at)
        assert (at / str(source).lstrip("/") / "readme.txt").read_bytes() == b"read me\n"
        repository.run("umount", at)
    finally:
        unmount_by_force(at)
