"""Measure a mount of a repository that is too large to back up for a test: `python -m bench scale`.

`tests.support.synthetic_repository` writes the repository straight into the store: 1,000 snapshots,
one of them with two million files and a directory of 100,000. Every mount and every first look is cold.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import PROJECT
from bench.caches import KernelCache
from bench.measure import server_pids, server_usage
from bench.scratch import Scratch

FULL_SHAPE = ()
QUICK_SHAPE = ("--snapshots", "50", "--crowd", "20000", "--folders", "200")

_REPOSITORY_BYTES = 200_000_000


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured value with its unit, and its aim if there is one."""

    what: str
    value: float
    unit: str
    most: float | None = None

    def line(self) -> str:
        """Return the value as a line of text."""
        wanted = ""
        if self.most is not None:
            outcome = "met" if self.value <= self.most else "missed"
            wanted = f"   (wanted: at most {self.most:g} {self.unit}: {outcome})"
        return f"{self.what:<62} {self.value:>9.3f} {self.unit}{wanted}"


class Scale:
    """One run in a scratch folder with an installed casfs."""

    def __init__(self, scratch: Scratch, quick: bool) -> None:
        self._shape = QUICK_SHAPE if quick else FULL_SHAPE
        self._cache = KernelCache()
        self._repository = scratch.folder / "repository"
        self._mountpoint = scratch.make("mount")
        self._casfs = str(Path(sys.executable).with_name("casfs"))

    def figures(self) -> Iterator[Figure]:
        """Create the repository, measure, and yield each value as soon as it is known."""
        command = [
            sys.executable,
            "-m",
            "tests.support.synthetic_repository",
            str(self._repository),
            *self._shape,
        ]
        made = subprocess.run(command, cwd=PROJECT, check=True, stdout=subprocess.PIPE)
        entries = int(made.stdout)
        at = self._mountpoint
        self._drop()
        begun = time.perf_counter()
        with self._mounted():
            yield Figure("whole repository: mount until usable (cold)", _since(begun), "s", 1.0)
            yield _timed("  first `ls` of snapshots/", lambda: os.listdir(at / "snapshots"))
            yield _timed("  versions/notes: one version in each", lambda: _versions(at))
            yield self._peak("  peak memory of its server")
        self._drop()
        begun = time.perf_counter()
        with self._mounted("latest"):
            yield Figure("large snapshot: mount until usable (cold)", _since(begun), "s", 1.0)
            self._drop()
            begun = time.perf_counter()
            with os.scandir(at / "crowd") as listing:
                next(listing)
                yield Figure("  first entry of the crowded directory (cold)", _since(begun), "s")
                count = 1 + sum(1 for _ in listing)
            yield Figure(f"  all its {count:,} entries", _since(begun), "s")
            self._drop()
            begun = time.perf_counter()
            found = subprocess.run(["find", str(at)], check=True, stdout=subprocess.PIPE).stdout
            seen = found.count(b"\n")
            if seen != entries + 1:
                raise ValueError(f"find saw {seen} of {entries + 1} entries")
            yield Figure(f"  `find` over {entries:,} entries (cold)", _since(begun), "s")
            yield self._peak("  peak memory of its server after that")

    def _drop(self) -> None:
        os.sync()
        self._cache.drop()

    def _peak(self, what: str) -> Figure:
        peak_bytes = server_usage(server_pids(self._mountpoint)).peak_bytes
        return Figure(what, peak_bytes / 1e6, "MB", 150.0)

    @contextmanager
    def _mounted(self, *snapshot: str) -> Iterator[None]:
        command = [self._casfs, "-r", str(self._repository), "mount", *snapshot]
        subprocess.run([*command, str(self._mountpoint)], check=True, stdout=subprocess.DEVNULL)
        try:
            yield
        finally:
            subprocess.run(
                [self._casfs, "umount", str(self._mountpoint)],
                check=True,
                stdout=subprocess.DEVNULL,
            )


def measure_scale(root: Path, quick: bool) -> int:
    """Measure, print every value, and return an exit code: 1 if an aim was missed."""
    code = 0
    with Scratch(root) as scratch:
        scratch.need(_REPOSITORY_BYTES, 2000, "A repository of two million files")
        for figure in Scale(scratch, quick).figures():
            print(figure.line(), flush=True)
            if figure.most is not None and figure.value > figure.most:
                code = 1
    return code


def _timed(what: str, work: Callable[[], object]) -> Figure:
    begun = time.perf_counter()
    work()
    return Figure(what, _since(begun), "s")


def _versions(at: Path) -> list[str]:
    return os.listdir(at / "versions" / "notes")


def _since(begun: float) -> float:
    return time.perf_counter() - begun
