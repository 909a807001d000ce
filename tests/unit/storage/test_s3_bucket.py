"""A bucket of S3 keeps the contract, on a real server, and explains what goes wrong."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from casfs.errors import (
    CasfsError,
    NotFoundError,
    StorageDeniedError,
    StorageError,
    StorageUnavailableError,
)
from casfs.storage.base import Storage, StorageOptions
from casfs.storage.bucket import BucketSettings
from casfs.storage.counting import RequestCounter, RequestKind, RequestTotals
from casfs.storage.remote import open_storage
from casfs.storage.s3_bucket import S3Bucket
from casfs.storage.s3_connection import S3Connection
from casfs.storage.url import parse_address
from tests.support.scripted_s3 import Answers, scripted_server
from tests.support.servers import S3Server

from .bucket_contract import BucketContract, bucket_of

_serials = itertools.count()


@pytest.fixture(scope="module")
def locking_server(s3_server: S3Server) -> S3Server:
    s3_server.make_locking_bucket("locked")
    return s3_server


@pytest.fixture
def versioned(locking_server: S3Server) -> Iterator[Storage]:
    location = parse_address(f"s3://locked/test-{next(_serials)}")
    storage = open_storage(location, locking_server.options, env={})
    yield storage
    storage.close()


@pytest.mark.slow
class TestS3Bucket(BucketContract):
    def test_the_server_refuses_to_remove_a_locked_version(
        self, versioned: Storage, locking_server: S3Server
    ) -> None:
        versioned.create("packs/a", b"needed")
        bucket_of(versioned).lock("packs/a", int(time.time()) + 60)
        (version,) = bucket_of(versioned).versions("packs")
        prefix = versioned.url.removeprefix("s3://locked/")
        refused = locking_server.delete_version("locked", f"{prefix}/packs/a", version.version)
        assert refused == 403
        versioned.write("packs/a", b"forged")
        versioned.delete("packs/a")
        assert len(list(bucket_of(versioned).versions("packs"))) == 3
        assert bucket_of(versioned).read_version("packs/a", version.version, 0, 100) == b"needed"

    def test_listings_of_several_pages_are_complete(self, versioned: Storage) -> None:
        for number in range(6):
            for _ in range(4):
                versioned.write(f"packs/{number}", b"1")
        (whole, paged) = (
            list(bucket_of(versioned).versions("packs")),
            list(_with_small_pages(versioned)),
        )
        assert len(whole) == 24
        assert paged == whole

    def test_the_settings_show_a_bucket_without_versions_and_one_with_a_default_lock(
        self, locking_server: S3Server
    ) -> None:
        locking_server.make_bucket("unversioned")
        locking_server.make_locking_bucket("default-lock")
        locking_server.set_default_lock("default-lock", 2)
        found = []
        for name in ("unversioned", "default-lock"):
            storage = open_storage(parse_address(f"s3://{name}/r"), locking_server.options)
            found.append(bucket_of(storage).settings())
            storage.close()
        assert found == [
            BucketSettings(False, False, None),
            BucketSettings(True, True, 2 * 86_400),
        ]

    def test_requests_are_counted(self, locking_server: S3Server) -> None:
        counter = RequestCounter()
        location = parse_address(f"s3://locked/test-{next(_serials)}")
        storage = open_storage(location, locking_server.options, counter, env={})
        storage.create("packs/a", b"1")
        bucket = bucket_of(storage)
        bucket.lock("packs/a", 2_000_000_000)
        bucket.locked_until_s("packs/a")
        (version,) = bucket.versions("packs")
        bucket.read_version("packs/a", version.version, 0, 10)
        assert counter.totals() == {
            RequestKind.CREATE: RequestTotals(1, sent_bytes=1),
            RequestKind.LOCK: RequestTotals(1),
            RequestKind.STAT: RequestTotals(1),
            RequestKind.LIST: RequestTotals(1),
            RequestKind.READ: RequestTotals(1, received_bytes=1),
        }
        storage.close()

    def test_a_key_that_may_only_read_cannot_lock(self, versioned: Storage) -> None:
        versioned.create("packs/a", b"1")
        location = parse_address(versioned.url)
        server = versioned.inner.bucket._connect()._settings.endpoint  # type: ignore[attr-defined]
        options = StorageOptions(
            endpoint=server,
            access_key_id="casfs-reader",
            secret_access_key="casfs-reader-secret",
        )
        reader = open_storage(location, options, env={})
        with pytest.raises(StorageDeniedError, match="do not allow it"):
            bucket_of(reader).lock("packs/a", 2_000_000_000)
        assert bucket_of(versioned).locked_until_s("packs/a") is None
        reader.close()


def _with_small_pages(storage: Storage) -> Iterator[object]:
    from casfs.storage import s3_bucket

    before, s3_bucket._PAGE = s3_bucket._PAGE, "5"
    try:
        yield from bucket_of(storage).versions("packs")
    finally:
        s3_bucket._PAGE = before


@contextmanager
def scripted() -> Iterator[tuple[Answers, S3Bucket]]:
    with scripted_server() as (answers, endpoint):
        options = StorageOptions(endpoint=endpoint, access_key_id="a", secret_access_key="b")
        bucket = S3Bucket(
            "s3://bucket/p", "p", lambda: S3Connection("bucket", options), RequestCounter()
        )
        try:
            yield answers, bucket
        finally:
            bucket.close()


def xml(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>Some words.</Message></Error>".encode()


def failure(action: Callable[[], object]) -> CasfsError:
    with pytest.raises(CasfsError) as caught:
        action()
    return caught.value


def actions(bucket: S3Bucket) -> list[Callable[[], object]]:
    return [
        bucket.settings,
        lambda: bucket.locked_until_s("packs/a"),
        lambda: bucket.lock("packs/a", 2_000_000_000),
        lambda: list(bucket.versions("packs")),
        lambda: bucket.read_version("packs/a", "v", 0, 10),
    ]


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (403, "SignatureDoesNotMatch", "the credentials are not accepted"),
        (301, "PermanentRedirect", "another region; set AWS_REGION"),
        (403, "RequestTimeTooSkewed", "this machine's clock is too far from the server's"),
        (400, "ExpiredToken", "the credentials have expired"),
        (404, "NoSuchBucket", "there is no such bucket"),
        (403, "AccessDenied", r"do not allow it \(the server said AccessDenied\)"),
    ],
)
def test_refusals_say_what_to_do(status: int, code: str, sentence: str) -> None:
    with scripted() as (answers, bucket):
        for action in actions(bucket):
            answers.queue = [(status, {}, xml(code))] * 2
            error = failure(action)
            assert isinstance(error, StorageDeniedError)
            assert re.search(sentence, str(error))
            assert "\n" not in str(error)


@pytest.mark.parametrize("status", [429, 500, 503, 0])
def test_a_busy_server_and_a_dropped_connection_are_unavailable(status: int) -> None:
    with scripted() as (answers, bucket):
        for action in actions(bucket):
            answers.queue = [(status, {}, xml("InternalError"))]
            assert isinstance(failure(action), StorageUnavailableError)
            assert answers.queue == []


def test_a_lock_that_lasts_longer_is_no_failure() -> None:
    date = b"<RetainUntilDate>2040-01-01T00:00:00Z</RetainUntilDate>"
    later = b"<Retention><Mode>COMPLIANCE</Mode>" + date + b"</Retention>"
    with scripted() as (answers, bucket):
        answers.queue = [(403, {}, xml("AccessDenied")), (200, {}, later)]
        bucket.lock("packs/a", 2_000_000_000)
        answers.queue = [(403, {}, xml("AccessDenied")), (200, {}, later)]
        assert isinstance(
            failure(lambda: bucket.lock("packs/a", 4_000_000_000)), StorageDeniedError
        )
        assert [method for method, _, _ in answers.requests] == ["PUT", "GET", "PUT", "GET"]
        assert answers.requests[0][2]["content-md5"]


def test_a_server_that_knows_no_locks_has_none() -> None:
    enabled = b"<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>"
    with scripted() as (answers, bucket):
        for status, code in ((501, "NotImplemented"), (405, "MethodNotAllowed")):
            refusal: tuple[int, dict[str, str], bytes] = (status, {}, xml(code))
            answers.queue = [refusal]
            assert bucket.settings() == BucketSettings(False, False)
            answers.queue = [(200, {}, enabled), refusal]
            assert bucket.settings() == BucketSettings(True, False)
            answers.queue = [refusal]
            assert bucket.locked_until_s("packs/a") is None
        answers.queue = [(404, {}, xml("NoSuchKey"))]
        assert isinstance(failure(lambda: bucket.locked_until_s("packs/a")), NotFoundError)


def versions_page(*names: str, more: str = "") -> bytes:
    entries = "".join(
        f"<Version><Key>{name}</Key><VersionId>v</VersionId><Size>1</Size>"
        "<LastModified>2026-11-28T03:00:00.000Z</LastModified></Version>"
        for name in names
    )
    return f"<ListVersionsResult>{more}{entries}</ListVersionsResult>".encode()


def test_hostile_names_in_a_listing_of_versions_are_left_out() -> None:
    names = ["p/packs/a", "p/packs/../x", "p/packs/.h", "q/packs/b", "p/packs/b c", "p/packs2/x"]
    with scripted() as (answers, bucket):
        answers.queue = [(200, {}, versions_page(*names))]
        assert [one.name for one in bucket.versions("packs")] == ["packs/a"]


def test_a_listing_that_goes_in_circles_ends() -> None:
    more = (
        "<IsTruncated>true</IsTruncated>"
        "<NextKeyMarker>k</NextKeyMarker><NextVersionIdMarker>v</NextVersionIdMarker>"
    )
    with scripted() as (answers, bucket):
        answers.queue = [(200, {}, versions_page("p/packs/a", more=more))] * 3
        assert "cannot be understood" in str(failure(lambda: list(bucket.versions("packs"))))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no xml",
        b"<ListVersionsResult><Version><Key>p/packs/a</Key></Version></ListVersionsResult>",
        versions_page("p/packs/a").replace(b"2026-11-28", b"yesterday"),
        b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">'
        b'<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;"><!ENTITY d "&c;&c;&c;&c;&c;&c;&c;&c;&c;&c;">'
        b'<!ENTITY e "&d;&d;&d;&d;&d;&d;&d;&d;&d;&d;"><!ENTITY f "&e;&e;&e;&e;&e;&e;&e;&e;&e;&e;">'
        b'<!ENTITY g "&f;&f;&f;&f;&f;&f;&f;&f;&f;&f;"><!ENTITY h "&g;&g;&g;&g;&g;&g;&g;&g;&g;&g;">]>'
        b"<x>&h;</x>",
    ],
)
def test_nonsense_is_one_sentence(body: bytes) -> None:
    with scripted() as (answers, bucket):
        answers.queue = [(200, {}, body)]
        error = failure(lambda: list(bucket.versions("packs")))
        assert isinstance(error, StorageError)
        assert "cannot be understood" in str(error)


def test_a_version_is_not_read_from_another_range_or_too_long() -> None:
    with scripted() as (answers, bucket):
        answers.queue = [(206, {"Content-Range": "bytes 5-9/100"}, b"56789")]
        assert isinstance(failure(lambda: bucket.read_version("packs/a", "v", 0, 5)), StorageError)
        answers.queue = [(200, {}, b"0123456789")]
        assert isinstance(failure(lambda: bucket.read_version("packs/a", "v", 0, 5)), StorageError)


def test_a_machine_without_any_credentials_is_shown_the_command_that_prints_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StorageDeniedError, match=r"set .*credentials-command"):
        S3Connection("bucket", StorageOptions())


def test_requests_go_through_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted_server() as (answers, proxy):
        for name in ("no_proxy", "NO_PROXY", "http_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("http_proxy", proxy.replace("http://", "http://user:pass@"))
        options = StorageOptions(
            endpoint="http://s3.invalid:9", access_key_id="a", secret_access_key="b"
        )
        connection = S3Connection("bucket", options)
        answers.queue = [(200, {}, b"")]
        connection.request("GET", "key", {})
        connection.close()
        ((_, path, headers),) = answers.requests
        assert path == "http://s3.invalid:9/bucket/key?"
        assert headers["host"] == "s3.invalid:9"
        assert headers["Proxy-Authorization"] == "Basic dXNlcjpwYXNz"


def test_the_bucket_is_in_the_host_name_where_the_options_say_so() -> None:
    with scripted_server() as (_, endpoint):
        url = endpoint.replace("127.0.0.1", "localhost")
        options = StorageOptions(
            endpoint=url, access_key_id="a", secret_access_key="b", virtual_hosted=True
        )
        connection = S3Connection("bucket", options)
        assert connection._url.netloc == f"bucket.{url.removeprefix('http://')}"
        assert connection._base_path == ""
        aws = S3Connection(
            "b", StorageOptions(region="eu-west-1", access_key_id="a", secret_access_key="b")
        )
        assert aws._url.geturl() == "https://b.s3.eu-west-1.amazonaws.com"
