"""Run commands and measure wall time, processor time and peak memory.

The costs are the kernel's accounts of the children (`wait4`), without polling. They include all descendants
of a child that were waited for. One thread only.
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
    """A command ended with an unexpected exit code, or did not end in time."""

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
    """One call of a program; `environment` is added to the environment of the benchmark."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: Path | None = None
    good_exits: frozenset[int] = frozenset({0})


@dataclass(frozen=True, slots=True)
class Usage:
    """The cost of a finished command; `peak_bytes` is the peak memory of its largest process."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    foreign_cpu_s: float


@dataclass(frozen=True, slots=True)
class ServerUsage:
    """The cost of a mount's server until now."""

    cpu_s: float
    peak_bytes: int


class Child:
    """A running command in its own session; leaving the context ends it.

    So Ctrl-C at the terminal reaches only the benchmark, which then ends the child, and one signal
    reaches all processes of a pipeline.
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
        """Return whether the child is still running; do not reap it."""
        return self._process.returncode is None and not self._ended(0)

    def wait(self, timeout_s: float) -> resource.struct_rusage:
        """Reap the child and return its resource usage.

        Raises CommandError if it does not end in time (then it is killed) or fails.
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
        """End the child and its session with SIGTERM, then SIGKILL; do nothing if it has ended."""
        if self._process.returncode is None:
            for number in (signal.SIGTERM, signal.SIGKILL):
                if not self._ended(0):
                    self._signal(number)
                    self._ended(STOP_GRACE_S)
            self._reap()
        self._stream.close()

    def tail(self) -> str:
        """Return the end of the child's output, on one line."""
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
        # A process that outlives the leader of the session would disturb the next measurement.
        self._signal(signal.SIGKILL)
        os.close(self._pidfd)
        self._stream.close()
        return usage

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def run(command: Command, output: Path, timeout_s: float) -> Usage:
    """Run a command to its end and return its cost.

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
    """Return the busy time of all cores since boot in seconds, stolen time included."""
    with open("/proc/stat", encoding="ascii") as stream:
        ticks = [int(each) for each in stream.readline().split()[1:9]]
    user, nice, system, _idle, _iowait, hard, soft, steal = ticks
    return (user + nice + system + hard + soft + steal) / CLOCK_TICKS


def await_calm(patience_s: float) -> None:
    """Wait until the machine is idle, but no longer than `patience_s`."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        before_s = machine_cpu_s()
        time.sleep(CALM_WINDOW_S)
        if machine_cpu_s() - before_s < CALM_SHARE * CALM_WINDOW_S:
            return


def floor_bytes() -> int:
    """Return the memory below which a peak cannot be distinguished from that of the benchmark.

    A child starts as a copy of the harness, and the kernel keeps the greatest value that it ever
    saw for the process, also across the start of another program.
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def drop_caches() -> None:
    """Drop the kernel's caches of file contents, names and inodes; needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="ascii")


def can_drop_caches() -> bool:
    """Return whether `drop_caches` would work."""
    return os.access("/proc/sys/vm/drop_caches", os.W_OK)


def server_pids(mountpoint: Path) -> tuple[int, ...]:
    """Return the ids of the processes that have the mountpoint among their arguments."""
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


def with_server(client: Usage, before: ServerUsage, after: ServerUsage) -> Usage:
    """Return the cost of a reader together with that of the mount's server meanwhile."""
    served_s = after.cpu_s - before.cpu_s
    return Usage(
        wall_s=client.wall_s,
        cpu_s=client.cpu_s + served_s,
        peak_bytes=after.peak_bytes,
        foreign_cpu_s=max(0.0, client.foreign_cpu_s - served_s),
    )


def server_usage(pids: tuple[int, ...]) -> ServerUsage:
    """Return the cost of the server processes; those that have ended count nothing."""
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
