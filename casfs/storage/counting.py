"""Counts of requests and bytes by kind: the costs of a remote storage.

A back end counts each request where it makes it, including pages of listings, failed attempts, and the ranges
into which it splits a large read.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import StrEnum


class RequestKind(StrEnum):
    """The kind of a request."""

    LIST = "list"
    STAT = "stat"
    READ = "read"
    CREATE = "create"
    OVERWRITE = "overwrite"
    DELETE = "delete"
    LOCK = "lock"


@dataclass(frozen=True, slots=True)
class RequestTotals:
    """The number of requests of one kind, and the bytes of objects that they transferred."""

    requests: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0


class RequestCounter:
    """Counts requests; several threads may use it at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals: dict[RequestKind, RequestTotals] = {}

    def add(
        self, kind: RequestKind, requests: int = 1, sent_bytes: int = 0, received_bytes: int = 0
    ) -> None:
        """Count requests and the bytes of objects that they transferred."""
        with self._lock:
            so_far = self._totals.get(kind, RequestTotals())
            self._totals[kind] = RequestTotals(
                so_far.requests + requests,
                so_far.sent_bytes + sent_bytes,
                so_far.received_bytes + received_bytes,
            )

    def totals(self) -> dict[RequestKind, RequestTotals]:
        """Return the totals so far by kind; kinds without a request are omitted."""
        with self._lock:
            return dict(self._totals)
