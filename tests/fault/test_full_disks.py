"""A disk that is full: what a backup, a prune and a forget say, and that room is given back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.loop_devices import MIB, fresh_disk, require_disks
from tests.support.observation import look_at_source
from tests.support.process_runner import KIB, Scene, Stage, make_scene

pytestmark = pytest.mark.slow


@pytest.fixture
def small(stage: Stage, tmp_path: Path) -> Iterator[Scene]:
    """A repository on a disk of 48 MiB, with a source elsewhere."""
    require_disks()
    with fresh_disk(tmp_path, "ext4", 48 * MIB) as disk:
        scene = make_scene(stage, disk)
        shutil.rmtree(scene.source)
        scene.source = tmp_path / "source"
        scene.source.mkdir()
        yield scene


def fill(disk: Path, but_bytes: int = 0) -> Path:
    """Write until nothing more fits, then give so much back."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (MIB, 4 * KIB, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError as error:
                assert "No space left" in str(error)
        file.truncate(file.tell() - but_bytes)
        os.fsync(file.fileno())
    return ballast


def free_bytes(disk: Path) -> int:
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize


def grow(scene: Scene) -> None:
    """Publish a big snapshot and a small one, and forget the big one."""
    scene.write("big", "big", 10 * MIB)
    first = scene.back_up()["id"]
    (scene.source / "big").unlink()
    for number in range(4):
        scene.write(f"small/{number}", f"small {number}")
    scene.back_up()
    scene.act("forget", ids=[first]).done()
    del scene.published[first]


def test_a_backup_that_fills_the_disk_frees_all_its_unfinished_data(
    small: Scene,
) -> None:
    small.write("kept", "kept", 2 * MIB)
    small.back_up()
    small.write("too much", "too much", 60 * MIB)
    shows = look_at_source(small.source)
    source = str(small.source)
    outcome = small.act("backup", source=source)
    assert outcome.error is not None and outcome.error["exit"] == 1
    assert "No space left" in outcome.error["error"]
    assert small.names("tmp") == []
    # What was finished is whole; the full disk can still be read, and a prune makes room.
    small.must_be_intact(shows)
    small.act("prune").done()
    assert free_bytes(small.root) > 30 * MIB
    (small.source / "too much").unlink()
    small.back_up()
    small.must_be_intact()
    small.must_be_tidy()


@pytest.mark.parametrize("left_kib", [0, 64, 256])
def test_a_prune_on_a_full_disk_frees_room_or_reports_why_not_and_loses_nothing(
    small: Scene, left_kib: int
) -> None:
    grow(small)
    ballast = fill(small.root.parent, left_kib * KIB)
    outcome = small.act("prune", share=1.0)
    if outcome.error is not None:
        assert left_kib < 256, "so little room is enough"
        assert "No space left" in outcome.error["error"] or "MDB" in outcome.error["error"]
        small.must_be_intact()
        ballast.unlink()
        outcome = small.act("prune", share=1.0)
    assert outcome.done()["removed_packs"] >= 1
    small.must_be_intact()
    assert free_bytes(small.root) > 9 * MIB
    small.back_up()
    small.must_be_intact()
    small.must_be_tidy()


def test_a_prune_without_room_to_repack_removes_what_needs_no_room(small: Scene) -> None:
    grow(small)
    # Packs of which a part is needed: to free them takes room for that part.
    for number in range(60):
        small.write(f"parts/{number}", f"part {number}", 60 * KIB)
    second = small.back_up()["id"]
    for number in range(0, 60, 2):
        (small.source / f"parts/{number}").unlink()
    for number in range(1, 60, 2):
        os.truncate(small.source / f"parts/{number}", 60 * KIB)
    small.back_up()
    small.act("forget", ids=[second]).done()
    del small.published[second]
    fill(small.root.parent, 256 * KIB)
    before = free_bytes(small.root)
    outcome = small.act("prune", share=0.0)
    assert free_bytes(small.root) - before > 9 * MIB
    if outcome.error is not None:
        assert "No space left" in outcome.error["error"]
    small.must_be_intact()
    small.act("prune", share=0.0).done()
    small.must_be_intact()
    small.must_be_tidy()


def test_forget_removes_a_snapshot_on_a_completely_full_disk(small: Scene) -> None:
    grow(small)
    small.write("more", "more")
    gone = small.back_up()["id"]
    fill(small.root.parent)
    outcome = small.act("forget", ids=[gone])
    if outcome.error is None:
        del small.published[gone]
    else:
        assert "No space left" in outcome.error["error"]
    small.must_be_intact()
