"""One program over one line: do each work and return its cost.

The programs' caches are those that the works before have left; the kernel's cache is dropped before each work
that reads. A restore and a copy must return the bytes of the source; otherwise they count as failed.
"""

from __future__ import annotations

import filecmp
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bench.measure import (
    Child,
    Command,
    CommandError,
    Usage,
    can_drop_caches,
    drop_caches,
    run,
    server_pids,
    server_usage,
)
from bench.remote.line import Line, LineSettings, LineTotals
from bench.remote.programs import RemoteProgram
from bench.remote.results import RemoteSample, RemoteWork
from bench.remote.source import SMALL_FILES, Source
from bench.scratch import Scratch, mounts_below, unmount
from bench.stage import WORK_TIMEOUT_S, TrialError

_MOUNT_TIMEOUT_S = 600.0
_POLL_S = 0.005


class RemoteTrial:
    """A program with a repository of its own behind a line; the works are done in their order."""

    def __init__(
        self,
        program: RemoteProgram,
        line: Line,
        settings: LineSettings,
        source: Source,
        scratch: Scratch,
    ) -> None:
        self._program = program
        self._line = line
        self._settings = settings
        self._source = source
        self._scratch = scratch
        label = f"{program.name}-{settings.round_trip_s * 1000:.0f}-{settings.bits_per_s}"
        self._home = scratch.make(label)
        self._name = label
        self._log = scratch.folder / "output.log"

    def perform(self, work: RemoteWork) -> RemoteSample:
        """Do a work once; a failure is in the sample."""
        works: dict[RemoteWork, Callable[[], RemoteSample]] = {
            RemoteWork.FIRST: self._first,
            RemoteWork.UNCHANGED: lambda: self._measured(self._backup()),
            RemoteWork.RESTORE: lambda: self._restore(self._source.folder),
            RemoteWork.RESTORE_ONE: lambda: self._restore(self._source.one),
            RemoteWork.MOUNT: self._mount,
            RemoteWork.FIND: self._find,
            RemoteWork.COPY: self._copy,
            RemoteWork.PRUNE: self._prune,
        }
        try:
            sample = works[work]()
        except (CommandError, TrialError, OSError) as error:
            sample = replace(self._sample(), failure=" ".join(str(error).split())[:300])
        return replace(sample, work=work.value)

    def _sample(self) -> RemoteSample:
        megabits = self._settings.bits_per_s // 1_000_000
        round_trip_ms = round(self._settings.round_trip_s * 1000)
        return RemoteSample(round_trip_ms, megabits, self._program.name, "")

    def _first(self) -> RemoteSample:
        self._run(self._program.initialise(self._home, self._line.port, self._name))
        return self._measured(self._backup())

    def _backup(self) -> Command:
        return self._program.backup(self._home, self._line.port, self._name, self._source.folder)

    def _find(self) -> RemoteSample:
        command = self._program.find(self._home, self._line.port, self._name, "*7.txt")
        sample = self._measured(command)
        found = self._log.read_bytes().count(b"7.txt")
        if found != SMALL_FILES // 10:
            raise TrialError(f"it found {found} names instead of {SMALL_FILES // 10}")
        return sample

    def _restore(self, what: Path) -> RemoteSample:
        with self._target() as target:
            command = self._program.restore(self._home, self._line.port, self._name, what, target)
            sample = self._measured(command)
            names = [what] if what.is_file() else [p for p in what.rglob("*") if p.is_file()]
            restored = {path.name: path for path in target.rglob("*") if path.is_file()}
            _require_equal(names, restored)
            return sample

    def _mount(self) -> RemoteSample:
        with self._mounted() as (_, sample, pids):
            return replace(sample, peak_bytes=server_usage(pids).peak_bytes)

    def _copy(self) -> RemoteSample:
        with self._mounted() as (inside, _, pids), self._target() as target:
            drop_kernel_cache()
            before = self._line.totals()
            command = Command(("cp", "-a", str(inside / self._source.small.name), str(target)))
            usage = self._run(command)
            sample = self._with_line(before, usage)
            restored = {path.name: path for path in target.rglob("*") if path.is_file()}
            _require_equal(sorted(self._source.small.iterdir()), restored)
            return replace(sample, peak_bytes=server_usage(pids).peak_bytes)

    def _prune(self) -> RemoteSample:
        for path in self._source.half:
            path.rename(path.with_name(f".{path.name} away"))
        away = self._source.folder.parent / "away"
        away.mkdir()
        try:
            for path in self._source.half:
                path.with_name(f".{path.name} away").rename(away / path.name)
            self._run(self._backup())
            port = self._line.port
            self._run(self._program.forget_first(self._home, port, self._name))
            return self._measured(self._program.prune(self._home, port, self._name))
        finally:
            for path in self._source.half:
                (away / path.name).rename(path)
            away.rmdir()

    def _measured(self, command: Command) -> RemoteSample:
        drop_kernel_cache()
        before = self._line.totals()
        return self._with_line(before, self._run(command))

    def _with_line(self, before: LineTotals, usage: Usage) -> RemoteSample:
        after = self._line.totals()
        return replace(
            self._sample(),
            wall_s=usage.wall_s,
            requests=after.requests - before.requests,
            sent_bytes=after.sent_bytes - before.sent_bytes,
            received_bytes=after.received_bytes - before.received_bytes,
            peak_bytes=usage.peak_bytes,
        )

    def _run(self, command: Command) -> Usage:
        return run(command, self._log, WORK_TIMEOUT_S)

    @contextmanager
    def _target(self) -> Iterator[Path]:
        target = self._scratch.make("target")
        try:
            yield target
        finally:
            self._scratch.remove(target)

    @contextmanager
    def _mounted(self) -> Iterator[tuple[Path, RemoteSample, tuple[int, ...]]]:
        """Yield the source's folder in a mount, the cost until it answered, and the server's processes."""
        mountpoint = self._scratch.make("mount")
        command = self._program.mount(self._home, self._line.port, self._name, mountpoint)
        drop_kernel_cache()
        before = self._line.totals()
        started = time.perf_counter()
        inside = self._program.mounted_root(mountpoint) / str(self._source.folder).lstrip("/")
        try:
            if not self._program.mount_stays:
                self._run(command)
                yield self._look_inside(mountpoint, inside, before, started, None)
                return
            with Child(command, self._scratch.folder / "server.log") as child:
                yield self._look_inside(mountpoint, inside, before, started, child)
                unmount(mountpoint)
        finally:
            unmount(mountpoint)
            self._scratch.remove(mountpoint)

    def _look_inside(
        self,
        mountpoint: Path,
        inside: Path,
        before: LineTotals,
        started: float,
        child: Child | None,
    ) -> tuple[Path, RemoteSample, tuple[int, ...]]:
        while mountpoint not in mounts_below(mountpoint):
            if child is not None and not child.running():
                raise CommandError(child.command, "ended before it mounted", child.tail())
            if time.perf_counter() - started > _MOUNT_TIMEOUT_S:
                raise TrialError("it was not mounted in time")
            time.sleep(_POLL_S)
        run(Command(("stat", str(inside))), self._scratch.folder / "look.log", _MOUNT_TIMEOUT_S)
        usage = Usage(time.perf_counter() - started, 0.0, 0, 0.0)
        return inside, self._with_line(before, usage), server_pids(mountpoint)


def drop_kernel_cache() -> None:
    """Drop the kernel's cache, where this user may."""
    if can_drop_caches() and os.geteuid() == 0:
        drop_caches()


def _require_equal(names: list[Path], restored: dict[str, Path]) -> None:
    """Raise TrialError unless every file came back with its bytes."""
    missing = [path.name for path in names if path.name not in restored]
    if missing or len(restored) != len(names):
        raise TrialError(f"{len(restored)} files came back instead of {len(names)}")
    wrong = [path for path in names if not filecmp.cmp(path, restored[path.name], shallow=False)]
    if wrong:
        raise TrialError(f"{wrong[0].name} came back with other bytes")
