"""Any sequence of backups, edits, upkeep, crashes, damage and repairs, against a model of what is kept.

The model is what every snapshot must show, known from the source at its backup, and which of its
files could be read last. Nothing may ever be shown as anything else; what could be read can be
read after every verb, whether it was killed, refused or done; and without damage that is everything. A
failure shrinks to the few steps that it takes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from tests.support.effort import EFFORT
from tests.support.observation import FLAGGED, LOST, Files, look_at_source
from tests.support.process_runner import KIB, Outcome, Scene, Stage, make_scene
from tests.support.stores import flip, pack_paths

NAMES = st.sampled_from(["a", "b", "c", "folder/d", "folder/e", "folder/below/f"])
LABELS = st.integers(0, 9)
SIZES = st.sampled_from([0, 100, 12 * KIB, 70 * KIB, 600 * KIB])
CHOICES = st.integers(0, 1 << 16)
SHARES = st.sampled_from([0.0, 0.25, 1.0])
STEPS = st.none() | st.integers(0, 60)
"""At which of its durable steps a verb is killed, if it has that many."""

Right = set[tuple[str, str]]
"""What could be read and was as it had been: (snapshot, path)."""


class Repositories(RuleBasedStateMachine):
    """One repository and one source, and what is known of them.

    A rule that has nothing to do just returns: how many steps a verb has depends on the names of the
    packs, which depend on the time, and what may be drawn must not.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        memory = Path("/dev/shm")
        self.folder = Path(mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
        self.scene: Scene = make_scene(stage, self.folder)
        self.truth: dict[str, Files] = {}
        self.right: Right = set()
        self.repaired: set[str] = set()
        self.is_hurt = False

    def teardown(self) -> None:
        try:
            if not self.is_hurt:
                assert self.scene.act("check").done() == []
            self.scene.act("prune", share=1.0)
            self.observe()
            assert self.scene.names("tmp") == []
        finally:
            shutil.rmtree(self.folder)

    def observe(self, *maybe: Files, gone: frozenset[str] = frozenset()) -> dict[str, Files]:
        """Look at everything; what is listed for the first time must be one of `maybe`."""
        listed: dict[str, Files] = self.scene.act("look").done()
        for name in listed.keys() - self.truth.keys():
            assert any(agrees(listed[name], one, False) for one in maybe), "who published this?"
            self.truth[name] = next(one for one in maybe if agrees(listed[name], one, False))
        for name in self.truth.keys() - listed.keys():
            assert name in gone, "a snapshot is listed no more"
            del self.truth[name]
        right: Right = set()
        for name, files in listed.items():
            truth = self.truth[name]
            assert agrees(files, truth, name in self.repaired)
            right |= {(name, path) for path, found in files.items() if found == truth.get(path)}
        lost = {one for one in self.right - right if one[0] in listed}
        assert not lost, "it could be read before"
        if not self.is_hurt:
            assert {(name, path) for name in self.truth for path in self.truth[name]} == right
        self.right = right
        return listed

    def act(self, verb: str, at: int | None, **arguments: Any) -> Outcome:
        """Do a verb; only where there is damage it may refuse."""
        outcome = self.scene.act(verb, {"at": at}, **arguments)
        if outcome.error is not None:
            assert self.is_hurt and outcome.error["exit"] == 5, outcome.error
        return outcome

    @initialize()
    def begin(self) -> None:
        self.scene.write("first", "first", 30 * KIB)

    @rule(name=NAMES, label=LABELS, size=SIZES)
    def write(self, name: str, label: int, size: int) -> None:
        self.scene.write(name, f"{label}", size)

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        (self.scene.source / name).unlink(missing_ok=True)

    @rule(at=STEPS, parent=st.booleans())
    def back_up(self, at: int | None, parent: bool) -> None:
        shows = look_at_source(self.scene.source)
        arguments = {"source": str(self.scene.source), "use_parent": parent}
        outcome = self.act("backup", at, **arguments)
        assert outcome.error is None
        listed = self.observe(shows)
        if "done snapshots" in outcome.steps:
            assert any(agrees(files, shows, False) for files in listed.values())
        if outcome.result is not None:
            assert outcome.result["id"] in listed

    @rule(choice=CHOICES, at=STEPS)
    def forget(self, choice: int, at: int | None) -> None:
        if len(self.truth) < 2:
            return
        name = sorted(self.truth)[choice % len(self.truth)]
        outcome = self.act("forget", at, ids=[name])
        listed = self.observe(gone=frozenset([name]))
        assert outcome.was_killed or outcome.error is not None or name not in listed

    @rule(choice=CHOICES, at=STEPS, tag=st.text("xyz", min_size=1, max_size=3))
    def tag(self, choice: int, at: int | None, tag: str) -> None:
        if not self.truth:
            return
        name = sorted(self.truth)[choice % len(self.truth)]
        outcome = self.act("tag", at, id=name, tags=[tag])
        known, flagged = self.truth[name], name in self.repaired
        was_right = {path for one, path in self.right if one == name}
        listed = set(self.scene.act("look").done())
        new = listed - self.truth.keys()
        for one in new:
            self.truth[one] = known
            self.repaired |= {one} if flagged else set()
            self.right |= {(one, path) for path in was_right}
        self.observe(gone=frozenset([name]) if new else frozenset())
        assert outcome.was_killed or outcome.error is not None or len(listed) == len(self.truth)

    @rule(at=STEPS, share=SHARES)
    def prune(self, at: int | None, share: float) -> None:
        before = self.scene.packs()
        outcome = self.act("prune", at, share=share)
        if outcome.error is not None:
            assert self.scene.packs() >= before
        self.observe()

    @rule(at=STEPS)
    def repair_index(self, at: int | None) -> None:
        assert self.act("repair_index", at).error is None
        self.observe()

    @rule()
    def lose_the_index(self) -> None:
        shutil.rmtree(self.scene.root / "index")
        self.observe()

    @rule(read=st.booleans())
    def check(self, read: bool) -> None:
        found = self.scene.act("check", read_data=read).done()
        if not self.is_hurt:
            assert found == []
        self.observe()

    @rule()
    def look_through_the_mount(self) -> None:
        if not self.truth:
            return
        assert self.scene.act("look_through_the_mount").done() == self.observe()

    @rule(choice=CHOICES)
    def restore(self, choice: int) -> None:
        if not self.truth:
            return
        name = sorted(self.truth)[choice % len(self.truth)]
        target = self.folder / "target"
        self.scene.act("restore", target=str(target), snapshot=name).done()
        start = str(target).lstrip("/") + "/"
        found = {
            path.removeprefix(start): what
            for path, what in look_at_source(target).items()
            if path.startswith(start)
        }
        shutil.rmtree(target)
        assert {path for one, path in self.right if one == name} <= found.keys()
        for path, what in found.items():
            assert what == self.truth[name][path] or name in self.repaired

    @rule(choice=CHOICES, where=st.floats(0, 1), how=st.sampled_from(["flip", "cut", "remove"]))
    def damage(self, choice: int, where: float, how: str) -> None:
        if not pack_paths(self.scene.root):
            return
        packs = pack_paths(self.scene.root)
        path = packs[choice % len(packs)]
        offset = int(where * (path.stat().st_size - 1)) if path.stat().st_size else 0
        if how == "remove":
            path.unlink()
        elif how == "cut" or not path.stat().st_size:
            os.truncate(path, offset)
        else:
            flip(path, offset)
        self.is_hurt = True
        self.right = set()
        self.observe()

    @rule()
    def heal(self) -> None:
        """Mark what is lost, then see it again: every snapshot with these files has them again."""
        if not self.is_hurt:
            return
        self.scene.act("check").done()
        shows = look_at_source(self.scene.source)
        self.back_up(None, True)
        whole = {one for one, files in self.truth.items() if files == shows}
        listed = self.scene.act("look").done()
        assert any(listed[one] == shows for one in whole)
        for name, files in listed.items():
            for path, what in shows.items():
                if what != "directory" and self.truth[name].get(path) == what and path in files:
                    assert files[path] == what or files[path].startswith(FLAGGED)

    @rule(at=STEPS)
    def repair_snapshots(self, at: int | None) -> None:
        """What was lost is given up, and nothing else."""
        if not self.is_hurt:
            return
        outcome = self.act("repair_snapshots", at)
        listed: dict[str, Files] = self.scene.act("look").done()
        new = listed.keys() - self.truth.keys()
        old = self.truth.keys() - listed.keys()
        for name in new:
            # Its entries show from whose files it was made.
            source = next(one for one in self.truth if agrees(listed[name], self.truth[one], True))
            self.truth[name] = self.truth[source]
            self.repaired.add(name)
        kept = {path for one, path in self.right if one in old}
        shown = {path for name in new for path in listed[name]}
        if new:
            assert kept <= shown
        self.observe(gone=frozenset(old))
        if outcome.result is not None:
            found = self.scene.act("check").done()
            assert [one for one in found if one["snapshot"] is not None] == []


def agrees(files: Files, truth: Files, was_repaired: bool) -> bool:
    """Return whether each file is as it was, or lost, or (once repaired) reported as partly lost."""
    return all(
        found in (LOST, truth.get(path)) or (was_repaired and found.startswith(FLAGGED))
        for path, found in files.items()
    )


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage() as found:
        yield found


@pytest.mark.slow
@pytest.mark.timeout(300 * EFFORT)
def test_any_sequence_of_commands_keeps_published_snapshots_or_reports_their_loss(
    stage: Stage,
) -> None:
    class Here(Repositories):
        def __init__(self) -> None:
            super().__init__(stage)

    steps = 15 if EFFORT == 1 else 40
    run_state_machine_as_test(
        Here, settings=settings(max_examples=20 * EFFORT, stateful_step_count=steps)
    )
