"""A TCP proxy that behaves as a line with a round trip and a bandwidth, and counts what it carries.

All connections share the bandwidth, each direction its own. A connection is usable one round trip after it
was made, and every byte arrives half a round trip after it was sent. At most as many bytes are on the way as
the line holds, so the sender is held back as on a real line. What it does not show: the slow start of TCP,
and loss.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bench.remote.http_counter import HttpCounter

_PIECE_BYTES = 64 * 1024
_LEAST_ON_THE_WAY_BYTES = 512 * 1024
_SLACK_S = 0.02
"""The line may hold what it carries in this time beyond the round trip: the buffers of its ends."""


@dataclass(frozen=True, slots=True)
class LineSettings:
    """The round trip in seconds, and the bandwidth of each direction in bits per second."""

    round_trip_s: float
    bits_per_s: int

    @property
    def bytes_per_s(self) -> float:
        """The bandwidth in bytes."""
        return self.bits_per_s / 8


@dataclass(frozen=True, slots=True)
class LineTotals:
    """The requests by method, and the bytes that went to the server and came from it."""

    methods: dict[str, int]
    sent_bytes: int
    received_bytes: int

    @property
    def requests(self) -> int:
        """The number of requests."""
        return sum(self.methods.values())


class _Direction:
    """One direction of the line: when it is free for the next piece, and what it carried."""

    def __init__(self, settings: LineSettings) -> None:
        self._settings = settings
        self._free_at = 0.0
        self.carried_bytes = 0

    def arrival(self, now: float, size: int) -> float:
        """Send a piece now or when the line is free; return the time at which it arrives."""
        begin = max(now, self._free_at)
        self._free_at = begin + size / self._settings.bytes_per_s
        self.carried_bytes += size
        return self._free_at + self._settings.round_trip_s / 2


class Line:
    """A line to a port of 127.0.0.1; it runs in a thread of its own from `open` to `close`."""

    def __init__(self, target: int, settings: LineSettings) -> None:
        self._target = target
        self._settings = settings
        self._up, self._down = _Direction(settings), _Direction(settings)
        held = settings.bytes_per_s * (settings.round_trip_s + _SLACK_S)
        self._most_pieces = max(int(held), _LEAST_ON_THE_WAY_BYTES) // _PIECE_BYTES
        self._counters: list[HttpCounter] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    def open(self) -> None:
        """Listen on a free port of 127.0.0.1."""
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(self._listen(), self._loop)
        self.port = starting.result()

    def totals(self) -> LineTotals:
        """Return what the line carried so far."""
        methods: dict[str, int] = {}
        for counter in list(self._counters):
            for method, number in list(counter.methods.items()):
                methods[method] = methods.get(method, 0) + number
        return LineTotals(methods, self._up.carried_bytes, self._down.carried_bytes)

    def close(self) -> None:
        """End all connections and the thread."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_PIECE_BYTES)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _end(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(
        self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        usable_at = self._loop.time() + self._settings.round_trip_s
        try:
            from_server, to_server = await asyncio.open_connection(
                "127.0.0.1", self._target, limit=_PIECE_BYTES
            )
        except OSError:
            to_client.close()
            self._tasks.discard(task)
            return
        counter = HttpCounter()
        self._counters.append(counter)
        try:
            await asyncio.gather(
                self._carry(from_client, to_server, self._up, usable_at, counter),
                self._carry(from_server, to_client, self._down, 0.0, None),
            )
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            for writer in (to_server, to_client):
                writer.close()

    async def _carry(
        self,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        direction: _Direction,
        usable_at: float,
        counter: HttpCounter | None,
    ) -> None:
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(self._most_pieces)
        delivering = asyncio.ensure_future(self._deliver(pieces, target))
        try:
            while data := await source.read(_PIECE_BYTES):
                if counter is not None:
                    counter.feed(data)
                now = max(self._loop.time(), usable_at)
                await pieces.put((direction.arrival(now, len(data)), data))
                if delivering.done():
                    break
        finally:
            if not delivering.done():
                await pieces.put((0.0, b""))
            with contextlib.suppress(OSError):
                await delivering

    async def _deliver(
        self, pieces: asyncio.Queue[tuple[float, bytes]], target: asyncio.StreamWriter
    ) -> None:
        """Write each piece when it arrives; an empty one is the end."""
        try:
            while True:
                arrives_at, data = await pieces.get()
                if not data:
                    break
                wait_s = arrives_at - self._loop.time()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                target.write(data)
                await target.drain()
            target.write_eof()
        except (OSError, RuntimeError):
            while not pieces.empty():  # the other end is gone; let the sender see it
                pieces.get_nowait()


@contextmanager
def line_to(target: int, settings: LineSettings) -> Iterator[Line]:
    """Open a line to a port, and close it at the end of the block."""
    line = Line(target, settings)
    line.open()
    try:
        yield line
    finally:
        line.close()
