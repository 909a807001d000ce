"""Every command is killed at each of its durable steps, and the repository is checked afterwards.

An undisturbed run lists the steps, so a new step is covered without a change here. `on_step` is called
before each step and after the last, so these kills happen between any two steps.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from casfs.digest import digest_of
from casfs.format.versions import NEWEST_FORMAT, OLDEST_FORMAT
from casfs.repository.creation import create_repository
from casfs.repository.opening import OpenOptions, open_for_reading, open_for_writing
from casfs.repository.place import read_config
from casfs.restore.temporary_entries import TEMPORARY_PREFIX
from casfs.storage.locks import RepositoryLock
from tests.support.observation import FLAGGED, LOST, Files, look_at_source
from tests.support.process_runner import KIB, Outcome, Scene, come_back, kept_as_it_is
from tests.support.stores import flip, pack_paths

NO_SYNC: dict[str, Any] = {"sync": False}
UPGRADED = ("folder config", "done config")
LAST = ("folder snapshots", "done snapshots")
NEW_FOLDER = ("folder packs", "done packs", "folder meta", "done meta")


def killed_everywhere(scene: Scene, verb: str, **arguments: Any) -> Iterator[tuple[int, Outcome]]:
    """Do a verb once in peace, then kill it at one step after the other until it has no more."""
    with kept_as_it_is(scene.root) as copy:
        whole = scene.act(verb, **arguments)
        whole.done()
        assert whole.steps, f"{verb} has no steps: then nothing is shown here"
        stop = 0
        while (outcome := _killed(scene, copy, verb, stop, arguments)).was_killed:
            assert len(outcome.steps) == stop + 1
            yield stop, outcome
            stop += 1
        outcome.done()
        # A pack with another name may need a folder more, or one less; all else is the same.
        assert [step for step in outcome.steps if step not in NEW_FOLDER] == [
            step for step in whole.steps if step not in NEW_FOLDER
        ]


def _killed(scene: Scene, copy: Path, verb: str, stop: int, arguments: dict[str, Any]) -> Outcome:
    come_back(copy, scene.root)
    return scene.act(verb, {"at": stop}, **arguments)


def goes_on(scene: Scene, *maybe: Files) -> None:
    """Require that the next backup and the next prune work, and leave nothing but what is needed."""
    scene.back_up(**NO_SYNC)
    scene.must_be_intact(*maybe)
    scene.act("prune", **NO_SYNC).done()
    again = scene.act("prune", **NO_SYNC).done()
    assert (again["removed_packs"], again["repacked_packs"], again["waiting_packs"]) == (0, 0, 0)
    scene.must_be_intact(*maybe)
    scene.must_be_tidy()


class TestBackup:
    def test_a_backup_killed_at_any_step_loses_nothing_and_its_finished_packs_are_reused(
        self, scene: Scene
    ) -> None:
        scene.write("old", "old", 30 * KIB)
        scene.back_up()
        for number in range(12):
            scene.write(f"{number:02}", f"new {number}")
        texts = [b"the text of file %d\n" % number * 50 for number in range(5)]
        for number, text in enumerate(texts):
            (scene.source / f"text {number}").write_bytes(text)
        new = look_at_source(scene.source)
        known = dict(scene.published)
        stored_again: list[int] = []
        source = str(scene.source)
        for _, outcome in killed_everywhere(scene, "backup", source=source, **NO_SYNC):
            listed = scene.must_be_intact(new)
            # The file has its name from the step on that follows the renaming.
            assert (len(listed) == 2) == (outcome.steps[-1] in LAST)
            finished = scene.packs()
            assert len(finished) >= outcome.steps.count("rename packs")
            reported = scene.act("backup", source=source, **NO_SYNC).done()
            assert finished <= scene.packs()
            assert scene.must_be_intact(new) == listed | {reported["id"]}
            # Trees do not count: those above the source change when another process writes there.
            stored_again.append(reported["new_bytes"] // (12 * KIB))
            goes_on(scene, new)
            scene.published = dict(known)
        assert stored_again == sorted(stored_again, reverse=True)
        with open_for_reading(scene.root) as repository:
            assert repository.store.locate(digest_of(texts[0])).is_grouped
        assert stored_again[0] == 12
        assert stored_again[-1] == 0

    @pytest.mark.parametrize("scene", [OLDEST_FORMAT, NEWEST_FORMAT], indirect=True)
    def test_a_first_backup_killed_at_any_step_leaves_a_valid_empty_repository(
        self, scene: Scene
    ) -> None:
        scene.write("file", "file")
        shows = look_at_source(scene.source)
        source = str(scene.source)
        for _ in killed_everywhere(scene, "backup", source=source, **NO_SYNC):
            scene.must_be_intact(shows)
            goes_on(scene, shows)
            scene.published = {}


class TestUpgrade:
    def test_an_upgrade_killed_at_any_step_leaves_the_old_or_the_new_format(
        self, scene: Scene
    ) -> None:
        shutil.rmtree(scene.root)
        create_repository(scene.root, format_=OLDEST_FORMAT)
        scene.write("file", "file")
        scene.back_up()
        known = dict(scene.published)
        formats = []
        for _, outcome in killed_everywhere(scene, "upgrade"):
            formats.append(read_config(scene.root).format)
            assert (formats[-1] == NEWEST_FORMAT) == (outcome.steps[-1] in UPGRADED)
            scene.must_be_intact()
            assert scene.act("upgrade").done()["new"] == NEWEST_FORMAT
            scene.write("file", "changed")
            goes_on(scene)
            scene.write("file", "file")
            scene.published = dict(known)
        assert set(formats) == {OLDEST_FORMAT, NEWEST_FORMAT}


class TestPrune:
    @pytest.fixture
    def grown(self, scene: Scene) -> Scene:
        """A repository with fully, partly and not needed packs, and with packs pending removal."""
        for number in range(10):
            scene.write(f"gone/{number}", f"gone {number}")
        first = scene.back_up()["id"]
        for number in range(10):
            (scene.source / "gone" / str(number)).unlink()
            scene.write(f"some/{number}", f"some {number}")
        second = scene.back_up()["id"]
        for number in range(0, 10, 2):
            (scene.source / "some" / str(number)).unlink()
        scene.write("last", "last", 40 * KIB)
        scene.back_up()
        scene.act("forget", ids=[first]).done()
        # A prune that had to wait for a backup leaves packs pending removal.
        with RepositoryLock.acquire(scene.root / "locks", "backup"):
            waiting = scene.act("prune", share=1.0).done()
        assert waiting["waiting_packs"] >= 1
        assert waiting["removed_packs"] == 0
        scene.act("forget", ids=[second]).done()
        del scene.published[first], scene.published[second]
        return scene

    def test_a_prune_killed_at_any_step_loses_nothing_and_the_next_one_completes_it(
        self, grown: Scene
    ) -> None:
        known = dict(grown.published)
        steps: list[str] = []
        for _, outcome in killed_everywhere(grown, "prune", **NO_SYNC):
            steps = outcome.steps
            grown.must_be_intact()
            goes_on(grown)
            grown.published = dict(known)
        # The prune had pending and unneeded packs to remove, and others to repack.
        assert steps.count("unlink packs") >= 4
        assert steps.count("rename packs") >= 1

    def test_a_prune_right_after_a_killed_prune_completes_it(self, grown: Scene) -> None:
        for _ in killed_everywhere(grown, "prune", **NO_SYNC):
            grown.act("prune", **NO_SYNC).done()
            grown.must_be_intact()
            grown.must_be_tidy()

    def test_a_prune_killed_twice_in_a_row_loses_nothing(self, grown: Scene) -> None:
        known = dict(grown.published)
        for stop, _ in killed_everywhere(grown, "prune", **NO_SYNC):
            if stop % 5 == 0:
                source = str(grown.source)
                outcome = grown.act("prune", {"at": stop // 2}, **NO_SYNC)
                assert outcome.was_killed or outcome.error is None
                grown.act("backup", {"at": stop // 3}, source=source, **NO_SYNC)
                grown.must_be_intact(look_at_source(grown.source))
                goes_on(grown, look_at_source(grown.source))
                grown.published = dict(known)

    @pytest.mark.parametrize("index", ["as it was left", "missing"])
    def test_a_prune_killed_during_a_removal_leaves_packs_that_are_never_trusted_again(
        self, grown: Scene, index: str
    ) -> None:
        """A backup that runs beside the next command looks into the index between any two commits."""
        with open_for_reading(grown.root) as repository:
            condemned = repository.store.index.marked_for_removal()
            blobs = [
                digest.hex()
                for digest, location in repository.store.index.blobs()
                if location.pack in condemned
            ]
        assert blobs
        with kept_as_it_is(grown.root) as copy:
            steps = grown.act("prune", **NO_SYNC).steps
            come_back(copy, grown.root)
        assert grown.act("prune", {"at": steps.index("unlink packs")}, **NO_SYNC).was_killed
        trusted: list[bool] = []

        def look(step: str) -> None:
            if step == "done index":
                trusted.extend(grown.act("trusts", blobs=blobs).done())

        if index == "missing":
            for path in (grown.root / "index").iterdir():
                path.unlink()
        with open_for_writing(grown.root, "backup", OpenOptions(sync=False, on_step=look)):
            pass
        assert trusted
        assert not any(trusted)


class TestForget:
    def test_a_forget_killed_at_any_step_removes_only_chosen_snapshots(self, scene: Scene) -> None:
        ids = []
        for number in range(4):
            scene.write("file", f"version {number}")
            ids.append(scene.back_up()["id"])
        known = dict(scene.published)
        gone = frozenset(ids[:3])
        for _, outcome in killed_everywhere(scene, "forget", ids=ids[:3], **NO_SYNC):
            listed = scene.must_be_intact(gone=gone)
            assert len(gone & listed) >= 3 - outcome.steps.count("folder snapshots")
            assert len(gone & listed) <= 3 - outcome.steps.count("done snapshots")
            scene.act("forget", ids=sorted(gone & listed), **NO_SYNC).done()
            scene.published = {ids[3]: known[ids[3]]}
            goes_on(scene)
            scene.published = dict(known)


class TestTag:
    def test_a_tag_killed_at_any_step_leaves_the_snapshot_once_with_old_or_new_tags(
        self, scene: Scene
    ) -> None:
        scene.write("file", "file")
        old = scene.back_up()["id"]
        shows = scene.published[old]
        for _ in killed_everywhere(scene, "tag", id=old, tags=["kept"], **NO_SYNC):
            (listed,) = scene.must_be_intact(shows, gone=frozenset([old]))
            scene.act("tag", id="latest", tags=["kept", "twice"], **NO_SYNC).done()
            (listed,) = scene.must_be_intact(shows, gone=frozenset([old]))
            scene.published = {listed: shows}
            goes_on(scene)
            scene.published = {old: shows}


class TestRepairIndex:
    @pytest.mark.parametrize("index", ["sound", "missing"])
    def test_a_repair_of_the_index_killed_at_any_step_loses_nothing(
        self, scene: Scene, index: str
    ) -> None:
        for number in range(8):
            scene.write(f"{number}", f"{number}")
        scene.back_up()
        if index == "missing":
            for path in (scene.root / "index").iterdir():
                path.unlink()
        known = dict(scene.published)
        for _ in killed_everywhere(scene, "repair_index", **NO_SYNC):
            scene.must_be_intact()
            scene.act("repair_index", **NO_SYNC).done()
            goes_on(scene)
            scene.published = dict(known)


class TestRepairSnapshots:
    def test_a_repair_of_snapshots_killed_at_any_step_keeps_intact_ones_and_can_be_repeated(
        self, scene: Scene
    ) -> None:
        for number in range(10):
            scene.write(f"old/{number}", f"old {number}")
        scene.write("old/big", "big", 900 * KIB)
        first = scene.back_up()["id"]
        before = set(pack_paths(scene.root))
        for path in (scene.source / "old").iterdir():
            path.unlink()
        scene.write("new", "new")
        second = scene.back_up()["id"]
        assert set(pack_paths(scene.root)) > before
        for path in sorted(before):
            if path.stat().st_size < 200 * KIB:
                flip(path, path.stat().st_size // 3)
        assert scene.act("check").done() != []
        with kept_as_it_is(scene.root) as copy:
            scene.act("repair_snapshots", **NO_SYNC).done()
            repaired = scene.act("look").done()
            come_back(copy, scene.root)
        assert second in repaired and first not in repaired
        (new,) = (files for name, files in repaired.items() if name != second)
        damaged = scene.act("look").done()[first]
        assert LOST in damaged.values()
        for path, found in new.items():
            assert found == scene.published[first][path] or found.startswith(FLAGGED)
        for _ in killed_everywhere(scene, "repair_snapshots", **NO_SYNC):
            listed = scene.act("look").done()
            assert listed.pop(second) == scene.published[second]
            (there,) = listed.values()
            assert there in (damaged, new)
            scene.act("repair_snapshots", **NO_SYNC).done()
            assert new in scene.act("look").done().values()
            assert [d for d in scene.act("check").done() if d["snapshot"] is not None] == []
            # No snapshot needs what was given up, so a prune removes it.
            scene.act("prune", share=0.0, **NO_SYNC).done()
            assert scene.act("check").done() == []
            assert new in scene.act("look").done().values()


class TestRestore:
    def test_a_restore_killed_at_any_entry_leaves_only_whole_files_and_can_be_repeated(
        self, scene: Scene, tmp_path: Path
    ) -> None:
        for number in range(6):
            scene.write(f"folder {number % 2}/{number}", f"{number}", 100 * KIB)
        shows = scene.published[scene.back_up()["id"]]

        def found_in(target: Path) -> dict[str, str]:
            found = look_at_source(target)
            start = str(target).lstrip("/") + "/"
            return {
                path.removeprefix(start): what
                for path, what in found.items()
                if path.startswith(start)
            }

        entries = len(scene.act("restore", target=str(tmp_path / "whole")).steps)
        assert entries >= 6
        assert found_in(tmp_path / "whole") == shows
        for stop in range(entries):
            target = tmp_path / f"{stop}"
            outcome = scene.act("restore", {"at": stop}, target=str(target))
            assert outcome.was_killed
            left = found_in(target)
            # What was being written keeps its temporary name.
            unnamed = {path for path in left if b"/" + TEMPORARY_PREFIX in path.encode()}
            assert len(unnamed) <= 2, "one in each of the two threads that write"
            assert {path: left[path] for path in left.keys() - unnamed}.items() <= shows.items()
            scene.act("restore", target=str(target), delete=True).done()
            assert found_in(target) == shows
        scene.must_be_intact()
