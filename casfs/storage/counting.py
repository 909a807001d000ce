"""Requests and bytes by kind: what a storage on the other side of a network is paid for by.

A back end notes each request where it makes it: pages of listings, attempts that failed, and ranges that
a large read was split into all count.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import StrEnum


class RequestKind(StrEnum):
    """What a request asks for."""

    LIST = "list"
    STAT = "stat"
    READ = "read"
    CREATE = "create"
    OVERWRITE = "overwrite"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class RequestTotals:
    """How many requests of one kind were made, and the bytes of objects that went with them."""

    requests: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0


class RequestCounter:
    """Counts requests; used by several threads at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals: dict[RequestKind, RequestTotals] = {}

    def add(
        self, kind: RequestKind, requests: int = 1, sent_bytes: int = 0, received_bytes: int = 0
    ) -> None:
        """Count requests and the bytes of objects that they moved."""
        with self._lock:
            so_far = self._totals.get(kind, RequestTotals())
            self._totals[kind] = RequestTotals(
                so_far.requests + requests,
                so_far.sent_bytes + sent_bytes,
                so_far.received_bytes + received_bytes,
            )

    def totals(self) -> dict[RequestKind, RequestTotals]:
        """Return what was counted so far, by kind; kinds without a request are left out."""
        with self._lock:
            return dict(self._totals)
