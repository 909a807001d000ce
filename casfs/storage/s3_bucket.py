"""The versions and locks of the objects in an S3 bucket: a `Bucket`."""

from __future__ import annotations

import calendar
import hashlib
import re
from base64 import b64encode
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from xml.etree import ElementTree

from casfs.errors import NotFoundError, StorageDeniedError, StorageError
from casfs.storage.base import is_name
from casfs.storage.bucket import BucketSettings, ObjectVersion
from casfs.storage.counting import RequestCounter, RequestKind
from casfs.storage.object_store_errors import Answer, error_of_answer
from casfs.storage.s3_connection import Response, S3Connection

_PAGE = "1000"
_MAX_PAGE_BYTES = 8 * 1024 * 1024
_DAY_S = 86_400
_YEAR_S = 365 * _DAY_S
_MAX_TEXT = 1024
_NUMBER = re.compile("[0-9]{1,18}")

_NOT_SET_UP = frozenset(["ObjectLockConfigurationNotFoundError", "NoSuchObjectLockConfiguration"])
_UNKNOWN = frozenset(["NotImplemented", "MethodNotAllowed", "InvalidRequest"])


class S3Bucket:
    """The objects of one bucket below a prefix, as in `ObjectStorage`.

    `connect` returns the connection to the bucket, which the first request opens.
    """

    def __init__(
        self,
        url: str,
        prefix: str,
        connect: Callable[[], S3Connection],
        counter: RequestCounter,
    ) -> None:
        self._url = url
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._connect = connect
        self._opened: S3Connection | None = None
        self._counter = counter

    @property
    def _connection(self) -> S3Connection:
        if self._opened is None:
            self._opened = self._connect()
        return self._opened

    def settings(self) -> BucketSettings:
        """Return whether the bucket keeps versions, and whether and for how long it locks."""
        versioning = self._ask_bucket("versioning")
        if versioning is None or _text(versioning, "Status") != "Enabled":
            return BucketSettings(keeps_versions=False, can_lock=False)
        locking = self._ask_bucket("object-lock")
        if locking is None or _text(locking, "ObjectLockEnabled") != "Enabled":
            return BucketSettings(keeps_versions=True, can_lock=False)
        days, years = _text(locking, "Days"), _text(locking, "Years")
        default_lock_s = None
        if days or years:
            default_lock_s = _number(days) * _DAY_S if days else _number(years) * _YEAR_S
        return BucketSettings(keeps_versions=True, can_lock=True, default_lock_s=default_lock_s)

    def _ask_bucket(self, setting: str) -> ElementTree.Element | None:
        """Return a setting of the bucket, None where it has none or the server does not know it."""
        self._counter.add(RequestKind.STAT)
        answer = self._connection.request("GET", "", {setting: ""})
        if isinstance(answer, Response):
            return _parse(answer.body, self._url)
        if answer.code in _NOT_SET_UP | _UNKNOWN or answer.status in (405, 501):
            return None
        raise error_of_answer(answer, "ask for the settings of", self._url)

    def locked_until_s(self, name: str) -> int | None:
        """Return the end of the lock of an object."""
        self._counter.add(RequestKind.STAT)
        answer = self._connection.request("GET", self._prefix + name, {"retention": ""})
        if isinstance(answer, Answer):
            if answer.code in _NOT_SET_UP | _UNKNOWN:
                return None
            raise error_of_answer(answer, "ask for the lock of", f"{self._url}/{name}")
        date = _text(_parse(answer.body, self._url), "RetainUntilDate")
        return calendar.timegm(_time(date, self._url).utctimetuple()) if date else None

    def lock(self, name: str, until_s: int) -> None:
        """Lock an object, or extend its lock."""
        date = datetime.fromtimestamp(until_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        body = (
            '<Retention xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Mode>COMPLIANCE</Mode><RetainUntilDate>{date}</RetainUntilDate></Retention>"
        ).encode()
        digest = hashlib.md5(body, usedforsecurity=False).digest()
        self._counter.add(RequestKind.LOCK)
        try:
            self._connection.require(
                "PUT",
                self._prefix + name,
                {"retention": ""},
                "lock",
                f"{self._url}/{name}",
                {"content-md5": b64encode(digest).decode(), "content-type": "application/xml"},
                body,
            )
        except StorageDeniedError:
            # The answer, too, where the lock lasts longer than this.
            if not self._is_locked_until(name, until_s):
                raise

    def _is_locked_until(self, name: str, until_s: int) -> bool:
        try:
            found = self.locked_until_s(name)
        except (StorageError, NotFoundError):
            return False
        return found is not None and found >= until_s

    def versions(self, prefix: str) -> Iterator[ObjectVersion]:
        """Yield the versions of an object and of those below it."""
        below = self._prefix + prefix
        query = {"versions": "", "prefix": below, "max-keys": _PAGE}
        while True:
            self._counter.add(RequestKind.LIST)
            answer = self._connection.require(
                "GET", "", query, "list", f"{self._url}/{prefix}", max_bytes=_MAX_PAGE_BYTES
            )
            page = _parse(answer.body, self._url)
            for entry in page:
                kind = entry.tag.rpartition("}")[2]
                if kind not in ("Version", "DeleteMarker"):
                    continue
                key = _text(entry, "Key")
                name = key.removeprefix(self._prefix)
                if key != self._prefix + name or not is_name(name):
                    continue
                if name != prefix and not name.startswith(f"{prefix}/"):
                    continue
                yield ObjectVersion(
                    name,
                    _text(entry, "VersionId"),
                    _number(_text(entry, "Size")),
                    int(_time(_text(entry, "LastModified"), self._url).timestamp()) * 1_000_000_000,
                    kind == "DeleteMarker",
                )
            if _text(page, "IsTruncated") != "true":
                return
            markers = _text(page, "NextKeyMarker"), _text(page, "NextVersionIdMarker")
            if markers == (query.get("key-marker"), query.get("version-id-marker")):
                raise _nonsense(self._url)
            query |= {"key-marker": markers[0], "version-id-marker": markers[1]}

    def read_version(self, name: str, version: str, offset: int, size: int) -> bytes:
        """Return a range of a version."""
        if size <= 0:
            return b""
        self._counter.add(RequestKind.READ)
        answer = self._connection.request(
            "GET",
            self._prefix + name,
            {"versionId": version},
            {"range": f"bytes={offset}-{offset + size - 1}"},
            max_bytes=size,
        )
        if isinstance(answer, Answer):
            if answer.status == 416:
                return b""
            raise error_of_answer(answer, "read", f"{self._url}/{name}")
        if not answer.headers.get("content-range", "").startswith(f"bytes {offset}-"):
            raise _nonsense(self._url)
        self._counter.add(RequestKind.READ, 0, received_bytes=len(answer.body))
        return answer.body

    def close(self) -> None:
        """Close the connections."""
        if self._opened is not None:
            self._opened.close()


def _parse(body: bytes, url: str) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(body)
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        # The last two are those of an encoding that Python does not know, or that expat cannot use.
        raise _nonsense(url) from error


def _text(element: ElementTree.Element, tag: str) -> str:
    """Return the text of the first element below with a tag, in whatever namespace, or ""."""
    for found in element.iter():
        if found.tag.rpartition("}")[2] == tag:
            return (found.text or "").strip()[:_MAX_TEXT]
    return ""


def _number(text: str) -> int:
    """Return a number of at most 18 digits, 0 for any other text."""
    return int(text) if _NUMBER.fullmatch(text) else 0


def _time(text: str, url: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
        if found.tzinfo is None:
            return found.replace(tzinfo=UTC)
        return found.astimezone(UTC)
    except (ValueError, OverflowError) as error:  # the year 1 in another time zone
        raise _nonsense(url) from error


def _nonsense(url: str) -> StorageError:
    return StorageError("use", url, OSError(5, "the server's answer cannot be understood"))
