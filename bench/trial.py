"""One program on one corpus: do each work and return its cost.

A trial owns the program's repository (its *home*), which a first backup creates again. Creating the
repository, unmounting and comparing the results are not measured. Every result is checked: a restore must
return the number of files and bytes of the corpus, a `find` the number of names.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from bench import corpus as corpora
from bench.measure import (
    Child,
    Command,
    CommandError,
    Usage,
    run,
    server_pids,
    server_usage,
    with_server,
)
from bench.reading import do_reading, measure_startup, prepare_reading
from bench.records import Sample
from bench.scratch import await_end, mounts_below, unmount
from bench.stage import WORK_TIMEOUT_S, Stage, TrialError, compare, sample_of
from bench.works import COPIES, MOUNTED, Work

MOUNT_TIMEOUT_S = 600.0
POLL_S = 0.005


class BackupProgram(Protocol):
    """The calls of a program; `home` is a folder for its repository and its caches."""

    @property
    def name(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def first_backup_only(self) -> bool: ...
    @property
    def mount_stays(self) -> bool: ...

    def initialise(self, home: Path) -> Command: ...
    def backup(self, home: Path, source: Path, label: str) -> Command: ...
    def restore(self, home: Path, label: str, target: Path) -> Command: ...
    def check(self, home: Path) -> Command: ...
    def list_snapshots(self, home: Path) -> Command: ...
    def mount(self, home: Path, label: str, mountpoint: Path) -> Command: ...
    def mounted_root(self, mountpoint: Path) -> Path: ...
    def unmount(self, mountpoint: Path) -> Command: ...
    def version(self) -> Command: ...


@dataclass(frozen=True, slots=True)
class Mounted:
    """A usable mount: the corpus inside it, the server processes, and the cost of mounting."""

    corpus: Path
    pids: tuple[int, ...]
    usage: Usage


class BackupTrial:
    """A backup program on a corpus."""

    def __init__(self, program: BackupProgram, stage: Stage) -> None:
        self.name = program.name
        self._program = program
        self._stage = stage
        self._home = stage.scratch.folder / f"home-{program.name}"
        self._backups = 0
        self._days: list[tuple[float, int]] = []
        self._day_usages: list[Usage] = []

    def does(self, work: Work) -> bool:
        """Return whether the program takes part in a work."""
        return work is Work.FIRST or not self._program.first_backup_only

    def perform(self, work: Work, repetition: int) -> list[Sample]:
        """Do a work once; raise TrialError or CommandError if that fails."""
        if work is not Work.FIRST and self._backups == 0:
            self._first_backup()
        if work in MOUNTED:
            return self._sampled_mounted(work, repetition)
        if work is Work.FIRST:
            usage = self._first_backup()
        elif work is Work.RESTORE:
            usage = self._restore()
        elif work is Work.LIST:
            usage = measure_startup(self._program.list_snapshots(self._home), self._stage.log)
        elif work is Work.CHECK:
            self._stage.cache.warm(self._home)
            usage = self._run(self._program.check(self._home))
        else:
            return [self._next_backup(work, repetition)]
        sample = self._sample(work, repetition, usage)
        if work is Work.FIRST:
            sample = replace(
                sample,
                stored_bytes=self._stored_bytes(),
                cache_bytes=corpora.stored_bytes(self._home) - self._stored_bytes(),
            )
        return [sample]

    def live_a_day(self) -> None:
        """Do the backup of another day; `finish_days` returns the sample of all days."""
        if self._backups == 0:
            raise TrialError("there is no first backup to go on from")
        before = self._stored_bytes()
        self._stage.cache.warm(self._stage.source)
        usage = self._backup()
        self._day_usages.append(usage)
        self._days.append((usage.wall_s, self._stored_bytes() - before))

    def finish_days(self, repetition: int) -> Sample:
        """Return the sample of the days since the last call."""
        usages, days = self._day_usages, self._days
        self._day_usages, self._days = [], []
        total = Usage(
            sum(each.wall_s for each in usages),
            sum(each.cpu_s for each in usages),
            max(each.peak_bytes for each in usages),
            sum(each.foreign_cpu_s for each in usages),
        )
        return replace(
            self._sample(Work.DAILY, repetition, total),
            grown_bytes=sum(grown for _, grown in days),
            day_wall_s=tuple(wall for wall, _ in days),
            day_grown_bytes=tuple(grown for _, grown in days),
        )

    def clear(self) -> None:
        """Move the repository to the trash."""
        self._stage.scratch.discard(self._home)
        self._backups = 0

    def _first_backup(self) -> Usage:
        self.clear()
        self._home.mkdir()
        run(self._program.initialise(self._home), self._stage.log, WORK_TIMEOUT_S)
        self._stage.cache.warm(self._stage.source)
        return self._backup()

    def _next_backup(self, work: Work, repetition: int) -> Sample:
        before = self._stored_bytes()
        self._stage.cache.warm(self._stage.source, self._home)
        usage = self._backup()
        grown = self._stored_bytes() - before
        return replace(self._sample(work, repetition, usage), grown_bytes=grown)

    def _backup(self) -> Usage:
        label = f"backup-{self._backups + 1}"
        usage = self._run(self._program.backup(self._home, self._stage.source, label))
        self._backups += 1
        return usage

    def _restore(self) -> Usage:
        with self._target(Work.RESTORE) as target:
            self._stage.cache.warm(self._home)
            label = f"backup-{self._backups}"
            usage = self._run(self._program.restore(self._home, label, target))
            compare(self._stage.facts, _below(target, self._stage.source))
            return usage

    def _sampled_mounted(self, work: Work, repetition: int) -> list[Sample]:
        with self._mounted() as mounted:
            if work is Work.MOUNT:
                return [self._sample(work, repetition, mounted.usage)]
            reads = [Work.READ, Work.READ_AGAIN] if work is Work.READ else [work]
            samples = []
            for each in reads:
                with self._target(each) as target:
                    prepare_reading(each, self._stage, target)
                    if each is not Work.READ_AGAIN:
                        self._stage.cache.drop()
                    before = server_usage(mounted.pids)
                    client = do_reading(each, self._stage, mounted.corpus, target, repetition)
                    usage = with_server(client, before, server_usage(mounted.pids))
                    if each in COPIES:
                        compare(self._stage.facts, target / mounted.corpus.name)
                samples.append(self._sample(each, repetition, usage))
            return samples

    @contextmanager
    def _mounted(self) -> Iterator[Mounted]:
        mountpoint = self._stage.scratch.make(f"mount-{self._program.name}")
        command = self._program.mount(self._home, f"backup-{self._backups}", mountpoint)
        self._stage.cache.drop()
        try:
            started = time.perf_counter()
            if self._program.mount_stays:
                # The readers' output goes elsewhere while the server's is still being written.
                with Child(command, self._stage.scratch.folder / "server.log") as child:
                    self._await_mount(mountpoint, started, child)
                    yield self._look_inside(mountpoint, started, 0.0)
                    self._unmount(mountpoint)
            else:
                launch = run(command, self._stage.log, MOUNT_TIMEOUT_S)
                self._await_mount(mountpoint, started, None)
                yield self._look_inside(mountpoint, started, launch.cpu_s)
                self._unmount(mountpoint)
        finally:
            self._stage.scratch.remove(mountpoint)

    def _await_mount(self, mountpoint: Path, started: float, child: Child | None) -> None:
        deadline = started + MOUNT_TIMEOUT_S
        while mountpoint not in mounts_below(mountpoint):
            if child is not None and not child.running():
                raise CommandError(child.command, "ended before it mounted", child.tail())
            if time.perf_counter() > deadline:
                raise TrialError(f"{mountpoint} was not mounted in {MOUNT_TIMEOUT_S:.0f} s")
            time.sleep(POLL_S)

    def _look_inside(self, mountpoint: Path, started: float, launch_cpu_s: float) -> Mounted:
        """Return the mount when its tree answers a stat; some programs load the snapshot only then."""
        inside = _below(self._program.mounted_root(mountpoint), self._stage.source)
        look = Command(("stat", str(inside)))
        run(look, self._stage.scratch.folder / "look.log", MOUNT_TIMEOUT_S)
        wall_s = time.perf_counter() - started
        pids = server_pids(mountpoint)
        cost = server_usage(pids)
        usage = Usage(wall_s, launch_cpu_s + cost.cpu_s, cost.peak_bytes, 0.0)
        return Mounted(inside, pids, usage)

    def _unmount(self, mountpoint: Path) -> None:
        pids = server_pids(mountpoint)
        try:
            run(self._program.unmount(mountpoint), self._stage.log, MOUNT_TIMEOUT_S)
        except CommandError:
            unmount(mountpoint)
        await_end(mountpoint, pids)

    @contextmanager
    def _target(self, work: Work) -> Iterator[Path]:
        target = self._stage.make_target(work)
        try:
            yield target
        finally:
            self._stage.discard_target(target)

    def _stored_bytes(self) -> int:
        return corpora.stored_bytes(self._home / "repository")

    def _run(self, command: Command) -> Usage:
        return run(command, self._stage.log, WORK_TIMEOUT_S)

    def _sample(self, work: Work, repetition: int, usage: Usage) -> Sample:
        return sample_of(self._stage, work, self.name, repetition, usage)


def _below(root: Path, absolute: Path) -> Path:
    return root.joinpath(*absolute.parts[1:])
