"""Count the HTTP requests in one direction of a connection, without changing its bytes."""

from __future__ import annotations

import re

_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:\s*chunked", re.IGNORECASE)
_END = b"\r\n\r\n"


class HttpCounter:
    """Counts the requests of HTTP/1.1 in the bytes of one connection, by method."""

    def __init__(self) -> None:
        self.methods: dict[str, int] = {}
        self._head = bytearray()
        self._body_left = 0
        self._is_chunked = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the connection."""
        view = memoryview(data)
        while view:
            if self._body_left:
                taken = min(self._body_left, len(view))
                self._body_left -= taken
                view = view[taken:]
                continue
            self._head += view
            view = self._take_head()

    def _take_head(self) -> memoryview:
        """Parse a head that is whole, and return the bytes that follow it."""
        end = self._head.find(b"\r\n" if self._is_chunked else _END)
        if end < 0:
            return memoryview(b"")
        if self._is_chunked:
            return self._take_chunk_head(end)
        head, rest = (
            bytes(self._head[: end + 2]).lstrip(b"\r\n"),
            bytes(self._head[end + len(_END) :]),
        )
        self._head.clear()
        method = head.split(b" ", 1)[0].decode("ascii", "replace")
        self.methods[method] = self.methods.get(method, 0) + 1
        length = _CONTENT_LENGTH.search(head)
        self._body_left = int(length[1]) if length else 0
        self._is_chunked = _CHUNKED.search(head) is not None
        return memoryview(rest)

    def _take_chunk_head(self, end: int) -> memoryview:
        line, rest = bytes(self._head[:end]), bytes(self._head[end + 2 :])
        self._head.clear()
        size = int(line.split(b";")[0], 16) if line else 0
        if size:
            self._body_left = size + 2
        elif line:
            self._is_chunked = False  # the empty line after the last chunk begins the next head
        return memoryview(rest)
