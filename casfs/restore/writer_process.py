"""Processes that write the small entries of a large restore, beside the restore's own process.

To create a small file costs a few system calls and as much interpreter time, and the interpreter runs one
thread at a time: a thread gains little, a process a core. A process gets batches through memory that both
share, so a request is a few bytes and never waits for the process to read it. A process that ends
unexpectedly is given up, and the restore writes its batches again itself. One thread.
"""

from __future__ import annotations

import logging
import mmap
import os
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import NamedTuple

import msgspec

from casfs.format.tree import Node
from casfs.restore.entry_writer import EntryResult, WritingOptions
from casfs.restore.temporary_entries import remove_abandoned
from casfs.restore.writer_server import (
    MAX_DIRECTORIES,
    MEMORY_BYTES,
    REPLY,
    REQUEST,
    SLOT_BYTES,
    SLOTS,
    SLOTS_BEGIN,
    STARTED,
    BatchEntry,
    EntryOutcome,
)
from casfs.server_process import start_server_process

log = logging.getLogger(__name__)

_MOST_PROCESSES = 3
"""The restore's own process, which walks and decompresses, has no work for more."""

_SERVER = "casfs.restore.writer_server"

_BLOCKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP)
"""A terminal sends these to both: the restore ends the process, and waits for it after a pause."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[EntryOutcome])


class EntryJob(NamedTuple):
    """An entry to write: the directory's descriptor and whether it is fresh, and its only chunk if read."""

    fd: int
    is_fresh: bool
    path: bytes
    node: Node
    chunk: bytes | None


Run = Callable[[EntryJob], EntryResult]


def process_count() -> int:
    """Return how many processes write beside this one: one for each other core, up to a limit."""
    return min(len(os.sched_getaffinity(0)) - 1, _MOST_PROCESSES)


class WriterProcesses:
    """Up to `count` processes that write entries; `run` writes one in this process. Close them."""

    def __init__(self, options: WritingOptions, run: Run, count: int) -> None:
        self._run = run
        self._processes: list[_WriterProcess] = []
        try:
            for _ in range(count):
                self._processes.append(_WriterProcess(options))
        except OSError as error:
            log.info("the restore writes in fewer processes: %s", error)

    def submit(self, jobs: list[EntryJob]) -> _Batch | None:
        """Give a batch to the process with the least to do; return None where all have enough."""
        process = max(self._processes, key=_WriterProcess.count_free, default=None)
        if process is None or not process.count_free():
            return None
        return process.send(jobs, self._run)

    def close(self) -> None:
        """End the processes; wait for those with a batch to finish their current entries."""
        for process in self._processes:
            process.stop()
        for process in self._processes:
            process.close()


class _Batch:
    """A batch that a process has, or that it had when it ended."""

    def __init__(self, process: _WriterProcess, jobs: list[EntryJob], run: Run) -> None:
        self._process = process
        self._jobs = jobs
        self._run = run
        self.outcomes: list[EntryOutcome] | None = None

    def done(self) -> bool:
        """Return whether the process has written the batch, or has ended."""
        self._process.receive(wait=False)
        return self.outcomes is not None or self._process.is_dead

    def result(self) -> list[EntryResult]:
        """Wait for the process; return the results of the entries."""
        while self.outcomes is None and not self._process.is_dead:
            self._process.receive(wait=True)
        if self.outcomes is None:
            # It may have written a part, which is written again, and left a temporary file.
            for fd in {job.fd for job in self._jobs}:
                remove_abandoned(fd)
            return [self._run(job) for job in self._jobs]
        results = [EntryResult(job.path, job.node, written=True) for job in self._jobs]
        for outcome in self.outcomes:
            job = self._jobs[outcome.entry]
            results[outcome.entry] = outcome.result(job.path, job.node)
        return results


