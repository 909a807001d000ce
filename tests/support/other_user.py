"""Act as another user of the machine, beside the code under test."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

OTHER_USER = 65534
"""The ids of the user `nobody` and its group on Linux; no file of a test belongs to them by chance."""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it acts as another user")


def as_other_user(act: Callable[[], object]) -> bool:
    """Run `act` in a child process of an ordinary user; return whether it raised no OSError.

    The child shares open descriptors, so it reaches folders below ones that it may not enter.
    """
    pid = os.fork()
    if pid == 0:
        code = 2
        try:
            os.setgroups([])
            os.setresgid(OTHER_USER, OTHER_USER, OTHER_USER)
            os.setresuid(OTHER_USER, OTHER_USER, OTHER_USER)
            act()
            code = 0
        except OSError:
            code = 1
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 1), "the other user's process failed in another way"
    return code == 0
