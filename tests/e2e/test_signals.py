"""Ctrl-C at every moment of a command: it is never lost, and it never prints a traceback."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Casfs, Result, finish

SENTENCE = "casfs: interrupted; the repository is as intact as before"

# Sends the signal when the main thread first reaches a line of casfs. `argv[1]` names the line as
# "FILE:NUMBER" (empty: none), `argv[2]` a file for the lines in the order in which they were reached, for
# whether the signal was sent, and whether that was after the end of the work.
AT_LINE = """
import json, os, signal, sys
target, report = sys.argv[1:3]
sys.argv = ["casfs", *sys.argv[3:]]
import casfs
folder = os.path.dirname(casfs.__file__)
lines = {}

def trace(frame, event, argument):
    if not frame.f_code.co_filename.startswith(folder):
        return None
    if event == "line":
        line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        if line not in lines:
            lines[line] = None
            if line == target:
                state = sys.modules["casfs.interruption"]._state
                write_report(sent=True, late=state.exit_code is not None and not state.is_working)
                os.kill(os.getpid(), signal.SIGINT)
    return trace

def write_report(**found):
    with open(report, "w") as file:
        json.dump({"lines": list(lines), **found}, file)

# The handlers are there from the first line on that casfs runs.
import casfs.interruption
casfs.interruption.install()
sys.settrace(trace)
from casfs.__main__ import main
try:
    main()
finally:
    sys.settrace(None)
    if target not in lines:
        write_report(sent=False, late=False)
"""

# A sitecustomize module, for the command as it is installed. Sends the signal at one of the imports that
# follow once casfs handles signals; Python's own start, before casfs runs, is not covered. The number of
# that import is in SIGNAL_AT (0: none; "exit": when Python removes its modules), and REPORT names a file
# for the number of imports.
AT_IMPORT = """
import builtins, os, signal, sys
target, report = os.environ["SIGNAL_AT"], os.environ["REPORT"]
count = 0

def hook(event, arguments):
    global count
    # SIGHUP is the last signal of which casfs installs the handler.
    if event == "import" and signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL:
        count += 1
        if str(count) == target:
            os.kill(os.getpid(), signal.SIGINT)

class AtExit:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGINT):
        kill(pid, number)

if target == "exit":
    # The module builtins is the last one whose names are removed.
    builtins.at_exit = AtExit()
elif target == "0":
    import atexit
    atexit.register(lambda: open(report, "w").write(str(count)))
sys.addaudithook(hook)
"""


def interrupted_at(
    casfs: Casfs, line: str, report: Path, arguments: Sequence[str | Path]
) -> tuple[Result, dict[str, Any]]:
    """Run a command with a signal at a line; return its result and the report of AT_LINE."""
    report.unlink(missing_ok=True)
    argv = [sys.executable, "-c", AT_LINE, line, report, *arguments]
    process = subprocess.Popen(
        ["env", "--default-signal=INT", *argv],
        env=casfs.environment(),
        cwd=casfs.home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    result = finish(process)
    found: dict[str, Any] = json.loads(report.read_text())
    return result, found


VERBS = {
    "backup": ("backup", "source"),
    "restore": ("restore", "latest", "--target", "target"),
    "forget": ("forget", "--keep-last", "1", "--prune"),
    "check": ("check", "--read-data"),
    "ls": ("ls", "latest"),
}
SAMPLE = 16
"""The lines of each verb at which a run gets a signal: a sample, the same one for the same code."""


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_signal_at_a_sample_of_the_lines_of_a_verb_ends_it_and_is_never_lost(
    repository: Casfs, source: Path, tmp_path: Path, verb: str
) -> None:
    (repository.home / "source").symlink_to(source)
    for number in range(3):
        (source / "new").write_bytes(random.Random(number).randbytes(200_000))
        repository.backup("source/", "--no-parent")
    report = tmp_path / "report"
    assert repository.repository is not None
    pristine = repository.repository.with_name("pristine")
    shutil.copytree(repository.repository, pristine)
    completed, found = interrupted_at(repository, "", report, VERBS[verb])
    assert completed.exit == 0, completed
    lines = found["lines"]
    assert len(lines) > 1000
    interrupted = 0
    for line in random.Random(verb).sample(lines, SAMPLE):
        # Each run begins with the same repository and target, and so reaches the same lines.
        shutil.rmtree(repository.repository)
        shutil.copytree(pristine, repository.repository)
        shutil.rmtree(repository.home / "target", ignore_errors=True)
        result, found = interrupted_at(repository, line, report, VERBS[verb])
        # A line that only a slow or a fast run reaches may be missed.
        if found["sent"] and not found["late"]:
            assert result.exit == 130, (line, result)
            assert result.complaints == [SENTENCE], (line, result)
            interrupted += 1
        else:
            assert result.exit == 0, (line, result)
    assert interrupted > SAMPLE * 3 // 4
    assert repository.json("check", "--read-data").one("summary")["ok"] is True


def interrupted_at_import(
    casfs: Casfs, moment: int | str, report: Path, arguments: Sequence[str | Path]
) -> Result:
    """Run the installed command with a signal at a moment of AT_IMPORT."""
    folder = report.with_name("hook")
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(AT_IMPORT)
    prefix = ("env", f"PYTHONPATH={folder}", f"SIGNAL_AT={moment}", f"REPORT={report}")
    return finish(casfs.start(*arguments, prefix=prefix))


@pytest.mark.parametrize("verb", ["ls", "backup"])
def test_a_signal_while_the_command_starts_ends_it_with_one_sentence(
    repository: Casfs, source: Path, tmp_path: Path, verb: str
) -> None:
    """The moments are spread over the modules that casfs loads, from its first to its last."""
    repository.backup(source)
    arguments = ("ls", "latest") if verb == "ls" else ("backup", source)
    report = tmp_path / "report"
    assert interrupted_at_import(repository, 0, report, arguments).exit == 0
    imports = int(report.read_text())
    assert imports > 100
    # The last imports may belong to the exit, at which a signal changes nothing.
    for moment in range(1, imports * 9 // 10, imports // 12):
        result = interrupted_at_import(repository, moment, report, arguments)
        assert result.exit == 130, (moment, result)
        assert result.complaints == [SENTENCE], (moment, result)


def test_a_signal_while_python_exits_changes_nothing(
    repository: Casfs, source: Path, tmp_path: Path
) -> None:
    """Python has restored the default action of the signals by then, which would kill the process."""
    repository.backup(source)
    undisturbed = repository.run("ls", "latest")
    result = interrupted_at_import(repository, "exit", tmp_path / "report", ("ls", "latest"))
    assert (result.exit, result.out, result.err) == (0, undisturbed.out, b"")