class _WriterProcess:
    """One process, with its memory and its connection. `is_dead` is set when it ended unexpectedly."""

    def __init__(self, options: WritingOptions) -> None:
        self.is_dead = False
        self._is_started = False
        self._free = list(range(SLOTS))
        self._batches: dict[int, _Batch] = {}
        memory_fd = os.memfd_create("casfs-restore")
        with ExitStack() as on_error:
            try:
                os.ftruncate(memory_fd, MEMORY_BYTES)
                self._memory = on_error.enter_context(mmap.mmap(memory_fd, MEMORY_BYTES))
                own, other = socket.socketpair()
                self._connection = on_error.enter_context(own)
                with other:
                    self._pid = start_server_process(_SERVER, other.fileno(), blocked=_BLOCKED)
                socket.send_fds(self._connection, [_encoder.encode(options)], [memory_fd])
            finally:
                os.close(memory_fd)
            on_error.pop_all()

    def count_free(self) -> int:
        """Return how many more batches the process takes now; none before it has started."""
        self.receive(wait=False)
        return len(self._free) if self._is_started and not self.is_dead else 0

    def send(self, jobs: list[EntryJob], run: Run) -> _Batch | None:
        """Send a batch; return None where it does not fit into a slot, or the process has ended."""
        directories: dict[int, int] = {}
        entries = []
        chunks_bytes = 0
        for fd, is_fresh, _, node, chunk in jobs:
            directory = directories.setdefault(fd, len(directories))
            if chunk is None:
                entries.append(BatchEntry(directory, is_fresh, node, -1, 0))
            else:
                begin = SLOT_BYTES - chunks_bytes - len(chunk)
                entries.append(BatchEntry(directory, is_fresh, node, begin, len(chunk)))
                chunks_bytes += len(chunk)
        head = _encoder.encode(entries)
        if len(head) + chunks_bytes > SLOT_BYTES or len(directories) > MAX_DIRECTORIES:
            return None
        slot = self._free[-1]
        base = SLOTS_BEGIN + slot * SLOT_BYTES
        self._memory[base : base + len(head)] = head
        for entry, job in zip(entries, jobs, strict=True):
            if job.chunk is not None:
                begin = base + entry.begin
                self._memory[begin : begin + entry.size] = job.chunk
        try:
            socket.send_fds(self._connection, [REQUEST.pack(slot, len(head))], list(directories))
        except OSError as error:
            self._give_up(error)
            return None
        self._free.pop()
        batch = self._batches[slot] = _Batch(self, jobs, run)
        return batch

    def receive(self, wait: bool) -> None:
        """Take the next reply; without `wait`, all replies that have arrived."""
        try:
            while not self.is_dead and self._receive_one(wait) and not wait:
                pass
        except (OSError, EOFError, msgspec.DecodeError) as error:
            self._give_up(error)

    def _receive_one(self, wait: bool) -> bool:
        size = REPLY.size if self._is_started else len(STARTED)
        try:
            begun = self._connection.recv(size, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        if not begun:
            raise EOFError("it closed its connection")
        head = begun + self._read(size - len(begun))
        if not self._is_started:
            self._is_started = True
            return True
        slot, outcomes_bytes = REPLY.unpack(head)
        outcomes = _decoder.decode(self._read(outcomes_bytes)) if outcomes_bytes else []
        self._batches.pop(slot).outcomes = outcomes
        self._free.append(slot)
        return True

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._connection.recv(size - len(data))
            if not part:
                raise EOFError("it closed its connection")
            data += part
        return data

    def _give_up(self, error: Exception) -> None:
        self.is_dead = True
        self._signal(signal.SIGKILL)
        self._reap()
        log.warning(
            "a process that writes restored files ended (%s); the restore goes on without it", error
        )

    def stop(self) -> None:
        """Let the process end before its next entry; kill one without a batch, which may not even start."""
        self._memory[0] = 1
        self._connection.close()
        if not self.is_dead:
            # One that was stopped would never end.
            self._signal(signal.SIGCONT if self._batches else signal.SIGKILL)

    def close(self) -> None:
        """Wait for the end of the process, after `stop`."""
        if not self.is_dead:
            self._reap()
        self._memory.close()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ChildProcessError, ProcessLookupError):
            # Where SIGCHLD is ignored, another process may have its id once it has ended.
            os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            os.kill(self._pid, number)

    def _reap(self) -> None:
        with suppress(ChildProcessError):  # where SIGCHLD is ignored there is nothing to wait for
            os.waitpid(self._pid, 0)
