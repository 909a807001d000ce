"""Every call to the disk of the repository fails once: a clear error, nothing lost, space given back.

In a process of our own a call of casfs fails the first time, the second time, and so on until there are
no more of them. What LMDB does itself is made to fail by strace under the installed command.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Casfs
from tests.support.effort import EFFORT
from tests.support.observation import look_at_source
from tests.support.process_runner import (
    KIB,
    Outcome,
    Scene,
    Stage,
    come_back,
    kept_as_it_is,
    make_scene,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 * EFFORT)]

FAULTS = [
    ("write", "EIO"),
    ("write", "ENOSPC"),
    ("fsync", "EIO"),
    ("fsync", "ENOSPC"),
    ("rename", "EIO"),
    ("rename", "ENOSPC"),
    ("open", "EIO"),
    ("open", "ENOSPC"),
    ("pread", "EIO"),
    ("unlink", "EIO"),
]


STRIDE = 3
"""In a short run only after every third failure everything else is tried too."""


@pytest.fixture
def grown(scene: Scene) -> Scene:
    """A repository with packs of which all, some, and none is needed, and a source that has more."""
    for number in range(6):
        scene.write(f"gone/{number}", f"gone {number}", 20 * KIB)
    first = scene.back_up()["id"]
    shutil.rmtree(scene.source / "gone")
    for number in range(6):
        scene.write(f"some/{number}", f"some {number}", 20 * KIB)
    second = scene.back_up()["id"]
    for number in range(0, 6, 2):
        (scene.source / "some" / str(number)).unlink()
    scene.back_up()
    scene.act("forget", ids=[first, second]).done()
    del scene.published[first], scene.published[second]
    for number in range(8):
        scene.write(f"new/{number}", f"new {number}", 20 * KIB)
    return scene


def failing_everywhere(
    scene: Scene, verb: str, call: str, what: str, **arguments: Any
) -> Iterator[Outcome]:
    with kept_as_it_is(scene.root) as copy:
        at = 0
        while True:
            come_back(copy, scene.root)
            fate = {"call": call, "what": what, "at": at}
            outcome = scene.act(verb, fate, **arguments)
            if f"{call} failed" not in outcome.steps:
                break
            yield outcome
            at += 1
    assert at >= 1, f"{verb} never calls {call}"


@pytest.mark.parametrize(("call", "what"), FAULTS)
@pytest.mark.parametrize("verb", ["backup", "prune"])
def test_a_failing_disk_call_is_reported_and_loses_nothing(
    grown: Scene, verb: str, call: str, what: str
) -> None:
    arguments = {"source": str(grown.source)} if verb == "backup" else {}
    shows = look_at_source(grown.source)
    known = dict(grown.published)
    printed = {"EIO": "Input/output error", "ENOSPC": "No space left"}[what]
    reported = 0
    for outcome in failing_everywhere(grown, verb, call, what, **arguments):
        assert not outcome.was_killed
        if outcome.error is not None:
            reported += 1
            assert printed in outcome.error["error"], outcome.error
            assert outcome.error["exit"] in (1, 5), outcome.error
        if call != "unlink":
            assert grown.names("tmp") == [], "what was not finished takes room"
        grown.must_be_intact(shows)
        if reported % STRIDE == 1 or EFFORT > 1:
            grown.back_up()
            grown.act("prune").done()
            grown.must_be_intact(shows)
            grown.must_be_tidy()
            grown.published = dict(known)
    # A backup removes only its own lock and temporary files; what stays of them, the next command removes.
    assert reported >= 1 or (verb, call) == ("backup", "unlink")


SYSCALLS = ["pwrite64", "fdatasync", "ftruncate", "pwritev", "msync"]


@pytest.mark.parametrize("what", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("verb", ["backup", "prune", "repair"])
def test_a_failing_index_call_is_reported_and_loses_nothing(
    stage: Stage, tmp_path: Path, verb: str, what: str
) -> None:
    scene = make_scene(stage, tmp_path)
    casfs = Casfs(scene.root, tmp_path)
    for number in range(3):
        scene.write(f"{number}", f"{number}")
        scene.back_up()
    gone = sorted(scene.published)[0]
    scene.act("forget", ids=[gone]).done()
    del scene.published[gone]
    scene.write("new", "new")
    shows = look_at_source(scene.source)
    commands = {
        "backup": ["backup", str(scene.source)],
        "prune": ["prune", "--max-unused", "0%"],
        "repair": ["repair", "index"],
    }
    command = commands[verb]
    failed = 0
    with kept_as_it_is(scene.root) as copy:
        for call, count in _calls(casfs, command, tmp_path / "trace").items():
            for at in range(1, min(count, 2 * EFFORT) + 1):
                come_back(copy, scene.root)
                inject = f"inject={call}:error={what}:when={at}"
                prefix = ("strace", "-f", "-qq", "-o", "/dev/null", "-e", inject)
                result = casfs.run(*command, expect=None, prefix=prefix)
                assert result.exit in (0, 1), result
                if result.exit == 1:
                    failed += 1
                    assert result.complaints, result
                scene.must_be_intact(shows)
                casfs.run("backup", scene.source)
                scene.must_be_intact(shows)
        assert failed >= 1
        come_back(copy, scene.root)


def _calls(casfs: Casfs, command: list[str], trace: Path) -> dict[str, int]:
    """Count the calls of a command by which LMDB writes."""
    names = ",".join(SYSCALLS)
    prefix = ("strace", "-f", "-qq", "-o", str(trace), "-e", f"trace={names}")
    casfs.run(*command, prefix=prefix)
    found = re.findall(r"^\d+ +(\w+)\(", trace.read_text(), re.MULTILINE)
    assert found, subprocess.run(["strace", "-V"], capture_output=True, check=False).stdout
    return {name: found.count(name) for name in SYSCALLS if name in found}
