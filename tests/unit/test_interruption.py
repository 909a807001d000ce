"""An interruption that other code drops is raised again; one that was handled is not."""

from __future__ import annotations

import subprocess
import sys

import pytest

BEGIN = """
import os, signal, sys, time
from casfs import interruption
interruption.install()
interruption.begin()

def wait():
    end = time.monotonic() + 30
    while time.monotonic() < end:
        time.sleep(0.01)

"""

DROPPED = """
class Noisy:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass

try:
    noisy = Noisy()
    del noisy
    wait()
except KeyboardInterrupt:
    interruption.end(130)
    print("raised")
"""

SWALLOWED = """
try:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        wait()
    except BaseException:
        pass
    wait()
except KeyboardInterrupt:
    interruption.end(130)
    print("raised")
"""

ACKNOWLEDGED = """
try:
    os.kill(os.getpid(), signal.SIGINT)
    wait()
except KeyboardInterrupt as error:
    interruption.acknowledge(error)
for _ in range(1000):
    pass
print("goes on")
try:
    os.kill(os.getpid(), signal.SIGINT)
    wait()
except KeyboardInterrupt:
    interruption.end(130)
    print("raised")
"""

UNWINDING = """
try:
    try:
        os.kill(os.getpid(), signal.SIGINT)
        wait()
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass
        print("released")
except KeyboardInterrupt:
    interruption.end(130)
    print("raised")
"""

IMPATIENT = """
interruption.GRACE_S = 0
try:
    os.kill(os.getpid(), signal.SIGINT)
    wait()
finally:
    os.kill(os.getpid(), signal.SIGINT)
    wait()
"""

BEFORE = """
interruption.end(0)
interruption._state.exit_code = None
os.kill(os.getpid(), signal.SIGINT)
wait()
"""

AFTER = """
interruption.end(3)
os.kill(os.getpid(), signal.SIGINT)
wait()
"""

EXITING = """
import builtins

class AtExit:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGTERM):
        kill(pid, number)

builtins.at_exit = AtExit()  # the last module whose names Python removes
interruption.end(0)
sys.exit(3)
"""

STUCK = """
interruption.end_stuck_process(0.2)
# As while the kernel does not return: the signal stays pending.
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.kill(os.getpid(), signal.SIGTERM)
wait()
print("not ended")
"""

NOT_STUCK = """
interruption.end_stuck_process(0.2)
try:
    os.kill(os.getpid(), signal.SIGTERM)
    wait()
except KeyboardInterrupt:
    time.sleep(1)
    interruption.end(130)
    print("raised")
"""

SENTENCE = "casfs: interrupted; the repository is as intact as before\n"


@pytest.mark.parametrize(
    ("script", "exit_code", "out", "err"),
    [
        pytest.param(DROPPED, 0, "raised\n", "", id="dropped in a destructor"),
        pytest.param(SWALLOWED, 0, "raised\n", "", id="swallowed by an except clause"),
        pytest.param(ACKNOWLEDGED, 0, "goes on\nraised\n", "", id="acknowledged"),
        pytest.param(UNWINDING, 0, "released\nraised\n", "", id="twice by one key press"),
        pytest.param(IMPATIENT, 130, "", SENTENCE, id="again while the stack unwinds"),
        pytest.param(BEFORE, 130, "", SENTENCE, id="before the work"),
        pytest.param(AFTER, 3, "", "", id="after the work"),
        pytest.param(EXITING, 3, "", "", id="while Python exits"),
        pytest.param(STUCK, 130, "", SENTENCE, id="while the kernel does not return"),
        pytest.param(NOT_STUCK, 0, "raised\n", "", id="handled in time"),
    ],
)
def test_a_signal_is_handled_once_and_never_lost(
    script: str, exit_code: int, out: str, err: str
) -> None:
    done = subprocess.run(
        ["env", "--default-signal=INT", sys.executable, "-c", BEGIN + script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (exit_code, out, err)


def test_a_signal_that_the_parent_process_ignores_stays_ignored() -> None:
    script = BEGIN + "os.kill(os.getpid(), signal.SIGINT)\nprint('goes on')\ninterruption.end(0)"
    done = subprocess.run(
        ["env", "--ignore-signal=INT", sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "goes on\n", "")
