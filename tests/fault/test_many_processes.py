"""Backups, a prune, a check and a reader at once, all of them processes: every one finishes.

Three backups each go round with a source of their own that changes, a fourth process forgets and
prunes, one checks all data, one reads every snapshot to its last byte. What a snapshot must show is known
from the source, which rests while it is backed up. Then the same with some of them killed on the way.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from tests.support.effort import EFFORT, dice
from tests.support.observation import Files, look_at_source
from tests.support.process_runner import KIB, Scene, Stage, make_scene

ROUNDS = 12 * EFFORT
HOSTS = ("one", "two", "three")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 * EFFORT)]


class Crowd:
    """What the processes have published and forgotten, and whether those that publish are done."""

    def __init__(self, scene: Scene, kills: float) -> None:
        self.scene = scene
        self.maybe: list[Files] = []
        self._kills = kills
        self._throw = dice()
        self.published: dict[str, Files] = {}
        self.forgotten: set[str] = set()
        self.done = Event()

    def fate(self) -> dict[str, Any] | None:
        """Return at which step a process is killed, if it is."""
        if self._throw.random() >= self._kills:
            return None
        return {"at": self._throw.randrange(40)}

    def back_up(self, host: str, seed: int) -> None:
        with Stage() as stage:
            own = Scene(stage, self.scene.root, self.scene.source / host)
            own.source.mkdir()
            for number in range(ROUNDS):
                # Some of it was there before and may have been pruned since, some other hosts have too.
                for place in range(5):
                    kind = (number * 7 + place * seed) % 6
                    shared = f"shared {kind}" if place % 2 else f"{host} {kind} {number // 4}"
                    own.write(f"{place}", shared, (10 + 7 * kind) * KIB)
                shows = look_at_source(own.source)
                outcome = own.act("backup", self.fate(), source=str(own.source), host=host)
                if outcome.was_killed:
                    self.maybe.append(shows)
                else:
                    self.published[outcome.done()["id"]] = shows

    def forget_and_prune(self) -> None:
        with Stage() as stage:
            throw = self._throw
            scene = Scene(stage, self.scene.root, self.scene.source)
            while not self.done.is_set():
                there = sorted(self.published.keys() - self.forgotten)
                gone = throw.sample(there, max(0, len(there) - 3))
                # Recorded before the removal, so that no process misses them.
                self.forgotten.update(gone)
                scene.act("forget", ids=gone).done()
                share = throw.choice([0.0, 0.1, 0.25])
                margin_s = throw.choice([0.0, 60.0])
                outcome = scene.act("prune", self.fate(), share=share, margin_s=margin_s)
                # A process that was killed may leave an index that the next one builds again, which
                # ends a prune that runs meanwhile.
                is_outrun = self._kills and "the index was rebuilt while" in str(outcome.error)
                assert outcome.was_killed or is_outrun or outcome.done()

    def check(self) -> None:
        with Stage() as stage:
            scene = Scene(stage, self.scene.root, self.scene.source)
            while not self.done.is_set():
                damage = scene.act("check").done()
                assert not damage, damage

    def read(self, verb: str) -> None:
        with Stage() as stage:
            scene = Scene(stage, self.scene.root, self.scene.source)
            while not self.done.is_set():
                known = dict(self.published)
                found: dict[str, Files] = scene.act(verb).done()
                for name, shows in known.items():
                    if name not in self.forgotten:
                        assert found.get(name) == shows, name


@pytest.mark.parametrize("kills", [0.0, 0.3], ids=["all live", "some are killed"])
def test_many_processes_at_once_lose_nothing(stage: Stage, tmp_path: Path, kills: float) -> None:
    scene = make_scene(stage, tmp_path)
    crowd = Crowd(scene, kills)

    def until_done(work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        finally:
            # Where one of them fails the others have no reason to go on.
            crowd.done.set()

    with ThreadPoolExecutor(8) as pool:
        others = [
            pool.submit(until_done, crowd.forget_and_prune),
            pool.submit(until_done, crowd.check),
            pool.submit(until_done, crowd.read, "look"),
            pool.submit(until_done, crowd.read, "look_through_the_mount"),
        ]
        backups = [pool.submit(crowd.back_up, host, seed + 1) for seed, host in enumerate(HOSTS)]
        try:
            for backup in backups:
                backup.result()
        finally:
            crowd.done.set()
        for other in others:
            other.result()
    assert len(crowd.published) + len(crowd.maybe) == ROUNDS * len(HOSTS)
    assert bool(crowd.maybe) == bool(kills)
    assert crowd.forgotten
    scene.published = {
        name: shows for name, shows in crowd.published.items() if name not in crowd.forgotten
    }
    listed = scene.must_be_intact(*crowd.maybe)
    scene.act("prune", share=0.0).done()
    assert scene.must_be_intact(*crowd.maybe) == listed
    scene.must_be_tidy()
    shutil.rmtree(scene.source)
