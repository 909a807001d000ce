"""Runs of Atheris (libFuzzer with coverage of Python): one process for each slice of one target.

The corpus of a target grows in a folder and is used again, as is the number of inputs done: a run that was
interrupted goes on where it stopped. An input that breaks a rule stays in the folder, and ends the run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import msgspec

from tests.fuzz.target import Target

_SLICE_INPUTS = 50_000
_LONGEST_S = 600
"""By the clock, since the machine may be busy; the parsers' own bound is of processor time."""

_MOST_MEMORY_MIB = 2048


class FoundError(Exception):
    """An input that breaks a rule of its parser; the message says where it is."""


@dataclass(frozen=True, slots=True)
class Folder:
    """The state of the runs: a corpus for each target, and how many inputs each was given."""

    path: Path

    def corpus(self, target: Target) -> Path:
        """Return the folder of the inputs that reached new code, filled with the seeds at first."""
        folder = self.path / target.name.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        for seed in target.seeds():
            (folder / blake2b(seed, digest_size=10).hexdigest()).write_bytes(seed)
        return folder

    def done(self) -> dict[str, int]:
        """Return how many inputs each target was given."""
        try:
            return msgspec.json.decode((self.path / "done.json").read_bytes(), type=dict[str, int])
        except FileNotFoundError:
            return {}

    def record(self, done: dict[str, int]) -> None:
        """Keep the numbers of inputs."""
        unfinished = self.path / "done.json.new"
        unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(done)))
        unfinished.replace(self.path / "done.json")


def shares(targets: dict[str, Target], inputs: int) -> dict[str, int]:
    """Divide a number of inputs among targets: the more one costs, the fewer it gets."""
    total = sum(1 / target.cost for target in targets.values())
    return {name: round(inputs / total / target.cost) for name, target in targets.items()}


def run(targets: dict[str, Target], inputs: int, folder: Folder) -> None:
    """Give the targets so many inputs in all, those of earlier runs included; raise FoundError.

    The targets take turns, so that a run of any length tries them all.
    """
    wanted, done = shares(targets, inputs), folder.done()
    if all(done.get(name, 0) >= count for name, count in wanted.items()):
        print(f"{inputs} inputs were done before; they begin again with what they have found")
        done = dict.fromkeys(done, 0)
    while open_ones := {n: c - done.get(n, 0) for n, c in wanted.items() if c > done.get(n, 0)}:
        for name, left in open_ones.items():
            count = min(left, max(_SLICE_INPUTS // targets[name].cost, 1))
            _run_slice(targets[name], count, folder)
            done[name] = done.get(name, 0) + count
            folder.record(done)
        print(f"{sum(done.values())} of {inputs} inputs", flush=True)


def _run_slice(target: Target, count: int, folder: Folder) -> None:
    corpus = folder.corpus(target)
    found = folder.path / "found"
    found.mkdir(exist_ok=True)
    before = set(found.iterdir())
    with tempfile.TemporaryDirectory(prefix="casfs-fuzz-") as home:
        command = [sys.executable, "-m", "tests.fuzz.child", target.name, str(corpus)]
        command += [f"-runs={count}", f"-max_len={target.max_bytes}", f"-timeout={_LONGEST_S}"]
        command += [f"-rss_limit_mb={_MOST_MEMORY_MIB}", f"-malloc_limit_mb={_MOST_MEMORY_MIB}"]
        command += ["-verbosity=0", "-use_value_profile=1", f"-artifact_prefix={found}/"]
        environment = os.environ | {"HOME": home, "XDG_STATE_HOME": f"{home}/state"}
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        text = done.stdout.decode("utf-8", "replace")[-6000:]
        names = ", ".join(sorted(str(path) for path in set(found.iterdir()) - before))
        raise FoundError(f"{target.name}: {names or 'no input was kept'}\n{text}")
