"""Processes of a run: the verbs that are its steps, and the commands of its hooks.

Each step is a process of its own that runs the same verb as a person would, with `--json`. If it crashes, or
the kernel kills it for its memory, the other steps and the notification still run. Its memory is free before
the next step. Its exit code and one JSON object are the whole interface.

Each process leads its own process group, so that Ctrl-C in a terminal and SIGTERM reach only the run. The run
passes the first interruption on and waits until the process has ended. It kills the process at the second.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from casfs import interruption
from casfs.json_document import InvalidJsonError, parse_json
from casfs.run.outcome import EXIT_FAILED, EXIT_INTERRUPTED, HookOutcome, JsonObject

_MAX_PROBLEMS = 20
"""How many problems of a step the summary holds; the others are counted."""

_MAX_LINE_BYTES = 1024 * 1024
_STDERR = 2
_PROBLEM_TYPES = ("problem", "damage")
_ACCOMPANYING_TYPES = frozenset(["progress", "entry", "requests"])


@dataclass(slots=True)
class VerbOutput:
    """The output of a verb with `--json` so far, in bounded memory.

    `result` is the last object that is no problem, no error, and not of a type that only accompanies the
    work. `on_problem` receives every problem, `problems` holds only the first.
    """

    on_problem: Callable[[JsonObject], None] | None = None
    result: JsonObject | None = None
    error: str | None = None
    problems: tuple[JsonObject, ...] = ()
    problem_count: int = 0

    def add_line(self, line: bytes) -> None:
        """Record a line; ignore it if it is not a JSON object."""
        try:
            value = parse_json(line, dict[str, Any])
        except InvalidJsonError:
            return
        kind = value.get("type")
        if kind in _PROBLEM_TYPES:
            self.problem_count += 1
            if self.on_problem is not None:
                self.on_problem(value)
            if len(self.problems) < _MAX_PROBLEMS:
                self.problems = (*self.problems, value)
        elif kind == "error":
            self.error = str(value.get("message"))
        elif kind not in _ACCOMPANYING_TYPES:
            self.result = value


@dataclass(frozen=True, slots=True)
class VerbEnd:
    """The end of a verb: its exit code, its output and its duration."""

    exit: int
    output: VerbOutput
    started_s: float
    seconds: float
    was_interrupted: bool = False


class VerbRunner:
    """Run verbs of casfs; `arguments` precede the own arguments of each verb.

    Each process keeps `lock_fd` open, so that the lock of the profile lasts as long as one of them runs.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        lock_fd: int | None = None,
        program: Sequence[str] | None = None,
    ) -> None:
        # Without -P, Python would import a casfs in the current folder, which another user may have written.
        self._program = program or (sys.executable, "-P", "-m", "casfs")
        self._arguments = arguments
        self._environment = environment
        self._inherited = () if lock_fd is None else (lock_fd,)

    def run(
        self, verb: Sequence[str], on_problem: Callable[[JsonObject], None] | None = None
    ) -> VerbEnd:
        """Run a verb to its end; its stderr goes to the stderr of this process.

        Does not raise KeyboardInterrupt: the process receives the interruption, and `was_interrupted` is set.
        """
        started_s, start = time.time(), time.monotonic()
        output = VerbOutput(on_problem)
        command = [*self._program, verb[0], *self._arguments, "--json", *verb[1:]]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                env=dict(self._environment),
                pass_fds=self._inherited,
                process_group=0,
            )
        except (OSError, ValueError) as error:
            output.error = f"cannot be started: {error}"
            return VerbEnd(EXIT_FAILED, output, started_s, time.monotonic() - start)
        with process:
            assert process.stdout is not None
            pipe = process.stdout
            interrupted = _finish(process, lambda: _read_lines(pipe, output))
        code = process.returncode
        if interrupted:
            code = EXIT_INTERRUPTED
        elif code < 0:
            output.error = f"was ended by {_signal_name(-code)}"
            code = EXIT_FAILED
        return VerbEnd(code, output, started_s, time.monotonic() - start, interrupted)


def run_hook(name: str, command: str, text: bytes, environment: Mapping[str, str]) -> HookOutcome:
    """Run a hook in a shell with `text` on its standard input; raises KeyboardInterrupt.

    Its output goes to stderr, because stdout is for the results of the run.
    """
    start = time.monotonic()
    # A file, because a hook that reads nothing would leave a pipe full and the run waiting.
    with tempfile.TemporaryFile() as file:
        file.write(text)
        file.seek(0)
        process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=file,
            stdout=_STDERR,
            env=dict(environment),
            process_group=0,
        )
        interrupted = _finish(process, process.wait)
    if interrupted:
        raise KeyboardInterrupt
    code = process.returncode
    return HookOutcome(
        hook=name, exit=code if code >= 0 else 128 - code, seconds=time.monotonic() - start
    )


def _finish(process: subprocess.Popen[bytes], work: Callable[[], object]) -> bool:
    """Do the work that ends with the process; return whether the process received an interruption.

    The work continues after an interruption, because a process that waits for a full pipe never ends.
    """
    try:
        work()
        process.wait()
        return False
    except KeyboardInterrupt as error:
        interruption.acknowledge(error)
        _signal_group(process, signal.SIGTERM)
    except BaseException:
        _signal_group(process, signal.SIGKILL)
        raise
    try:
        work()
        process.wait()
    except KeyboardInterrupt as error:
        interruption.acknowledge(error)
        _signal_group(process, signal.SIGKILL)
        process.wait()
    return True


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.poll() is None:
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            pass


def _read_lines(pipe: IO[bytes], output: VerbOutput) -> None:
    while line := pipe.readline(_MAX_LINE_BYTES):
        output.add_line(line)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
