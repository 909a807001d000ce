"""The power fails at every durable step: what was published is there when the disk comes back.

The repository lies on a real ext4 or XFS, which the shutdown ioctl stops at once: what was not synced
by then is lost, with the log of the file system as it is on the disk (`cut off`), or written out once more
(`log flushed`). Then it is mounted again, which plays back its log. The disk itself is a file, so this
shows what is synced and in which order; it does not show a drive that lies about its cache.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.support.effort import EFFORT
from tests.support.loop_devices import LosableDisk, losable_disk
from tests.support.observation import LOST, Files, look_at_source
from tests.support.process_runner import KIB, Outcome, Scene, Stage, make_scene

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("kind", ["ext4", "xfs"]),
]
BOTH = pytest.mark.parametrize("power", ["cut off", "log flushed"])

# Where the log is flushed more is kept, never less; a short run takes every third step of it.
SHORT_STRIDE = 3


class PowerlessScene:
    """A repository on a disk, and the same one as it was at the beginning beside it."""

    def __init__(self, scene: Scene, disk: LosableDisk, power: str) -> None:
        self.scene = scene
        self._disk = disk
        self._power = power
        self._copy = scene.root.with_name("repository as it was")
        self._known: dict[str, Files] = {}
        self._times = 0

    def remember(self) -> None:
        shutil.copytree(self.scene.root, self._copy)
        self._known = dict(self.scene.published)

    def come_back(self) -> None:
        shutil.rmtree(self.scene.root)
        shutil.copytree(self._copy, self.scene.root)
        self.scene.published = dict(self._known)
        self._disk.write_back()

    def powerless_everywhere(self, verb: str, **arguments: object) -> Iterator[Outcome]:
        """Do a verb again and again, each time with the power failing at a later step, and at its end."""
        self.remember()
        stride = SHORT_STRIDE if self._power == "log flushed" and EFFORT == 1 else 1
        stop, ended = 0, False
        while not ended:
            self.come_back()
            what = "shutdown" if self._power == "cut off" else "shutdown with flush"
            fate = {"at": stop, "what": what, "disk": str(self._disk.at)}
            outcome = self.scene.act(verb, fate, **arguments)
            if outcome.was_killed:
                self._disk.unmount()
                self._disk.mount()
            else:
                ended = True
                outcome.done()
                self.lose_power()
            yield outcome
            stop += stride
        assert stop > 1

    def lose_power(self) -> None:
        self._disk.lose_power(flush_log=self._power == "log flushed")
        self._disk.unmount()
        self._disk.mount()

    def must_go_on(self, *maybe: Files) -> None:
        """Require that nothing is lost and, in a short run every second time, that work goes on."""
        scene = self.scene
        scene.must_be_intact(*maybe)
        self._times += 1
        if self._times % 2 and EFFORT == 1:
            return
        scene.back_up()
        scene.act("prune").done()
        scene.must_be_intact(*maybe)
        scene.must_be_tidy()


@pytest.fixture
def powerless(stage: Stage, kind: str, power: str) -> Iterator[PowerlessScene]:
    memory = Path("/dev/shm")
    with (
        TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder,
        losable_disk(Path(folder), kind) as disk,
    ):
        scene = make_scene(stage, disk.at)
        # The source is not what is at stake, and must not change.
        shutil.rmtree(scene.source)
        scene.source = Path(folder) / "source"
        scene.source.mkdir()
        yield PowerlessScene(scene, disk, power)


@BOTH
def test_a_power_loss_at_any_step_of_a_backup_loses_nothing_published(
    powerless: PowerlessScene,
) -> None:
    scene = powerless.scene
    scene.write("old", "old", 30 * KIB)
    scene.back_up()
    for number in range(6):
        scene.write(f"{number:02}", f"new {number}", 20 * KIB)
    new = look_at_source(scene.source)
    source = str(scene.source)
    reused = False
    for outcome in powerless.powerless_everywhere("backup", source=source):
        listed = scene.must_be_intact(new)
        if "done snapshots" in outcome.steps or not outcome.was_killed:
            assert len(listed) == 2, "it was reported as published, and is missing"
        finished = scene.packs()
        synced = outcome.steps[:-1] if outcome.was_killed else outcome.steps
        if "commit index" in synced:
            # The first pack was reported as durable; the next backup builds on it.
            assert len(finished) >= 2
            reported = scene.act("backup", source=source).done()
            assert reported["new_blobs"] < 6 + 4
            assert finished <= scene.packs()
            reused = True
        powerless.must_go_on(new)
    assert reused


@BOTH
def test_a_power_loss_at_any_step_of_a_prune_loses_nothing_published(
    powerless: PowerlessScene,
) -> None:
    scene = powerless.scene
    for number in range(4):
        scene.write(f"gone/{number}", f"gone {number}", 20 * KIB)
    first = scene.back_up()["id"]
    shutil.rmtree(scene.source / "gone")
    for number in range(4):
        scene.write(f"some/{number}", f"some {number}", 15 * KIB)
    second = scene.back_up()["id"]
    for number in (0, 2):
        (scene.source / f"some/{number}").unlink()
    scene.back_up()
    scene.act("forget", ids=[first, second]).done()
    del scene.published[first], scene.published[second]
    done: dict[str, int] = {}
    for outcome in powerless.powerless_everywhere("prune"):
        powerless.must_go_on()
        done = outcome.result
    assert done["removed_packs"] >= 2
    assert done["repacked_packs"] >= 1


@BOTH
def test_a_power_loss_does_not_undo_a_finished_forget(
    powerless: PowerlessScene,
) -> None:
    scene = powerless.scene
    ids = []
    for number in range(3):
        scene.write("file", f"version {number}")
        ids.append(scene.back_up()["id"])
    gone = frozenset(ids[:2])
    for outcome in powerless.powerless_everywhere("forget", ids=ids[:2]):
        listed = scene.must_be_intact(gone=gone)
        done = 2 if not outcome.was_killed else outcome.steps.count("done snapshots")
        assert len(listed & gone) <= 2 - done
        scene.act("forget", ids=sorted(listed & gone)).done()
        for name in gone:
            del scene.published[name]
        powerless.must_go_on()


@BOTH
def test_a_power_loss_during_a_tag_leaves_the_snapshot_once(
    powerless: PowerlessScene,
) -> None:
    scene = powerless.scene
    scene.write("file", "file")
    old = scene.back_up()["id"]
    shows = scene.published[old]
    for outcome in powerless.powerless_everywhere("tag", id=old, tags=["kept"]):
        (listed,) = scene.must_be_intact(shows, gone=frozenset([old]))
        assert outcome.was_killed or listed == outcome.result
        scene.published = {listed: shows}
        powerless.must_go_on(shows)


@pytest.mark.parametrize("power", ["cut off"])
def test_a_backup_without_syncs_would_lose_what_it_published(
    powerless: PowerlessScene,
) -> None:
    """The tests of this file prove something only if the disk loses unsynced data, as this test shows."""
    scene = powerless.scene
    scene.write("file", "file")
    scene.back_up()
    powerless.remember()
    powerless.come_back()
    scene.write("new", "new")
    published = scene.act("backup", source=str(scene.source), sync=False).done()["id"]
    powerless.lose_power()
    listed = scene.act("look").done()
    assert published not in listed or LOST in listed[published].values()
