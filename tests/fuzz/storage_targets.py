"""What a storage or its server says: small objects, names of listings, XML, SFTP, credentials."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping

from casfs.crypto.session_files import list_session_files, session_ids
from casfs.digest import digest_of
from casfs.errors import IntegrityError, NotFoundError, StorageError, StorageUnavailableError
from casfs.maintenance.mirror import MISSING_NAME, Mirror
from casfs.monitor import RecordingMonitor
from casfs.repository.presence import present_processes
from casfs.storage.aws_settings import _parse_credentials
from casfs.storage.base import is_name
from casfs.storage.cloud_credentials import parse_variables
from casfs.storage.counting import RequestCounter
from casfs.storage.locks import _read_record
from casfs.storage.memory import MemoryStorage
from casfs.storage.object_store_errors import (
    Answer,
    error_of_answer,
    parse_answer,
    parse_body,
    translate,
)
from casfs.storage.s3_bucket import S3Bucket
from casfs.storage.s3_connection import Response
from casfs.storage.sftp_channel import PendingReply, SftpChannel
from casfs.storage.sftp_protocol import Reader, Reply, StatusError, parse_attributes, parse_names
from casfs.store.blob_store import pack_name, parse_pack_name
from casfs.store.pending_removal import encode_notice, list_notices
from tests.fuzz.target import Target, text_of


def _small_object(data: bytes) -> MemoryStorage:
    storage = MemoryStorage()
    storage.write(f"condemned/{digest_of(data).hex()}", data)
    storage.write(f"presence/{'0' * 32}", data)
    storage.write(MISSING_NAME, data)
    return storage


def _notice(data: bytes) -> None:
    for listed in list_notices(_small_object(data), refuse_damaged=True).values():
        name, again = encode_notice(listed.notice)
        storage = MemoryStorage()
        storage.write(name, again)
        ((_, repeated),) = list_notices(storage, refuse_damaged=True).values()
        assert repeated == listed.notice


def _presence(data: bytes) -> None:
    for process in present_processes(_small_object(data)).values():
        process.is_stale(0)


def _lock(data: bytes) -> None:
    fd = os.memfd_create("lock")
    try:
        os.write(fd, data)
        _read_record(fd)
    finally:
        os.close(fd)


def _missing_of_mirror(data: bytes) -> None:
    Mirror(MemoryStorage(), _small_object(data), RecordingMonitor())._read_missing()


_RECORD = b'{"mode":"shared","verb":"backup","host":"a","pid":7,"time_s":5,"since_ns":9}'
_NOTICE = b'{"time_s":5,"packs":["%b","%b"],"writers":null,"readers":[],"meta":["%b"]}\n' % (
    (b"ab" * 32),
    (b"cd" * 32),
    (b"ef" * 32),
)


def _names_of_listing(data: bytes) -> None:
    """Take any names for those of a listing."""
    storage = MemoryStorage()
    names = [one for one in text_of(data).split("\n") if is_name(one)]
    for name in names:
        storage.write(f"sessions/{name}", b"")
        storage.write(name, b"")
        pack = parse_pack_name(name)
        assert pack is None or pack_name(pack) == name
    for session in session_ids(storage):
        list_session_files(storage, session)


class _Answers:
    """A connection to a server that answers everything with the same bytes."""

    def __init__(self, body: bytes) -> None:
        self.body = body

    def request(self, *arguments: object, **options: object) -> Response:
        return Response({"content-range": "bytes 0-"}, self.body)

    require = request


def _bucket(data: bytes) -> S3Bucket:
    return S3Bucket("s3://b", "r", lambda: _Answers(data), RequestCounter())  # type: ignore[arg-type, return-value]


def _versions(data: bytes) -> None:
    for version in _bucket(data).versions("packs"):
        assert is_name(version.name) and version.size >= 0


def _retention(data: bytes) -> None:
    _bucket(data).locked_until_s("x")


def _bucket_settings(data: bytes) -> None:
    settings = _bucket(data).settings()
    assert settings.default_lock_s is None or settings.default_lock_s >= 0


def _error_answer(data: bytes) -> None:
    for status in (200, 301, 403, 404, 503):
        str(error_of_answer(parse_body(status, data), "read", "here"))
    for error in (OSError(text_of(data)), FileNotFoundError(text_of(data))):
        assert isinstance(parse_answer(error), Answer)
        str(translate(error, "read", "here", "x"))


_PAGE = b"""<?xml version="1.0" encoding="UTF-8"?>
<ListVersionsResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>false</IsTruncated>
<NextKeyMarker>r/packs/aa</NextKeyMarker><NextVersionIdMarker>1</NextVersionIdMarker>
<Version><Key>r/packs/aa</Key><VersionId>1</VersionId><Size>7</Size>
<LastModified>2026-11-28T10:00:00.000Z</LastModified></Version>
<DeleteMarker><Key>r/packs/bb</Key><VersionId>2</VersionId>
<LastModified>2026-11-28T10:00:00Z</LastModified></DeleteMarker></ListVersionsResult>"""
_VERSIONS = [_PAGE, _PAGE.replace(b"false", b"true")]
_RETENTION = (
    b"<Retention><Mode>COMPLIANCE</Mode>"
    b"<RetainUntilDate>2027-01-01T00:00:00.000Z</RetainUntilDate></Retention>"
)
_SETTINGS = (
    b"<Both><Status>Enabled</Status><ObjectLockEnabled>Enabled</ObjectLockEnabled>"
    b"<Rule><DefaultRetention><Days>30</Days><Years>1</Years></DefaultRetention></Rule></Both>"
)
_DENIED = b"<Error><Code>AccessDenied</Code><Message>No</Message></Error> status code: 403"


class _Channel(SftpChannel):
    """A channel without a process: three requests are under way."""

    def __init__(self) -> None:
        self._place = "sftp://here"
        self._clock = lambda: 0.0
        self._lock = threading.Lock()
        self._end = None
        self._version = PendingReply(self)
        self._pending = {number: PendingReply(self) for number in (1, 2, 3)}
        self.waiting = dict(self._pending)

    def _finish(self, error: StorageError | StorageUnavailableError) -> None:
        for pending in [*self._pending.values(), self._version]:
            pending.fail(error)

    def feed(self, data: bytes) -> Mapping[str, bytes]:
        """Take the bytes of the server, then look at every answer; those that are missing never come."""
        try:
            self._take_answers(bytearray(data))
        except ValueError:
            self.broken()
        self._finish(StorageUnavailableError("reach", "here", OSError(1, "the end")))
        version = self._version
        return self._parse_version(version.result(Reply.VERSION))


def _sftp(data: bytes) -> None:
    channel = _Channel()
    try:
        channel.feed(data)
    except (StorageError, StorageUnavailableError, StatusError):
        pass
    for number, wanted in ((1, Reply.NAME), (2, Reply.ATTRS), (3, Reply.HANDLE)):
        try:
            reply = channel.waiting[number].result(wanted)
            if wanted == Reply.NAME:
                assert len(parse_names(reply)) <= len(reply)
            elif wanted == Reply.ATTRS:
                parse_attributes(Reader(reply))
            else:
                Reader(reply).string()
        except (StorageError, StorageUnavailableError, StatusError, ValueError):
            continue  # a parser's ValueError ends the connection (`_parsed`)


def _sftp_parts(data: bytes) -> None:
    """Parse the input as the payload of each kind of answer."""
    for parse in (
        parse_names,
        lambda reply: parse_attributes(Reader(reply)),
        _Channel()._parse_version,
    ):
        try:
            parse(data)
        except (ValueError, StorageError):
            continue


def _string(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def _packet(kind: int, payload: bytes) -> bytes:
    return _string(bytes([kind]) + payload)


_ATTRS = b"\0\0\0\x0d" + (7).to_bytes(8, "big") + b"\0\0\x81\xa4" + b"\0\0\0\5" * 2
_NAMES = b"\0\0\0\2" + (_string(b"aa") + _string(b"-rw-r--r-- aa") + _ATTRS) * 2
_VERSION = b"\0\0\0\3" + _string(b"fsync@openssh.com") + _string(b"1")
_STREAM = (
    _packet(Reply.VERSION, _VERSION)
    + _packet(Reply.NAME, b"\0\0\0\1" + _NAMES)
    + _packet(Reply.ATTRS, b"\0\0\0\2" + _ATTRS)
    + _packet(Reply.STATUS, b"\0\0\0\3" + b"\0\0\0\2" + _string(b"no such file") + _string(b""))
)

_CREDENTIALS = (
    b'{"Version":1,"AccessKeyId":"A","SecretAccessKey":"S","SessionToken":"T",'
    b'"Expiration":"2027-01-01T00:00:00Z"}'
)


def _credentials(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    parse_variables(text)
    _parse_credentials(text)


TARGETS = [
    Target("removal notice", _notice, lambda: [_NOTICE], (IntegrityError,)),
    Target("presence", _presence, lambda: [_RECORD], ()),
    Target("lock", _lock, lambda: [_RECORD], ()),
    Target(
        "missing objects of a mirror",
        _missing_of_mirror,
        lambda: [b'{"packs/aa":5}'],
        (IntegrityError,),
    ),
    Target(
        "names of a listing",
        _names_of_listing,
        lambda: [b"packs/ab/%b\n%b/%b.age" % (b"ab" * 32, b"cd" * 32, b"ef" * 32)],
        (),
    ),
    Target("versions in S3", _versions, lambda: _VERSIONS, (StorageError,)),
    Target("retention in S3", _retention, lambda: [_RETENTION], (StorageError, NotFoundError)),
    Target("settings of a bucket", _bucket_settings, lambda: [_SETTINGS], (StorageError,)),
    Target("refusal of a server", _error_answer, lambda: [_DENIED], ()),
    Target("SFTP stream", _sftp, lambda: [_STREAM], ()),
    Target("SFTP answers", _sftp_parts, lambda: [_NAMES, _ATTRS, _VERSION], ()),
    Target(
        "credentials",
        _credentials,
        lambda: [_CREDENTIALS, b"AWS_ACCESS_KEY_ID=A\nexport AWS_SECRET_ACCESS_KEY='S'"],
        (ValueError, KeyError, TypeError),
    ),
]
