"""A backup into an encrypted repository, and every change of keys, is killed at every durable step.

What was published opens with the keys that it opened with, and the next command does the work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.support.encryption import OTHER_PUBLIC, OTHER_SECRET
from tests.support.observation import look_at_source
from tests.support.process_runner import Outcome, Stage, come_back, kept_as_it_is
from tests.support.tampering import PASSPHRASE, Hostile, make_hostile

pytestmark = pytest.mark.slow


@pytest.fixture
def scene(stage: Stage) -> Iterator[Hostile]:
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield make_hostile(stage, Path(folder) / "it")


def killed_everywhere(
    scene: Hostile, *words: str | Path, home: str, stdin: str = ""
) -> Iterator[Outcome]:
    """Run a command once in peace, then kill it at one step after the other until it has no more.

    The repository is each time what it was before, and so is what the machine remembers.
    """
    reported: dict[str, Any] = {"arguments": [str(one) for one in words], "stdin": stdin}
    reported["home"] = str(scene.folder / home)
    with kept_as_it_is(scene.folder) as copy:
        whole = scene.stage.act("command", scene.root, **reported)
        assert whole.done()["exit"] == 0, whole
        assert len(whole.steps) > 3, whole
        stop = 0
        while True:
            come_back(copy, scene.folder)
            outcome = scene.stage.act("command", scene.root, {"at": stop}, **reported)
            if not outcome.was_killed:
                break
            yield outcome
            stop += 1
        assert outcome.done()["exit"] == 0
        assert stop == len(outcome.steps), whole


def must_be_there(scene: Hostile) -> set[str]:
    """Require that all that was published is there and whole; returns the ids that are listed."""
    seen = scene.look("fresh")
    assert seen is not None
    new = look_at_source(scene.source)
    for files in seen.values():
        for name, true in scene.published.items():
            assert files[name] == true
        for name in files.keys() - scene.published.keys():
            assert files[name] == new
    return set(seen["read"])


def must_be_intact(scene: Hostile) -> set[str]:
    """Require the same, and that a check finds nothing."""
    checked = scene.run("check", "--read-data", *scene.identity(), home="fresh")
    assert checked.exit == 0, checked
    return must_be_there(scene)


def test_a_backup_killed_at_any_step_loses_nothing_and_the_next_one_completes_it(
    scene: Hostile,
) -> None:
    (scene.source / "new").write_bytes(b"new" * 1000)
    for number in range(4):
        (scene.source / f"text {number}").write_bytes(b"in a group: %d\n" % number * 50)
    known = dict(scene.published)
    kills = 0
    for _ in killed_everywhere(scene, "backup", "--no-sync", scene.source, home="writer"):
        kills += 1
        listed = must_be_there(scene)
        assert len(listed) in (2, 3)
        printed = scene.back_up()
        assert (printed.exit, "unproven" in printed.err) == (0, False)
        assert "is missing: it was removed" not in printed.err
        assert scene.run("prune", "--no-sync", *scene.identity(), home="fresh").exit == 0
        assert len(must_be_intact(scene)) == len(listed) + 1
        # Keys of sessions in which nothing was stored are gone, and nothing else is left over.
        sessions = {path.parent.name for path in scene.objects("sessions")}
        assert len(sessions) <= 1 + len(scene.objects("packs")) + len(scene.objects("snapshots"))
        assert list((scene.root / "tmp").iterdir()) == []
        scene.published = dict(known)
    assert kills > 10


def test_a_rewrap_killed_at_any_step_keeps_every_session_readable_and_the_next_one_completes_it(
    scene: Hostile,
) -> None:
    assert scene.run("key", "add", "--recipient", OTHER_PUBLIC, home="writer").exit == 0
    other = scene.folder / "other identity"
    other.write_text(OTHER_SECRET + "\n")
    words = ("key", "rewrap", *scene.identity())
    for _ in killed_everywhere(scene, *words, home="writer"):
        must_be_intact(scene)
        assert scene.run(*words, home="writer").exit == 0
        must_be_there(scene)
        assert scene.run("check", "--identity", other, home="other").exit == 0
        sessions = [path.parent.name for path in scene.objects("sessions")]
        assert len(sessions) == len(set(sessions)) == 3


def test_a_change_of_recipients_killed_at_any_step_leaves_a_list_that_the_host_accepts(
    scene: Hostile,
) -> None:
    words = ("key", "add", "--recipient", OTHER_PUBLIC)
    known = dict(scene.published)
    for _ in killed_everywhere(scene, *words, home="writer"):
        must_be_there(scene)
        listed = scene.run("key", "list", home="nobody")
        assert listed.exit == 0
        if scene.back_up().exit:
            # It was killed between the list and the memory of it: this machine asks first.
            assert scene.run("key", "accept", home="writer").exit == 0
            assert scene.back_up().exit == 0
        assert scene.run(*words, home="writer").exit == 0
        assert OTHER_PUBLIC in scene.run("key", "list", home="nobody").out
        assert scene.back_up().exit == 0
        must_be_intact(scene)
        scene.published = dict(known)


def test_a_removal_of_a_recipient_killed_at_any_step_leaves_everything_readable(
    scene: Hostile,
) -> None:
    assert scene.run("key", "add", "--recipient", OTHER_PUBLIC, home="writer").exit == 0
    words = ("key", "remove", OTHER_PUBLIC)
    known = dict(scene.published)
    removed = []
    for _ in killed_everywhere(scene, *words, home="writer"):
        must_be_intact(scene)
        removed.append(OTHER_PUBLIC not in scene.run("key", "list", home="nobody").out)
        if scene.back_up().exit:
            # It was killed between the new list and the memory of it: this machine asks first.
            assert removed[-1]
            accepted = scene.run("key", "accept", *scene.identity(), home="writer")
            assert accepted.exit == 0, accepted
            assert scene.back_up().exit == 0
        if not removed[-1]:
            assert scene.run(*words, home="writer").exit == 0
        assert OTHER_PUBLIC not in scene.run("key", "list", home="nobody").out
        assert scene.back_up().exit == 0
        listed = scene.run("snapshots", "--json", *scene.identity(), home="fresh")
        assert '"unproven": false' in listed.out
        assert '"unproven": true' not in listed.out
        assert scene.run("prune", "--no-sync", *scene.identity(), home="fresh").exit == 0
        must_be_intact(scene)
        scene.published = dict(known)
    # The removal is one step: before it the list is the old one, after it the new one.
    assert removed == sorted(removed) and len(set(removed)) == 2


def test_a_change_of_passphrase_killed_at_any_step_leaves_one_that_opens(scene: Hostile) -> None:
    (scene.folder / "new").write_text("the new one")
    new = ("--new-passphrase-file", scene.folder / "new")
    words = ("key", "passwd", "--passphrase-fd", "0", *new)

    def opens(passphrase: str) -> bool:
        how = ("--passphrase-fd", "0")
        return scene.run("snapshots", *how, home="fresh", stdin=passphrase).exit == 0

    for _ in killed_everywhere(scene, *words, home="writer", stdin=PASSPHRASE):
        if opens(PASSPHRASE):
            assert scene.run(*words, home="writer", stdin=PASSPHRASE).exit == 0
            assert not opens(PASSPHRASE)
        assert opens("the new one")
