"""An object storage keeps the contract, on a real server, and explains what goes wrong."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import obstore
import pytest
from obstore.store import S3Store

from casfs.errors import (
    CasfsError,
    NotFoundError,
    StorageDeniedError,
    StorageError,
    StorageUnavailableError,
)
from casfs.storage.base import StorageOptions
from casfs.storage.counting import RequestCounter, RequestKind, RequestTotals
from casfs.storage.object_store import ObjectStorage
from casfs.storage.object_store_clients import s3_clients
from tests.support.scripted_s3 import Answers, scripted_server
from tests.support.servers import S3Server
from tests.support.waiting import wait_until

from .contract import StorageContract

_serials = itertools.count()


def s3(
    options: StorageOptions,
    bucket: str = "casfs",
    prefix: str | None = None,
    counter: RequestCounter | None = None,
) -> ObjectStorage:
    prefix = prefix if prefix is not None else f"test-{next(_serials)}/repository"
    return ObjectStorage(f"s3://{bucket}/{prefix}", prefix, s3_clients(bucket, options), counter)


@pytest.fixture
def storage(s3_server: S3Server) -> Iterator[ObjectStorage]:
    storage = s3(s3_server.options)
    yield storage
    storage.close()


@pytest.mark.slow
class TestObjectStorage(StorageContract):
    def test_a_listing_of_several_pages_is_complete(self, storage: ObjectStorage) -> None:
        names = [f"packs/{i % 7:02x}/{i:04x}" for i in range(1005)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: storage.create(name, b""), names))
        assert [entry.name for entry in storage.list("packs")] == sorted(names)

    def test_a_prefix_of_the_bucket_keeps_repositories_apart(
        self, storage: ObjectStorage, s3_server: S3Server
    ) -> None:
        other = s3(s3_server.options)
        storage.create("config", b"one")
        with pytest.raises(NotFoundError):
            other.read("config")
        other.close()

    def test_the_root_of_a_bucket_can_hold_a_repository(self, s3_server: S3Server) -> None:
        s3_server.make_bucket("whole")
        storage = s3(s3_server.options, "whole", "")
        storage.create("packs/ab/cd", b"1")
        assert [entry.name for entry in storage.list("packs")] == ["packs/ab/cd"]
        assert storage.read("packs/ab/cd") == b"1"
        storage.close()

    def test_requests_and_bytes_are_counted(self, s3_server: S3Server) -> None:
        counter = RequestCounter()
        storage = s3(s3_server.options, counter=counter)
        storage.create("packs/a", bytes(1000))
        storage.write("config", bytes(10))
        storage.read("packs/a", 100, 300)
        storage.size("packs/a")
        list(storage.list("packs"))
        storage.delete("packs/a")
        assert counter.totals() == {
            RequestKind.CREATE: RequestTotals(1, sent_bytes=1000),
            RequestKind.OVERWRITE: RequestTotals(1, sent_bytes=10),
            RequestKind.READ: RequestTotals(1, received_bytes=300),
            RequestKind.STAT: RequestTotals(1),
            RequestKind.LIST: RequestTotals(1),
            RequestKind.DELETE: RequestTotals(1),
        }
        storage.close()

    def test_calls_outside_the_main_thread_work_as_well(self, storage: ObjectStorage) -> None:
        def use() -> bytes:
            storage.create("packs/a", b"123")
            return storage.read("packs/a")

        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(use).result() == b"123"


def failure(action: Callable[[], object]) -> CasfsError:
    with pytest.raises(CasfsError) as caught:
        action()
    return caught.value


@pytest.mark.slow
class TestWhatGoesWrong:
    def test_wrong_keys_are_named(self, s3_server: S3Server) -> None:
        good = s3_server.options
        for bad in (replace(good, secret_access_key="x"), replace(good, access_key_id="x")):
            storage = s3(bad)
            for action in (
                lambda one=storage: one.read("config"),
                lambda one=storage: one.create("config", b"1"),
                lambda one=storage: list(one.list("packs")),
            ):
                error = failure(action)
                assert isinstance(error, StorageDeniedError)
                assert "the credentials are not accepted; check AWS_ACCESS_KEY_ID" in str(error)
            storage.close()

    def test_a_missing_bucket_is_not_a_missing_object(self, s3_server: S3Server) -> None:
        storage = s3(s3_server.options, "no-such-bucket")
        for action in (
            lambda: storage.read("config"),
            lambda: storage.create("config", b"1"),
            lambda: list(storage.list("packs")),
        ):
            error = failure(action)
            assert isinstance(error, StorageDeniedError)
            assert "there is no such bucket; create it, or correct the name" in str(error)
        storage.close()

    def test_a_key_that_may_only_read_is_denied_the_rest(self, s3_server: S3Server) -> None:
        writer = s3(s3_server.options, prefix="read-only")
        writer.create("packs/a", b"1")
        writer.close()
        options = replace(
            s3_server.options,
            access_key_id="casfs-reader",
            secret_access_key="casfs-reader-secret",
        )
        storage = s3(options, prefix="read-only")
        assert storage.read("packs/a") == b"1"
        for action in (
            lambda: storage.create("packs/b", b"1"),
            lambda: storage.write("packs/a", b"1"),
            lambda: storage.delete("packs/a"),
        ):
            error = failure(action)
            assert isinstance(error, StorageDeniedError)
            assert "the credentials do not allow it" in str(error)
        storage.close()

    def test_a_server_that_is_not_there_is_unavailable(self) -> None:
        options = StorageOptions(
            endpoint="http://127.0.0.1:1", access_key_id="a", secret_access_key="b"
        )
        storage = s3(options)
        error = failure(lambda: storage.read("config"))
        assert isinstance(error, StorageUnavailableError)
        assert "the server refuses connections; check the endpoint" in str(error)
        storage.close()

    def test_tls_spoken_to_a_server_without_it_is_explained(self, s3_server: S3Server) -> None:
        endpoint = s3_server.endpoint.replace("http://", "https://")
        storage = s3(replace(s3_server.options, endpoint=endpoint))
        error = failure(lambda: storage.read("config"))
        assert "http://" in str(error) and "TLS" in str(error)
        storage.close()


@contextmanager
def scripted() -> Iterator[tuple[Answers, ObjectStorage]]:
    with scripted_server() as (answers, endpoint):
        options = StorageOptions(endpoint=endpoint, access_key_id="a", secret_access_key="b")
        storage = s3(options, "bucket", "p")
        try:
            yield answers, storage
        finally:
            storage.close()


def xml(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>Some words.</Message></Error>".encode()


META = {"Last-Modified": "Sat, 28 Nov 2026 03:00:00 GMT", "ETag": '"x"'}


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (400, "AuthorizationHeaderMalformed", "another region; set AWS_REGION"),
        (301, "PermanentRedirect", "another region; set AWS_REGION"),
        (403, "RequestTimeTooSkewed", "this machine's clock is too far from the server's"),
        (400, "ExpiredToken", "the credentials have expired"),
        (403, "AccessDenied", r"do not allow it \(the server said AccessDenied\)"),
    ],
)
def test_refusals_of_aws_say_what_to_do(status: int, code: str, sentence: str) -> None:
    with scripted() as (answers, storage):
        for action in (lambda: storage.read("config"), lambda: storage.create("config", b"1")):
            answers.queue = [(status, {}, xml(code))]
            error = failure(action)
            assert isinstance(error, StorageDeniedError)
            assert re.search(sentence, str(error))
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("status", "code"),
    [(503, "SlowDown"), (500, "InternalError"), (429, "TooManyRequests"), (502, "x"), (504, "x")],
)
def test_a_busy_server_is_unavailable(status: int, code: str) -> None:
    with scripted() as (answers, storage):
        for action in (
            lambda: storage.read("config"),
            lambda: storage.create("config", b"1"),
            lambda: list(storage.list("packs")),
            lambda: storage.delete("config"),
        ):
            answers.queue = [(status, {}, xml(code))]
            error = failure(action)
            assert isinstance(error, StorageUnavailableError)
            assert f"the server answered {status}" in str(error)
            assert answers.queue == []


def test_a_creation_beside_a_deletion_is_to_be_tried_again() -> None:
    with scripted() as (answers, storage):
        answers.queue = [(409, {}, xml("ConditionalRequestConflict")), (404, {}, b"")]
        error = failure(lambda: storage.create("packs/a", b"1"))
        assert isinstance(error, StorageUnavailableError)


def test_a_taken_name_is_accepted_by_its_size() -> None:
    taken: tuple[int, dict[str, str], bytes] = (412, {}, xml("PreconditionFailed"))
    with scripted() as (answers, storage):
        answers.queue = [taken, (200, META | {"Content-Length": "3"}, b"")]
        storage.create("packs/a", b"123")
        answers.queue = [taken, (200, META | {"Content-Length": "2"}, b"")]
        with pytest.raises(StorageError, match="2 bytes instead of 3"):
            storage.create("packs/a", b"123")


def test_a_server_without_conditional_writes_is_asked_before_a_creation() -> None:
    with scripted() as (answers, storage):
        answers.queue = [(501, {}, xml("NotImplemented")), (404, {}, b""), (200, META, b"")]
        storage.create("packs/a", b"123")
        answers.queue = [(404, {}, b""), (200, META, b"")]
        storage.create("packs/b", b"123")
        assert [method for method, _, _ in answers.requests] == [
            "PUT",
            "HEAD",
            "PUT",
            "HEAD",
            "PUT",
        ]
        assert "If-None-Match".lower() in {name.lower() for name in answers.requests[0][2]}
        assert "If-None-Match".lower() not in {name.lower() for name in answers.requests[4][2]}


def test_a_cut_answer_is_not_taken_for_the_object() -> None:
    partial = META | {"Content-Range": "bytes 0-9/10", "Content-Length": "10"}
    with scripted() as (answers, storage):
        answers.queue = [(206, partial, b"01234")]
        error = failure(lambda: storage.read("packs/a", 0, 10))
        assert isinstance(error, StorageUnavailableError)


def test_an_answer_of_another_range_is_refused() -> None:
    wrong = META | {"Content-Range": "bytes 5-9/100"}
    whole = META
    with scripted() as (answers, storage):
        answers.queue = [(206, wrong, b"56789")]
        assert isinstance(failure(lambda: storage.read("packs/a", 0, 5)), StorageError)
        answers.queue = [(200, whole, b"0123456789")]
        assert isinstance(failure(lambda: storage.read("packs/a", 0, 5)), StorageError)


def test_a_connection_that_is_dropped_is_unavailable() -> None:
    with scripted() as (answers, storage):
        for action in (lambda: storage.read("config"), lambda: storage.create("config", b"1")):
            answers.queue = [(0, {}, b""), (0, {}, b"")]
            assert isinstance(failure(action), StorageUnavailableError)


def test_a_call_that_waits_for_its_turn_ends_when_the_storage_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A command that fails closes the repository while its other requests are still being made."""
    gate = threading.Event()
    begun = itertools.count(1)
    running: list[int] = []

    def answer_late(*_: object) -> dict[str, int]:
        running.append(next(begun))
        assert gate.wait(60)
        return {"size": 1}

    monkeypatch.setattr(obstore, "head", answer_late)
    with scripted() as (_, storage), ThreadPoolExecutor(32) as threads:
        calls = [threads.submit(storage.size, f"packs/{number}") for number in range(32)]
        pool = storage._call_threads()
        try:
            waiting = len(calls) - pool._max_workers
            wait_until(lambda: len(running) == pool._max_workers, "the calls have begun")
            wait_until(lambda: pool._work_queue.qsize() == waiting, "the others wait")
            storage.close()
            wait_until(lambda: sum(call.done() for call in calls) == waiting, "the others end")
        finally:
            gate.set()
        ended = [call.exception() for call in calls]
    assert sum(error is None for error in ended) == len(running)
    assert all("closed meanwhile" in str(error) for error in ended if error is not None)


def test_hostile_names_in_a_listing_are_left_out() -> None:
    names = ["p/packs/a", "p/packs/../../x", "p/packs/.h", "q/packs/b", "p/packs/b c", "p/packs/c"]
    entries = "".join(
        f"<Contents><Key>{name}</Key><LastModified>2026-11-28T03:00:00.000Z</LastModified>"
        '<ETag>"x"</ETag><Size>1</Size></Contents>'
        for name in names
    )
    body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
    with scripted() as (answers, storage):
        answers.queue = [(200, {}, body.encode())]
        try:
            listed = [entry.name for entry in storage.list("packs")]
        except StorageError:
            return  # obstore itself refuses such a listing
        assert listed == ["packs/a", "packs/c"]


def test_objects_go_to_aws_with_the_checksum_that_a_locking_bucket_wants() -> None:
    def config_of(endpoint: str | None) -> object:
        options = StorageOptions(endpoint=endpoint, access_key_id="a", secret_access_key="b")
        store = s3_clients("bucket", options)(60)
        assert isinstance(store, S3Store)
        return store.config.get("checksum_algorithm")

    assert config_of(None) == "sha256"
    assert config_of("https://s3.example.org") is None
