"""Runs commands and says what they cost: wall time, processor time, peak memory.

Costs come from the kernel's accounts of the very children (`wait4`), never from polling, and hold
for the whole tree of processes below a child as far as its members were waited for. Used from one
thread only.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
STOP_GRACE_S = 20.0
TAIL_BYTES = 2000
CALM_WINDOW_S = 1.0
CALM_SHARE = 0.1


class CommandError(Exception):
    """A command that ended with an unexpected code, or not in time."""

    def __init__(self, command: Command, outcome: str, said: str) -> None:
        super().__init__(command, outcome, said)
        self.command = command
        self.outcome = outcome
        self.said = said

    def __str__(self) -> str:
        shown = " ".join(self.command.argv)
        return f"`{shown}` {self.outcome}" + (f": {self.said}" if self.said else "")


@dataclass(frozen=True, slots=True)
class Command:
    """One invocation of a program; `environment` is laid over the harness's own."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: Path | None = None
    good_exits: frozenset[int] = frozenset({0})


@dataclass(frozen=True, slots=True)
class Usage:
    """What a finished command cost; `peak_bytes` is that of its largest process."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    foreign_cpu_s: float


@dataclass(frozen=True, slots=True)
class ServerUsage:
    """What a mount's server has cost until now."""

    cpu_s: float
    peak_bytes: int


class Child:
    """A running command in a session of its own; leaving the context ends it.

    A session of its own keeps Ctrl-C at the terminal for the harness, which then ends the child
    itself, and lets one signal reach all that a pipeline started.
    """

    def __init__(self, command: Command, output: Path) -> None:
        self.command = command
        self.output = output
        self._stream: IO[bytes] = output.open("wb")
        try:
            self._process = subprocess.Popen(
                command.argv,
                stdin=subprocess.DEVNULL,
                stdout=self._stream,
                stderr=subprocess.STDOUT,
                cwd=command.directory,
                env={**os.environ, **command.environment},
                start_new_session=True,
            )
        except OSError as error:
            self._stream.close()
            raise CommandError(command, "could not be started", str(error)) from error
        self._pidfd = os.pidfd_open(self._process.pid)

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The process id, valid until `wait` or `stop` returned."""
        return self._process.pid

    def running(self) -> bool:
        """Say whether the child has not ended yet; does not reap it."""
        return self._process.returncode is None and not self._ended(0)

    def wait(self, timeout_s: float) -> resource.struct_rusage:
        """Reap the child and return its accounts.

        Raises CommandError where it is not done in time (it is killed then) or ended badly.
        """
        if not self._ended(timeout_s):
            self.stop()
            raise CommandError(self.command, f"was not done in {timeout_s:.0f} s", self.tail())
        usage = self._reap()
        code = self._process.returncode
        if code not in self.command.good_exits:
            outcome = f"ended with code {code}" if code >= 0 else f"was killed by signal {-code}"
            raise CommandError(self.command, outcome, self.tail())
        return usage

    def stop(self) -> None:
        """End the child and its session, politely first; harmless when it is over."""
        if self._process.returncode is None:
            for number in (signal.SIGTERM, signal.SIGKILL):
                if not self._ended(0):
                    self._signal(number)
                    self._ended(STOP_GRACE_S)
            self._reap()
        self._stream.close()

    def tail(self) -> str:
        """Return the end of what the child said, on one line."""
        with self.output.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - TAIL_BYTES))
            lines = stream.read().decode(errors="replace").split("\n")
        return " / ".join(line.strip() for line in lines[-6:] if line.strip(" ^~"))

    def _ended(self, timeout_s: float) -> bool:
        if self._process.returncode is not None:
            return True
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))

    def _reap(self) -> resource.struct_rusage:
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        # Whoever of the session outlives its leader would disturb the next measurement.
        self._signal(signal.SIGKILL)
        os.close(self._pidfd)
        self._stream.close()
        return usage

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def run(command: Command, output: Path, timeout_s: float) -> Usage:
    """Run a command to its end and return what it cost.

    What it leaves running must be in a session of its own, as the server of a mount is.
    """
    busy_before_s = machine_cpu_s()
    started = time.perf_counter()
    with Child(command, output) as child:
        accounts = child.wait(timeout_s)
        wall_s = time.perf_counter() - started
    cpu_s = accounts.ru_utime + accounts.ru_stime
    return Usage(
        wall_s=wall_s,
        cpu_s=cpu_s,
        peak_bytes=accounts.ru_maxrss * 1024,
        foreign_cpu_s=max(0.0, machine_cpu_s() - busy_before_s - cpu_s),
    )


def machine_cpu_s() -> float:
    """Return the time that all cores were busy since boot, in seconds, stolen time included."""
    with open("/proc/stat", encoding="ascii") as stream:
        ticks = [int(each) for each in stream.readline().split()[1:9]]
    user, nice, system, _idle, _iowait, hard, soft, steal = ticks
    return (user + nice + system + hard + soft + steal) / CLOCK_TICKS


def await_calm(patience_s: float) -> None:
    """Wait until nothing else keeps the machine busy, but no longer than `patience_s`."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        before_s = machine_cpu_s()
        time.sleep(CALM_WINDOW_S)
        if machine_cpu_s() - before_s < CALM_SHARE * CALM_WINDOW_S:
            return


def floor_bytes() -> int:
    """Return the memory below which a peak can't be told from the harness's own.

    A child starts as a copy of the harness, and the kernel keeps the greatest value that it ever
    saw for the process, also across the start of another program.
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def drop_caches() -> None:
    """Make the kernel forget all file contents, names and inodes; needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="ascii")


def can_drop_caches() -> bool:
    """Say whether `drop_caches` would work."""
    return os.access("/proc/sys/vm/drop_caches", os.W_OK)


def server_pids(mountpoint: Path) -> tuple[int, ...]:
    """Return the processes that have the mountpoint among their arguments."""
    wanted = os.fsencode(mountpoint)
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                arguments = Path(entry.path, "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if wanted in arguments:
                found.append(int(entry.name))
    return tuple(found)


def server_usage(pids: tuple[int, ...]) -> ServerUsage:
    """Return what the server processes have cost; those that ended meanwhile count nothing."""
    cpu_s = 0.0
    peak_bytes = 0
    for pid in pids:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
            status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
        except OSError:
            continue
        ticks = stat.rpartition(")")[2].split()[11:13]
        cpu_s += sum(map(int, ticks)) / CLOCK_TICKS
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                peak_bytes = max(peak_bytes, int(line.split()[1]) * 1024)
    return ServerUsage(cpu_s, peak_bytes)
