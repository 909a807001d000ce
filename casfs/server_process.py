"""Start a process of this interpreter that serves the caller over a socket.

`posix_spawn` copies none of the caller's memory, and with it no keys. The process has the caller's
environment and one descriptor of it, the connection.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

_CONNECTION_FD = 3

_PROGRAM = """
import importlib, socket, sys
sys.path.insert(0, sys.argv[1])
serve = importlib.import_module(sys.argv[2]).serve
serve(socket.socket(fileno=int(sys.argv[3])))
"""


def start_server_process(
    module: str,
    connection: int,
    *,
    blocked: Collection[signal.Signals] = (),
    default: Collection[signal.Signals] = (),
    own_group: bool = False,
) -> int:
    """Run `serve` of a module in a new process, on a copy of the socket `connection`; return the process id.

    The process blocks the signals in `blocked` and no others; those in `default` have their default action.
    With `own_group` the signals of a terminal do not reach it. Raise OSError.
    """
    root = str(Path(__file__).parents[1])
    arguments = [sys.executable, "-P", "-c", _PROGRAM, root, module, str(_CONNECTION_FD)]
    group: dict[str, Any] = {"setpgroup": 0} if own_group else {}
    return os.posix_spawn(
        sys.executable,
        arguments,
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, connection, _CONNECTION_FD),
            *((os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)),
        ],
        setsigmask=blocked,
        setsigdef=default,
        **group,
    )
