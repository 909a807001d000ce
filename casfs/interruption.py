"""Signals that end a command: Ctrl-C, SIGTERM and SIGHUP are never lost and never print a traceback.

Until `begin` and after `end`, a signal ends the process at once: no work is in progress that needs an
end of its own. In between, it raises `Interruption` on the main thread, and the blocks that the exception
leaves release their locks and temporary files. Code written in C may drop an exception that a signal
handler raised; an `Interruption` that is dropped is therefore raised again, unless `acknowledge` was
called with it. Once the interpreter removes its handlers, a signal is ignored: the process is about to
exit with its code. A second signal while the first still unwinds the stack ends the process at once, but not
within `GRACE_S`: a terminal and a parent process often both send one.

A call into the kernel may never return, such as one that waits for a disk or a server that does not answer;
the main thread then handles no signal. `end_stuck_process` starts a thread that ends the process where a
signal stays pending.

This module imports little, because it is loaded before everything else. Main thread only.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

EXIT_INTERRUPTED = 130
GRACE_S = 1.0
STUCK_S = 5.0
"""How long a signal may stay pending before the main thread counts as stuck in the kernel."""

_LOOK_S = 0.5
_RAISED_AGAIN_S = 0.001
"""The time after which a dropped interruption is raised again, by a signal that also ends a blocking call."""

MESSAGE = "interrupted; the repository is as intact as before"

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_DEFAULT_HANDLERS = (signal.SIG_DFL, signal.default_int_handler)


class Interruption(KeyboardInterrupt):
    """A signal asked the command to end. Dropped by a caller that did not handle it, it is raised again."""

    def __init__(self) -> None:
        super().__init__()
        self.is_handled = False

    def __del__(self) -> None:
        if not self.is_handled and _state.is_working:
            # Not here: an exception that a destructor raises is dropped, too.
            _state.unwinding = None
            signal.setitimer(signal.ITIMER_REAL, _RAISED_AGAIN_S)


class _State:
    """What a signal does now: `exit_code` is the exit code of a process that it ends at once."""

    def __init__(self) -> None:
        self.is_working = False
        self.exit_code: int | None = None
        self.raised_at = 0.0
        self.unwinding: weakref.ref[Interruption] | None = None
        self.on_signal: Callable[[], None] | None = None


_state = _State()


def install() -> None:
    """Handle the signals from now on, except those that the parent process had ignored."""
    for number in _SIGNALS:
        if signal.getsignal(number) in _DEFAULT_HANDLERS:
            signal.signal(number, _handle)
    signal.signal(signal.SIGALRM, _handle)
    sys.unraisablehook = _report_unraisable
    # Registered before all other functions, and so called after them.
    atexit.register(_ignore)


def on_signal(action: Callable[[], None]) -> None:
    """Call `action` before an Interruption is raised; it ends the waits of other threads."""
    _state.on_signal = action


def end_stuck_process(stuck_s: float = STUCK_S) -> None:
    """Start a thread that ends the process where the main thread does not handle a signal in time.

    A signal is pending as long as the main thread is in the kernel and does not return from there.
    """
    threading.Thread(target=_watch, args=(stuck_s,), name="casfs-signals", daemon=True).start()


def _watch(stuck_s: float) -> None:
    # `sigpending` returns only signals that the calling thread blocks.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    pending_since: float | None = None
    while True:
        time.sleep(min(_LOOK_S, stuck_s))
        now = time.monotonic()
        if not signal.sigpending() & set(_SIGNALS):
            pending_since = None
        elif pending_since is None:
            pending_since = now
        elif now - pending_since >= stuck_s:
            _print_interrupted()
            os._exit(EXIT_INTERRUPTED)


def begin() -> None:
    """Begin the work: from now on a signal raises Interruption."""
    _state.exit_code = None
    _state.is_working = True


def end(exit_code: int) -> None:
    """End the work: from now on a signal ends the process at once, with this exit code."""
    _state.exit_code = exit_code
    _state.is_working = False
    signal.setitimer(signal.ITIMER_REAL, 0)


def acknowledge(error: KeyboardInterrupt) -> None:
    """Take over an interruption: the caller ends its work itself, and nothing is raised again."""
    if isinstance(error, Interruption):
        error.is_handled = True
        _state.unwinding = None


def _handle(number: int, frame: FrameType | None) -> None:
    if not _state.is_working:
        if _state.exit_code is None:
            _print_interrupted()
            os._exit(EXIT_INTERRUPTED)
        os._exit(_state.exit_code)
    now = time.monotonic()
    if _state.unwinding is not None and _state.unwinding() is not None:
        if now - _state.raised_at < GRACE_S:
            return
        _print_interrupted()
        os._exit(EXIT_INTERRUPTED)
    if _state.on_signal is not None:
        _state.on_signal()
    error = Interruption()
    _state.unwinding, _state.raised_at = weakref.ref(error), now
    try:
        raise error
    finally:
        del error  # this frame is in the traceback: a reference would keep the exception alive


def _ignore() -> None:
    """Ignore the signals: the interpreter would restore the default actions, which kill the process."""
    for number in (*_SIGNALS, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)


def _print_interrupted() -> None:
    """Print the message without Python's streams, which the interrupted code may be using."""
    try:
        os.write(2, f"casfs: {MESSAGE}\n".encode())
        if "--json" in sys.argv:
            line = f'{{"type": "error", "message": "{MESSAGE}", "exit": {EXIT_INTERRUPTED}}}\n'
            os.write(1, line.encode())
    except OSError:
        return  # the process ends in any case


def _report_unraisable(unraisable: UnraisableHookArgs) -> None:
    """Print an error that Python cannot raise, except an Interruption, which is raised again."""
    if not isinstance(unraisable.exc_value, Interruption):
        sys.__unraisablehook__(unraisable)
