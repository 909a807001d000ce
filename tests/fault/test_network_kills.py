"""Commands are killed at each of their durable steps on a real object storage.

A proxy in front of SeaweedFS kills the process with SIGKILL when one of its requests that change something
arrives: before the server gets the request, or after it has acted and before the process can know. An
undisturbed run counts the steps, so a new step is covered without a change here.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from casfs.repository.opening import open_for_reading
from tests.support.faulty_proxy import Fault, ProxiedRequest
from tests.support.network_scene import NetworkScene
from tests.support.stores import PROJECT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HUNG_S = 120

_COMMAND = """
import functools, sys
from casfs.cli.app import run
from casfs.store import writer
writer.BlobWriter = functools.partial(writer.BlobWriter, pack_bytes=1 << 18)
sys.exit(run(sys.argv[1:]))
"""
"""The command with small packs, so that a small source fills several."""


def start(network: NetworkScene, *arguments: str) -> subprocess.Popen[bytes]:
    """Start the command, which reaches the server through the proxy."""
    host = network.host(Path(os.environ["HOME"]))
    places = {
        "XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"],
        "XDG_STATE_HOME": os.environ["XDG_STATE_HOME"],
    }
    return subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *arguments],
        cwd=PROJECT,
        env=host.environment(places),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def steps_of(network: NetworkScene, *arguments: str) -> int:
    """Return how many requests of a command change something."""
    network.proxy.begin()
    process = start(network, *arguments)
    _, complaints = process.communicate(timeout=HUNG_S)
    assert process.returncode == 0, complaints
    steps = sum(request.changes for request in network.proxy.requests)
    assert steps > 0, "the command has no steps: then nothing is shown here"
    return steps


def kill(network: NetworkScene, step: int, acted: bool, *arguments: str) -> ProxiedRequest:
    """Run a command, kill it at one of its steps, and return that request."""
    steps = itertools.count()
    running: list[subprocess.Popen[bytes]] = []
    victims: list[ProxiedRequest] = []

    def at_step(request: ProxiedRequest) -> Fault | None:
        if not request.changes or next(steps) != step:
            return None
        victims.append(request)
        if acted:
            return Fault.CLOSED_DONE
        running[0].kill()
        return Fault.CLOSED

    def after(request: ProxiedRequest) -> None:
        if request in victims:
            running[0].kill()

    network.proxy.begin(at_step)
    network.proxy.after = after
    try:
        running.append(start(network, *arguments))
        running[0].communicate(timeout=HUNG_S)
    finally:
        network.proxy.after = lambda request: None
        network.proxy.begin()
    assert running[0].returncode == -signal.SIGKILL
    return victims[0]


def packs_of(network: NetworkScene) -> set[str]:
    with open_for_reading(network.direct) as repository:
        storage = repository.store.storage
        return {name for prefix in ("packs", "meta") for name, _, _ in storage.list(prefix)}


def test_a_backup_killed_at_any_step_loses_nothing_and_its_packs_are_reused(
    network: NetworkScene,
) -> None:
    command = ("backup", "--host", "here", str(network.source))
    network.change()
    steps = steps_of(network, *command)
    network.published = dict.fromkeys(network.ids(network.direct), network.source)
    for step, acted in itertools.product(range(steps), (False, True)):
        network.change()
        victim = kill(network, step, acted, *command)
        listed = network.ids(network.direct)
        assert set(network.published) <= listed
        # Only a process that was killed when its packs had been stored leaves a snapshot.
        is_pack = "/packs/" in victim.path or "/meta/" in victim.path
        assert len(listed - set(network.published)) <= (0 if is_pack else 1)
        network.published |= dict.fromkeys(listed, network.source)
        finished = packs_of(network)
        published = network.back_up()
        assert finished <= packs_of(network)
        network.published[published] = network.source
        network.must_list()
    network.must_be_intact()


@pytest.mark.parametrize("command", [("tag", "--add", "kept"), ("forget",)])
def test_a_tag_or_a_forget_killed_at_any_step_loses_no_other_snapshot(
    network: NetworkScene, command: tuple[str, ...]
) -> None:
    network.published[network.back_up()] = network.source
    steps = steps_of(network, *command, "latest")
    for step, acted in itertools.product(range(steps), (False, True)):
        network.change()
        network.published = dict.fromkeys(network.ids(network.direct), network.source)
        last = network.back_up()
        kill(network, step, acted, *command, last.hex())
        assert set(network.published) <= network.ids(network.direct)
    network.must_be_intact()
