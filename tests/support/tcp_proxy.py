"""A network between a program and a local server that goes away, and comes back, when a test says so."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_LOOK_S = 0.1


class TcpProxy:
    """A port of 127.0.0.1 that passes everything on to another one.

    While `is_silent` is set, nothing moves. While `is_cut` is set, every connection is reset, and so is each
    new one. `cut_after` sets it when so many more bytes have passed in both directions.
    """

    def __init__(self, target: int) -> None:
        self.is_silent = threading.Event()
        self.is_cut = threading.Event()
        self.passed_bytes = 0
        self._left_bytes: int | None = None
        self._lock = threading.Lock()
        self._target = target
        self._closed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(_LOOK_S)
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def endpoint(self) -> str:
        """The URL of the proxy before a server of HTTP."""
        return f"http://127.0.0.1:{self.port}"

    def cut_after(self, size: int) -> None:
        """Let so many more bytes pass, then cut the network."""
        with self._lock:
            self._left_bytes = size

    def come_back(self) -> None:
        """Let everything pass again."""
        with self._lock:
            self._left_bytes = None
        self.is_cut.clear()

    def close(self) -> None:
        """Close all connections and end the threads."""
        self._closed.set()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            if self.is_cut.is_set():
                _reset(client)
                continue
            server = socket.create_connection(("127.0.0.1", self._target))
            for source, target in ((client, server), (server, client)):
                thread = threading.Thread(target=self._pass_on, args=(source, target))
                self._threads.append(thread)
                thread.start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        try:
            source.settimeout(_LOOK_S)
            while not self._closed.is_set() and not self.is_cut.is_set():
                if self.is_silent.is_set():
                    self._closed.wait(_LOOK_S)
                    continue
                try:
                    data = source.recv(65536)
                except TimeoutError:
                    continue
                if not data or not self._may_pass(len(data)):
                    break
                target.sendall(data)
        except OSError:
            pass
        finally:
            if self.is_cut.is_set():
                _reset(source)
                _reset(target)
            source.close()
            target.close()

    def _may_pass(self, size: int) -> bool:
        with self._lock:
            if self._left_bytes is not None:
                self._left_bytes -= size
                if self._left_bytes < 0:
                    self.is_cut.set()
                    return False
            self.passed_bytes += size
            return True


def _reset(connection: socket.socket) -> None:
    """Close a connection so that the other end gets a reset."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@contextmanager
def tcp_proxy(target: int) -> Iterator[TcpProxy]:
    """Run a proxy in front of a port of 127.0.0.1."""
    proxy = TcpProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
