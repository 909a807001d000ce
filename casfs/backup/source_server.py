"""Act on the files of one mount for a backup, which gives this process up if the mount does not answer.

It carries out one request at a time: a name of `source_fs.ACTIONS`, a descriptor and arguments. A message is
its length and a pickle; both processes are of the same program and user. The process ends at the end of its
connection.
"""

from __future__ import annotations

import pickle
import socket
import struct
from typing import Any

from casfs.backup.source_fs import ACTIONS

LENGTH = struct.Struct("<Q")

ADOPT = "adopt"
"""The request that a descriptor follows, for use in later requests; its new number is the result."""

STARTED = "started"


def send(connection: socket.socket, message: object) -> None:
    """Send one message."""
    data = pickle.dumps(message, protocol=5)
    connection.sendall(LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket) -> Any:
    """Return the next message; raise EOFError at the end of the connection."""
    (length,) = LENGTH.unpack(_exactly(connection, LENGTH.size))
    return pickle.loads(_exactly(connection, length))


def _exactly(connection: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise EOFError
        view = view[count:]
    return data


def serve(connection: socket.socket) -> None:
    """Report that this process has started, and carry out requests until the end of the connection."""
    send(connection, STARTED)
    while True:
        try:
            action, fd, arguments = receive(connection)
        except (EOFError, OSError):
            return
        send(connection, _carry_out(connection, action, fd, arguments))


def _carry_out(
    connection: socket.socket, action: str, fd: int, arguments: tuple[Any, ...]
) -> tuple[Any, OSError | None]:
    try:
        if action == ADOPT:
            _, fds, _, _ = socket.recv_fds(connection, 1, 1)
            return fds[0], None
        return ACTIONS[action](fd, *arguments), None
    except OSError as error:
        return None, error
