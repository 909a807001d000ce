"""Ctrl-C at every moment of a command: it is never lost, and it never prints a traceback."""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.cli import Casfs, Result, finish
from tests.support.waiting import wait_until

SENTENCE = "casfs: interrupted; the repository is as intact as before"

# Counts the lines of casfs that the main thread runs, and sends the signal at one of them. `argv[1]` is the
# number of that line (0: none), `argv[2]` a file for the number of lines and for whether the work had ended.
DRIVER = """
import os, signal, sys
target, report = int(sys.argv[1]), sys.argv[2]
sys.argv = ["casfs", *sys.argv[3:]]
import casfs
folder = os.path.dirname(casfs.__file__)
count = 0
late = False

def trace(frame, event, argument):
    global count, late
    if not frame.f_code.co_filename.startswith(folder):
        return None
    if event == "line":
        count += 1
        if count == target:
            state = sys.modules["casfs.interruption"]._state
            late = state.exit_code is not None
            write_report()
            os.kill(os.getpid(), signal.SIGINT)
    return trace

def write_report():
    with open(report, "w") as file:
        file.write(f"{count} {late:d}")

# The handlers are there from the first line on that casfs runs.
import casfs.interruption
casfs.interruption.install()
sys.settrace(trace)
from casfs.__main__ import main
try:
    main()
finally:
    sys.settrace(None)
    if not target:
        write_report()
"""


def interrupted_at(
    casfs: Casfs, line: int, report: Path, arguments: Sequence[str | Path]
) -> tuple[Result, int, bool]:
    """Run a command with a signal at a line; return its result, the lines, and if the work had ended."""
    argv = [sys.executable, "-c", DRIVER, str(line), report, *arguments]
    process = subprocess.Popen(
        ["env", "--default-signal=INT", *argv],
        env=casfs.environment(),
        cwd=casfs.home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    result = finish(process)
    lines, late = report.read_text().split()
    return result, int(lines), late == "1"


VERBS = {
    "backup": ("backup", "source"),
    "restore": ("restore", "latest", "--target", "target"),
    "forget": ("forget", "--keep-last", "1", "--prune"),
    "check": ("check", "--read-data"),
    "ls": ("ls", "latest"),
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_signal_at_any_line_of_a_verb_ends_it_and_is_never_lost(
    repository: Casfs, source: Path, tmp_path: Path, verb: str
) -> None:
    (repository.home / "source").symlink_to(source)
    for _ in range(3):
        (source / "new").write_bytes(os.urandom(200_000))
        repository.backup("source/", "--no-parent")
    report = tmp_path / "report"
    assert repository.repository is not None
    pristine = repository.repository.with_name("pristine")
    shutil.copytree(repository.repository, pristine)
    _, lines, _ = interrupted_at(repository, 0, report, VERBS[verb])
    assert lines > 1000
    dice = random.Random(verb)
    chosen = [*range(1, 60, 20), *sorted(dice.sample(range(60, lines * 9 // 10), 25))]
    for line in chosen:
        # Each run begins with the same repository, and so reaches the same lines.
        shutil.rmtree(repository.repository)
        shutil.copytree(pristine, repository.repository)
        report.unlink()
        result, _, late = interrupted_at(repository, line, report, VERBS[verb])
        if late:
            assert result.exit == 0, (line, result)
        else:
            assert result.exit == 130, (line, result)
            assert result.complaints == [SENTENCE], (line, result)
    assert repository.json("check", "--read-data").one("summary")["ok"] is True


def handles_signals(pid: int) -> bool:
    """Return whether a process has handlers for SIGTERM: those of casfs, as Python has none."""
    try:
        with open(f"/proc/{pid}/status") as file:
            caught = next(line for line in file if line.startswith("SigCgt:"))
    except (FileNotFoundError, ProcessLookupError, StopIteration):
        return False
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def is_ready_or_ended(process: subprocess.Popen[bytes]) -> bool:
    return handles_signals(process.pid) or process.poll() is not None


@pytest.mark.parametrize("verb", ["ls", "backup"])
def test_a_signal_while_the_command_starts_ends_it_with_one_sentence(
    repository: Casfs, source: Path, verb: str
) -> None:
    """The moments are spread over the time in which casfs loads its modules, and some more."""
    repository.backup(source)
    arguments = ("ls", "latest") if verb == "ls" else ("backup", source)
    interrupted = 0
    for moment in range(12):
        process = repository.start(*arguments)
        wait_until(
            functools.partial(is_ready_or_ended, process), "the signals are handled", every=0.0005
        )
        time.sleep(moment * 0.02)
        os.killpg(process.pid, signal.SIGINT)
        result = finish(process)
        assert result.exit in (0, 130), result
        assert result.complaints == ([SENTENCE] if result.exit == 130 else []), result
        interrupted += result.exit == 130
    assert interrupted >= 3
