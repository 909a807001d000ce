"""The trivial FUSE file system: the corpus served from memory, which bounds every mount through pyfuse3.

It takes part in the works on a mount twice, with pyfuse3's own event loop and with that of casfs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.measure import Child, Command, CommandError, run, server_usage, with_server
from bench.reading import PROBES, do_reading, prepare_reading
from bench.records import Sample
from bench.scratch import mounts_below, unmount
from bench.stage import Stage, compare, sample_of
from bench.works import COPIES, FILE_READINGS, TREE_READINGS, Work

FUSE = "trivial-fuse"
FUSE_FAST = "trivial-fuse-fast"
LOOPS = {FUSE: "trio", FUSE_FAST: "casfs"}
LABELS = {FUSE: "trivial FUSE, plain trio", FUSE_FAST: "trivial FUSE, casfs's event library"}
MOUNT_PATIENCE_S = 60.0


class MemoryTreeTrial:
    """The corpus in memory, mounted for each work; `name` is FUSE or FUSE_FAST."""

    def __init__(self, name: str, stage: Stage) -> None:
        self.name = name
        self._stage = stage

    def does(self, work: Work) -> bool:
        """Return whether the work reads a mount."""
        return work in TREE_READINGS or work in FILE_READINGS

    def perform(self, work: Work, repetition: int) -> list[Sample]:
        """Do a work once on a new mount."""
        stage = self._stage
        samples = []
        with self._mounted() as (folder, pid):
            for each in (Work.READ, Work.READ_AGAIN) if work is Work.READ else (work,):
                target = stage.make_target(each)
                try:
                    prepare_reading(each, stage, target)
                    if each is not Work.READ_AGAIN:
                        stage.cache.drop()
                    before = server_usage((pid,))
                    client = do_reading(each, stage, folder, target, repetition)
                    usage = with_server(client, before, server_usage((pid,)))
                    if each in COPIES:
                        compare(stage.facts, target / folder.name)
                finally:
                    stage.discard_target(target)
                samples.append(sample_of(stage, each, self.name, repetition, usage))
        return samples

    def clear(self) -> None:
        """Do nothing: the file system keeps no repository."""

    @contextmanager
    def _mounted(self) -> Iterator[tuple[Path, int]]:
        """Yield the mounted corpus and the server's process id."""
        stage = self._stage
        mountpoint = stage.scratch.make(f"mount-{self.name}")
        command = Command(
            (
                *(sys.executable, str(PROBES / "memory_tree.py"), "--loop", LOOPS[self.name]),
                *(str(stage.source), str(mountpoint)),
            )
        )
        try:
            with Child(command, stage.scratch.folder / "server.log") as child:
                while mountpoint not in mounts_below(mountpoint):
                    if not child.running():
                        raise CommandError(command, "ended before it mounted", child.tail())
                run(Command(("stat", str(mountpoint))), stage.log, MOUNT_PATIENCE_S)
                yield mountpoint, child.pid
                unmount(mountpoint)
        finally:
            stage.scratch.remove(mountpoint)
