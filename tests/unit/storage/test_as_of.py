"""A versioned bucket as it was at a time: what was deleted or overwritten since then is read."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from casfs.errors import NotFoundError, StorageDeniedError, StorageUnavailableError
from casfs.storage import as_of
from casfs.storage.as_of import AsOfStorage
from casfs.storage.limits import LimitedStorage, RateLimit
from casfs.storage.retry import Retrier, RetryingStorage, RetryPolicy
from tests.support.storage_double import Call, Failure, RecordingStorage, Script
from tests.support.versioned_memory import VersionedMemoryStorage

from .bucket_contract import BucketContract

S = 1_000_000_000


class Clock:
    def __init__(self) -> None:
        self.now_s = 100

    def __call__(self) -> int:
        return self.now_s * S


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def storage(clock: Clock) -> VersionedMemoryStorage:
    """A storage with a history: `a` is written at 100 s, overwritten at 200 s, deleted at 300 s."""
    storage = VersionedMemoryStorage(now_ns=clock)
    storage.create("packs/a", b"honest bytes")
    storage.create("config", b"config")
    clock.now_s = 200
    storage.write("packs/a", b"forged")
    storage.create("packs/b", b"later")
    clock.now_s = 300
    storage.delete("packs/a")
    storage.delete("config")
    return storage


def at(storage: VersionedMemoryStorage | RecordingStorage, time_s: int) -> AsOfStorage:
    assert storage.bucket is not None
    return AsOfStorage(storage, storage.bucket, time_s * S)


@pytest.mark.parametrize(
    ("time_s", "listed"),
    [
        (99, []),
        (100, [("packs/a", 12)]),
        (199, [("packs/a", 12)]),
        (200, [("packs/a", 6), ("packs/b", 5)]),
        (300, [("packs/b", 5)]),
    ],
)
def test_the_objects_of_that_time_are_listed(
    storage: VersionedMemoryStorage, time_s: int, listed: list[tuple[str, int]]
) -> None:
    assert [(one.name, one.size) for one in at(storage, time_s).list("packs")] == listed


def test_the_bytes_of_that_time_are_read_with_and_without_a_listing(
    storage: VersionedMemoryStorage,
) -> None:
    for listed_first in (False, True):
        then = at(storage, 150)
        if listed_first:
            list(then.list("packs"))
        assert then.read("packs/a") == b"honest bytes"
        assert then.read("packs/a", 7, 3) == b"byt"
        assert then.read("packs/a", 7, 300) == b"bytes"
        assert then.read("packs/a", 12, 5) == b""
        assert then.size("packs/a") == 12
        assert then.mtime_ns("packs/a") == 100 * S
        assert then.read("config") == b"config"
        assert then.read_nonblocking("packs/a", 0, 1) is None


def test_an_object_that_was_not_there_yet_or_any_more_is_not_found(
    storage: VersionedMemoryStorage,
) -> None:
    for time_s, name in ((99, "packs/a"), (199, "packs/b"), (300, "config"), (300, "packs/a")):
        with pytest.raises(NotFoundError):
            at(storage, time_s).read(name)


def test_the_past_cannot_be_changed(storage: VersionedMemoryStorage) -> None:
    then = at(storage, 150)
    actions: list[Callable[[], object]] = [
        lambda: then.write("config", b"x"),
        lambda: then.create("packs/new", b"x"),
        lambda: then.delete("packs/a"),
        lambda: then.open_writer(in_memory=True),
    ]
    for action in actions:
        with pytest.raises(StorageDeniedError, match="earlier time can only be read"):
            action()
    assert then.bucket is None
    assert then.read("packs/a") == b"honest bytes"


def test_few_versions_are_kept_and_the_others_asked_for(
    storage: VersionedMemoryStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(as_of, "_KEPT_VERSIONS", 1)
    double = RecordingStorage(storage)
    then = at(double, 250)
    assert len(list(then.list("packs"))) == 2
    asked = double.methods().count("versions")
    then.read("packs/b")
    assert double.methods().count("versions") == asked
    then.read("packs/a")
    assert double.methods().count("versions") == asked + 1


def test_a_listing_of_versions_that_breaks_off_continues_without_a_gap(
    storage: VersionedMemoryStorage,
) -> None:
    for number in range(1, 5):
        script = Script()
        double = RecordingStorage(storage, script)
        seen = 0

        def fails(call: Call, number: int = number) -> bool:
            nonlocal seen
            seen += call.method == "version entry"
            return call.method == "version entry" and seen == number

        script.failures.append(Failure(fails))
        retrying = RetryingStorage(double, Retrier(RetryPolicy(), sleep=lambda _: False))
        assert retrying.bucket is not None
        assert storage.bucket is not None
        assert list(retrying.bucket.versions("packs")) == list(storage.bucket.versions("packs"))
        assert double.methods().count("versions") == 2


def test_requests_of_a_bucket_are_repeated_like_all_others(storage: VersionedMemoryStorage) -> None:
    for method in ("settings", "locked_until_s", "lock", "read_version"):
        script = Script([Failure(lambda call, method=method: call.method == method, times=2)])  # type: ignore[misc]
        double = RecordingStorage(storage, script)
        bucket = RetryingStorage(double, Retrier(RetryPolicy(), sleep=lambda _: False)).bucket
        assert bucket is not None
        bucket.settings()
        bucket.lock("packs/b", 1000)
        assert bucket.locked_until_s("packs/b") == 1000
        (version,) = bucket.versions("packs/b")
        assert bucket.read_version("packs/b", version.version, 0, 9) == b"later"
        assert double.methods().count(method) == 3


def test_a_bucket_that_does_not_answer_is_given_up(storage: VersionedMemoryStorage) -> None:
    script = Script([Failure(lambda call: call.method == "lock", times=10_000)])
    policy = RetryPolicy(patience_s=0, first_patience_s=0)
    bucket = RetryingStorage(RecordingStorage(storage, script), Retrier(policy)).bucket
    assert bucket is not None
    with pytest.raises(StorageUnavailableError):
        bucket.lock("packs/b", 1000)


def test_reads_of_versions_keep_to_the_download_limit(storage: VersionedMemoryStorage) -> None:
    slept: list[float] = []
    limit = RateLimit(1, clock=lambda: 0.0, sleep=slept.append)
    bucket = LimitedStorage(storage, download=limit).bucket
    assert bucket is not None
    (version,) = bucket.versions("packs/b")
    bucket.read_version("packs/b", version.version, 0, 5)
    assert slept == [4.0]


class TestMemoryBucket(BucketContract):
    @pytest.fixture
    def versioned(self) -> VersionedMemoryStorage:
        return VersionedMemoryStorage()


class TestWrappedBucket(BucketContract):
    @pytest.fixture
    def versioned(self) -> RetryingStorage:
        limited = LimitedStorage(
            RecordingStorage(VersionedMemoryStorage()), download=RateLimit(1 << 30)
        )
        return RetryingStorage(limited, Retrier(RetryPolicy()))
