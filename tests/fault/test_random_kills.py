"""The installed command is killed at any moment, again and again, on one repository that lives through it.

Where it dies is left to chance, also between the durable steps: in the start of Python, under a lock,
while LMDB writes, in the seal of the index.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.cli import Casfs, finish
from tests.support.effort import EFFORT, dice
from tests.support.observation import Files, look_at_source
from tests.support.process_runner import KIB, Scene, Stage, make_scene

ROUNDS = 25 * EFFORT

pytestmark = pytest.mark.timeout(300 * EFFORT)


def test_a_repository_survives_commands_killed_at_any_moment(stage: Stage, tmp_path: Path) -> None:
    scene = make_scene(stage, tmp_path)
    (tmp_path / "home").mkdir()
    casfs = Casfs(scene.root, tmp_path / "home")
    throw = dice()
    for number in range(8):
        scene.write(f"kept/{number}", f"kept {number}", 64 * KIB)
    scene.back_up()
    verbs: list[Callable[[], list[str]]] = [
        lambda: ["backup", str(scene.source)],
        lambda: ["backup", "--no-parent", "--spool", "memory", str(scene.source)],
        lambda: ["prune", "--margin", "0s", "--max-unused", "5%"],
        lambda: ["forget", "--keep-last", "2", "--prune"],
        lambda: ["tag", "latest", "--add", f"tag{throw.random()}"],
        lambda: ["repair", "index"],
        lambda: ["check", "--read-data"],
        lambda: ["restore", "latest", "--target", str(tmp_path / "target")],
    ]
    usual_s: dict[str, float] = {}
    died = 0
    for number in range(ROUNDS):
        verb = verbs[number % len(verbs)]()
        if verb[0] == "backup":
            for _ in range(3):
                scene.write(f"changing/{throw.randrange(6)}", f"{throw.random()}", 100 * KIB)
        shows = look_at_source(scene.source)
        before = dict(scene.published)
        began = time.monotonic()
        process = casfs.start(*verb)
        if verb[0] in usual_s:
            # What is tried here is a moment of no meaning, so a time is what has to be waited for.
            time.sleep(throw.uniform(0, usual_s[verb[0]]))
            os.killpg(process.pid, signal.SIGKILL)
        result = finish(process)
        assert result.exit in (0, -signal.SIGKILL), result
        died += result.exit != 0
        usual_s.setdefault(verb[0], time.monotonic() - began)
        listed = _judge(scene, verb[0], shows, before)
        if verb[0] == "restore":
            _must_be_whole_files(tmp_path / "target", before)
            shutil.rmtree(tmp_path / "target", ignore_errors=True)
        if verb[0] == "backup" and result.exit == 0:
            assert len(listed) == len(before) + 1
        scene.published = listed
    assert died >= ROUNDS // 3
    scene.back_up()
    scene.act("prune").done()
    scene.must_be_intact()
    scene.must_be_tidy()


def _judge(scene: Scene, verb: str, shows: Files, before: dict[str, Files]) -> dict[str, Files]:
    """Require that what the command did not touch is as it was; return the listed snapshots."""
    listed: dict[str, Files] = scene.act("look").done()
    known = list(before.values())
    for files in listed.values():
        assert files in known or (verb == "backup" and files == shows)
    if verb not in ("forget", "tag"):
        assert before.items() <= listed.items()
    if verb == "tag":
        assert len(listed) == len(before)
    assert len(listed) >= min(2, len(before))
    damage = scene.act("check").done()
    assert not damage, damage
    return listed


def _must_be_whole_files(target: Path, published: dict[str, Files]) -> None:
    if not target.exists():
        return
    start = str(target).lstrip("/") + "/"
    known = {item for files in published.values() for item in files.items()}
    for path, what in look_at_source(target).items():
        if path.startswith(start) and "/.casfs-restore-" not in path:
            assert (path.removeprefix(start), what) in known
