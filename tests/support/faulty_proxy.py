"""An HTTP proxy in front of a server that answers one request wrongly, as a test says.

It passes requests on as they are, so the signatures of S3 stay valid, and reads each one and its answer as a
whole. `requests` has what came since `begin`, in order.
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast
from urllib.parse import unquote, urlsplit

_PER_HOP = frozenset(["connection", "keep-alive", "transfer-encoding", "content-length"])
_WAIT_S = 30
_MUTATING = frozenset(["PUT", "POST", "DELETE"])


class Fault(StrEnum):
    """What happens to a request."""

    SILENT = "no answer, and the server did not act"
    SILENT_DONE = "no answer, and the server acted"
    CLOSED = "connection closed, and the server did not act"
    CLOSED_DONE = "connection closed, and the server acted"
    RESET_REQUEST = "reset in the middle of the request's body"
    RESET_ANSWER = "reset in the middle of the answer's body"
    STATUS_403 = "403"
    STATUS_409 = "409"
    STATUS_412 = "412"
    STATUS_429 = "429"
    STATUS_500 = "500"
    STATUS_503 = "503"
    SHORT = "an answer with fewer bytes"
    WRONG = "an answer with other bytes"


@dataclass(frozen=True, slots=True)
class ProxiedRequest:
    """A request: its number since `begin`, its method, and the path of the object or the listing."""

    number: int
    method: str
    path: str

    @property
    def changes(self) -> bool:
        """Whether the request may change something at the server."""
        return self.method in _MUTATING


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


def _unchanged(request: ProxiedRequest) -> None:
    return None


class FaultyProxy:
    """A port of 127.0.0.1; `fault_of` returns what happens to each request.

    `before` is called in the thread of a request before the server gets it, `after` when the server has
    acted and the client has no answer yet. While `is_cut` is set, every connection is reset.
    """

    def __init__(self, target: int) -> None:
        self.fault_of: Callable[[ProxiedRequest], Fault | None] = _unchanged
        self.before: Callable[[ProxiedRequest], None] = _unchanged
        self.after: Callable[[ProxiedRequest], None] = _unchanged
        self.is_cut = threading.Event()
        self.closed = threading.Event()
        self.requests: list[ProxiedRequest] = []
        self.target = target
        self._lock = threading.Lock()
        self._server = _Server(self)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    @property
    def endpoint(self) -> str:
        """The URL of the proxy."""
        return f"http://127.0.0.1:{self.port}"

    def begin(self, fault_of: Callable[[ProxiedRequest], Fault | None] = _unchanged) -> None:
        """Count requests from zero, and answer them as the function says."""
        with self._lock:
            self.requests = []
            self.fault_of = fault_of

    def fail_once(self, number: int, fault: Fault) -> None:
        """Count requests from zero; one of them, and only it, gets a fault."""
        self.begin(lambda request: fault if request.number == number else None)

    def record(self, method: str, path: str) -> tuple[ProxiedRequest, Fault | None]:
        """Count a request and return what happens to it."""
        with self._lock:
            request = ProxiedRequest(len(self.requests), method, path)
            self.requests.append(request)
            return request, self.fault_of(request)

    def close(self) -> None:
        """End the connections and the threads."""
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, proxy: FaultyProxy) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing: connections end in the middle here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        proxy = cast("_Server", self.server).proxy
        if proxy.is_cut.is_set():
            self._reset()
            return
        request, fault = proxy.record(self.command, unquote(urlsplit(self.path).path))
        length = int(self.headers.get("Content-Length") or 0)
        if fault is Fault.RESET_REQUEST:
            self.rfile.read(length // 2)
            self._reset()
            return
        body = self.rfile.read(length)
        proxy.before(request)
        if proxy.is_cut.is_set():
            self._reset()
            return
        if fault in (Fault.SILENT, Fault.CLOSED):
            self._end(fault)
            return
        if fault is not None and fault.isdigit():
            self._send(_refusal(int(fault)))
            return
        answer = self._forward(proxy.target, body)
        proxy.after(request)
        if fault in (Fault.SILENT_DONE, Fault.CLOSED_DONE):
            self._end(fault)
        elif fault is Fault.RESET_ANSWER:
            self._send(answer, len(answer.body) // 2)
            self._reset()
        elif fault is Fault.SHORT:
            self._send(_Answer(answer.status, answer.headers, answer.body[: len(answer.body) // 2]))
        elif fault is Fault.WRONG:
            self._send(_Answer(answer.status, answer.headers, _with_wrong_byte(answer.body)))
        else:
            self._send(answer)

    do_PUT = do_POST = do_HEAD = do_DELETE = do_GET

    def _forward(self, target: int, body: bytes) -> _Answer:
        connection = http.client.HTTPConnection("127.0.0.1", target, timeout=60)
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body or None)
            found = connection.getresponse()
            headers = [
                (name, value)
                for name, value in found.getheaders()
                if name.lower() not in _PER_HOP
                or (self.command == "HEAD" and name.lower() == "content-length")
            ]
            return _Answer(found.status, headers, found.read())
        finally:
            connection.close()

    def _send(self, answer: _Answer, sent_bytes: int | None = None) -> None:
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            self.send_header(name, value)
        if self.command != "HEAD" and answer.status != 204:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body if sent_bytes is None else answer.body[:sent_bytes])
        self.wfile.flush()

    def _end(self, fault: Fault) -> None:
        """Answer nothing: close the connection, or wait until the client closes it."""
        self.close_connection = True
        if fault in (Fault.CLOSED, Fault.CLOSED_DONE):
            return
        self.connection.settimeout(_WAIT_S)
        with suppress(OSError):
            while self.connection.recv(1024):
                pass

    def _reset(self) -> None:
        """Close the connection so that the client gets a reset."""
        self.close_connection = True
        with suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def _refusal(status: int) -> _Answer:
    body = f"<Error><Code>Injected{status}</Code><Message>as the test says</Message></Error>"
    return _Answer(status, [("Content-Type", "application/xml")], body.encode())


def _with_wrong_byte(body: bytes) -> bytes:
    if not body:
        return body
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]


@contextmanager
def faulty_proxy(endpoint: str) -> Iterator[FaultyProxy]:
    """Run a proxy in front of a server on 127.0.0.1."""
    proxy = FaultyProxy(int(endpoint.rpartition(":")[2]))
    try:
        yield proxy
    finally:
        proxy.close()
