"""A connection to an SFTP server through the pipes of a program: many requests at a time.

The program is the user's own `ssh`, so that its configuration, agent, jump hosts and hardware keys all count.
Any thread may send a request and wait for its answer while others do the same; one thread of the
channel reads the answers. A client that waits for each answer is bound by the round trip, and one whose
answers only the asking thread may read cannot be shared, which is why no library's is used here.

Answers are bounded: a length that no server needs ends the connection.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from casfs.display import single_line
from casfs.errors import StorageDeniedError, StorageError, StorageUnavailableError
from casfs.storage.base import Data
from casfs.storage.interruption import INTERRUPTED, interrupted_error
from casfs.storage.sftp_protocol import (
    PROTOCOL_VERSION,
    Reader,
    Reply,
    Request,
    Status,
    StatusError,
    pack_string,
)

_MAX_PACKET_BYTES = 1024 * 1024
_PIPE_BYTES = 1024 * 1024
_SILENCE_S = 120.0
"""A server that owes an answer and sends nothing for so long is taken for gone."""

_LOOK_S = 1.0
_GOODBYE_S = 2.0
_HEADER = struct.Struct(">IBI")
_U32 = struct.Struct(">I")


Ending = StorageError | StorageUnavailableError
"""Why a connection ended."""


class PendingReply:
    """An answer that is awaited."""

    __slots__ = ("_channel", "_error", "_kind", "_payload", "_ready", "_sent_at")

    def __init__(self, channel: SftpChannel) -> None:
        self._channel = channel
        self._ready = threading.Event()
        self._kind = 0
        self._payload = b""
        self._error: Ending | None = None
        self._sent_at = channel.now_s()

    def resolve(self, kind: int, payload: bytes) -> None:
        """Hand over the answer."""
        self._kind, self._payload = kind, payload
        self._ready.set()

    def fail(self, error: Ending) -> None:
        """Hand over what ended the connection."""
        self._error = error
        self._ready.set()

    def result(self, wanted: Reply) -> bytes:
        """Wait for the answer and return its fields; raise StatusError and StorageUnavailableError.

        A status of OK is an answer without fields when STATUS is wanted.
        """
        while not self._ready.wait(_LOOK_S):
            self._channel.end_if_silent(self._sent_at)
        if self._error is not None:
            raise self._error.with_traceback(None)
        if self._kind == Reply.STATUS:
            fields = Reader(self._payload)
            try:
                status = fields.u32()
                message = b"" if fields.is_at_end else fields.string()
            except ValueError as error:
                raise self._channel.broken() from error
            if status != Status.OK or wanted != Reply.STATUS:
                raise StatusError(status, message.decode(errors="replace"))
            return b""
        if self._kind != wanted:
            raise self._channel.broken()
        return self._payload


class SftpChannel:
    """A connection to an SFTP server through a program's pipes.

    `place` is how messages name the server. Raise StorageUnavailableError where it cannot be reached and
    StorageDeniedError where it refuses the user, or the user's `ssh` refuses it.
    """

    def __init__(
        self,
        command: Sequence[str],
        place: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._place = place
        self._clock = clock
        self._lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._pending: dict[int, PendingReply] = {}
        self._next_id = 0
        self._end: Ending | None = None
        self._is_closed = False
        self._heard_at = clock()
        self._messages = tempfile.TemporaryFile(prefix="casfs-")  # noqa: SIM115 - closed with the channel
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._messages,
                bufsize=0,
            )
        except OSError as error:
            self._messages.close()
            raise StorageDeniedError("run", command[0], error) from error
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to_server = self._process.stdin.fileno()
        self._from_server = self._process.stdout.fileno()
        for fd in (self._to_server, self._from_server):
            try:
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            except OSError:
                pass  # an ordinary user's pipes may all be as large as the system allows
        self._wake_receiver, self._wake = os.pipe()
        self._version = PendingReply(self)
        self._reader = threading.Thread(target=self._read_answers, name="casfs-sftp", daemon=True)
        self._reader.start()
        try:
            self._send(struct.pack(">IBI", 5, Request.INIT, PROTOCOL_VERSION))
            self.extensions = self._parse_version(self._version.result(Reply.VERSION))
        except BaseException:
            self.close()
            raise

    @property
    def is_open(self) -> bool:
        """Whether requests may be sent."""
        return self._end is None

    def request(self, kind: Request, *fields: bytes, data: Data = b"") -> PendingReply:
        """Send a request whose last field is `data`; return what will have the answer."""
        body = b"".join(fields)
        pending = PendingReply(self)
        with self._lock:
            if self._end is not None:
                raise self._end.with_traceback(None)
            self._next_id = (self._next_id + 1) & 0xFFFFFFFF
            number = self._next_id
            self._pending[number] = pending
        header = _HEADER.pack(5 + len(body) + len(data), kind, number)
        self._send(header + body, data)
        return pending

    def extended(self, name: str, *fields: bytes) -> PendingReply:
        """Send a request of an extension."""
        return self.request(Request.EXTENDED, pack_string(name), *fields)

    def close(self) -> None:
        """End the connection and the program; harmless when called again."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        assert self._process.stdin is not None and self._process.stdout is not None
        closed = StorageUnavailableError(
            "use", self._place, OSError(errno.EPIPE, "the connection was closed")
        )
        if not self._send_lock.acquire(timeout=_GOODBYE_S):
            self._finish(closed)  # another thread cannot send: the server takes nothing
            self._send_lock.acquire()
        try:
            # At the end of its input an SSH client says goodbye and ends by itself.
            self._process.stdin.close()
        finally:
            self._send_lock.release()
        try:
            self._process.wait(_GOODBYE_S)
        except subprocess.TimeoutExpired:
            pass
        self._finish(closed)
        self._reader.join()
        self._process.wait()
        self._process.stdout.close()
        self._messages.close()
        os.close(self._wake)
        os.close(self._wake_receiver)

    def now_s(self) -> float:
        """Return the time by the channel's clock, in seconds."""
        return self._clock()

    def end_if_silent(self, since: float) -> None:
        """End the connection if the server has sent nothing since, and for too long."""
        if self._clock() - max(self._heard_at, since) > _SILENCE_S:
            self._finish(
                StorageUnavailableError(
                    "reach", self._place, OSError(errno.ETIMEDOUT, "the server does not answer")
                )
            )

    def broken(self) -> StorageError:
        """End the connection to a server that does not keep the protocol; return the error to raise."""
        error = StorageError(
            "use", self._place, OSError(errno.EPROTO, "the server does not speak SFTP as it should")
        )
        self._finish(error)
        return error

    def _send(self, head: bytes, data: Data = b"") -> None:
        try:
            with self._send_lock:
                if self._is_closed:
                    return  # the descriptor may be another file's by now
                views = [memoryview(head), memoryview(data)]
                while views:
                    sent = os.writev(self._to_server, views)
                    while views and sent >= len(views[0]):
                        sent -= len(views[0])
                        views.pop(0)
                    if views:
                        views[0] = views[0][sent:]
        except BrokenPipeError:
            return  # the reading thread finds the reason, and reports it to every waiting call
        except BaseException:
            # Half a request is on its way: nothing after it would be understood.
            self._finish(
                StorageUnavailableError("use", self._place, OSError(errno.EINTR, "interrupted"))
            )
            raise

    def _read_answers(self) -> None:
        buffer = bytearray()
        try:
            while data := self._receive():
                self._heard_at = self._clock()
                buffer += data
                self._take_answers(buffer)
        except (OSError, ValueError):
            self.broken()
            return
        self._finish(self._why_it_ended())

    def _receive(self) -> bytes:
        """Wait for bytes and return them; none at the end of the stream, or when the channel is closed.

        A process that the program left behind may keep its end of the pipe open.
        """
        ready = select.poll()
        ready.register(self._from_server, select.POLLIN)
        ready.register(self._wake_receiver, select.POLLIN)
        while not any(fd == self._from_server for fd, _ in ready.poll(1000 * _LOOK_S)):
            if INTERRUPTED.is_set():
                # Without the program, a thread that sends to it ends too.
                self._finish(interrupted_error(self._place))
            if self._end is not None:
                return b""
        return os.read(self._from_server, _PIPE_BYTES)

    def _take_answers(self, buffer: bytearray) -> None:
        at = 0
        while len(buffer) - at >= 4:
            length = _U32.unpack_from(buffer, at)[0]
            if not 5 <= length <= _MAX_PACKET_BYTES:
                raise ValueError("no answer has this length")
            if len(buffer) - at < 4 + length:
                break
            kind = buffer[at + 4]
            if kind == Reply.VERSION:
                self._version.resolve(kind, bytes(buffer[at + 5 : at + 4 + length]))
            else:
                number = _U32.unpack_from(buffer, at + 5)[0]
                with self._lock:
                    pending = self._pending.pop(number, None)
                if pending is None:
                    raise ValueError("an answer to nothing")
                pending.resolve(kind, bytes(buffer[at + 9 : at + 4 + length]))
            at += 4 + length
        del buffer[:at]

    def _finish(self, error: Ending) -> None:
        with self._lock:
            if self._end is not None:
                return
            self._end = error
            waiting = [*self._pending.values(), self._version]
            self._pending.clear()
        os.write(self._wake, b"x")
        self._process.kill()
        for pending in waiting:
            pending.fail(error)

    def _parse_version(self, payload: bytes) -> Mapping[str, bytes]:
        fields = Reader(payload)
        extensions = {}
        try:
            if fields.u32() < PROTOCOL_VERSION:
                raise ValueError("the server is too old")
            while not fields.is_at_end:
                name = fields.string().decode(errors="replace")
                extensions[name] = fields.string()
        except ValueError as error:
            raise self.broken() from error
        return extensions

    def _why_it_ended(self) -> Ending:
        try:
            code = self._process.wait(5 * _LOOK_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._messages.seek(max(0, self._messages.seek(0, os.SEEK_END) - 4096))
        said = self._messages.read().decode(errors="replace").strip()
        return explain_end(self._place, code, said)


def explain_end(place: str, exit_code: int, said: str) -> Ending:
    """Return the error for an `ssh` that ended with an exit code and these last words."""
    last = single_line(said.splitlines()[-1]) if said else f"ssh ended with exit code {exit_code}"
    for phrase, sentence in _REFUSALS:
        if phrase in said:
            return StorageDeniedError("connect to", place, OSError(errno.EACCES, sentence))
    return StorageUnavailableError("reach", place, OSError(errno.ECONNRESET, last))


_REFUSALS = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "the server's host key is not the one in known_hosts: another machine may answer in its place. "
        "Find out why before you change known_hosts",
    ),
    (
        "Host key verification failed",
        "the server's host key is not known here; connect once with ssh and compare the key",
    ),
    (
        "Permission denied",
        "the server accepts none of your keys; make `ssh` to it work without a question first",
    ),
    (
        "Too many authentication failures",
        "the server accepts none of your keys; make `ssh` to it work without a question first",
    ),
    (
        "subsystem request failed",
        "the server offers no SFTP; it needs `Subsystem sftp` in its sshd_config",
    ),
    ("Bad owner or permissions", "ssh refuses its configuration file; correct its permissions"),
    ("Bad configuration option", "ssh does not understand its configuration file"),
)
