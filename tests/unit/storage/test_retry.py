"""Asking again: what is retried, for how long, and that nothing is stored twice or half."""

from __future__ import annotations

import pytest

from casfs.errors import NotFoundError, StorageDeniedError, StorageUnavailableError
from casfs.storage.memory import MemoryStorage
from casfs.storage.retry import Retrier, RetryingStorage, RetryPolicy
from tests.support.storage_double import Call, Failure, RecordingStorage, Script


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> bool:
        self.pauses.append(seconds)
        self.now_s += seconds
        return False


def retrying(
    script: Script, policy: RetryPolicy | None = None
) -> tuple[RetryingStorage, RecordingStorage, Clock]:
    clock = Clock()
    double = RecordingStorage(MemoryStorage(), script)
    retrier = Retrier(policy or RetryPolicy(), lambda: clock.now_s, clock.sleep, jitter=lambda: 1.0)
    return RetryingStorage(double, retrier), double, clock


def fails(method: str, times: int = 1, after: bool = False) -> Script:
    return Script([Failure(lambda call: call.method == method, times=times, after=after)])


def test_pauses_grow_up_to_the_longest() -> None:
    policy = RetryPolicy(first_patience_s=1000, first_pause_s=1, max_pause_s=10)
    storage, _, clock = retrying(fails("create", 6), policy)
    storage.create("packs/a", b"1")
    assert clock.pauses == [1, 2, 4, 8, 10, 10]
    assert storage.read("packs/a") == b"1"


def test_a_storage_that_never_answered_is_given_up_soon() -> None:
    storage, _, clock = retrying(fails("size", 1000))
    with pytest.raises(StorageUnavailableError):
        storage.size("packs/a")
    assert clock.now_s == pytest.approx(20)


def test_a_storage_that_answered_before_is_waited_for() -> None:
    storage, _, clock = retrying(fails("size", 1000))
    with pytest.raises(NotFoundError):
        storage.read("packs/a")
    with pytest.raises(StorageUnavailableError):
        storage.size("packs/a")
    assert clock.now_s == pytest.approx(900)


def test_the_patience_is_that_of_all_calls_together() -> None:
    storage, double, clock = retrying(fails("size", 1000))
    storage.create("packs/a", b"1")
    for _ in range(3):
        with pytest.raises(StorageUnavailableError):
            storage.size("packs/a")
    assert clock.now_s == pytest.approx(900)
    assert double.methods()[-2:] == [
        "size",
        "size",
    ]  # one attempt each after the end of the patience


def test_an_answer_begins_the_patience_again() -> None:
    storage, _, clock = retrying(fails("size", 1000))
    for _ in range(2):
        storage.create("packs/a", b"1")
        with pytest.raises(StorageUnavailableError):
            storage.size("packs/a")
    assert clock.now_s == pytest.approx(1800)


def test_a_failure_long_ago_does_not_shorten_the_patience() -> None:
    storage, _, clock = retrying(fails("size", 1000))
    storage.create("packs/a", b"1")
    for _ in range(2):
        with pytest.raises(StorageUnavailableError):
            storage.size("packs/a")
        clock.now_s += 3600
    assert clock.now_s == pytest.approx(2 * (900 + 3600))


def test_a_call_that_alone_fails_while_others_succeed_ends_after_the_patience() -> None:
    script = fails("size", 1_000_000)
    clock = Clock()
    double = RecordingStorage(MemoryStorage(), script)
    retrier: Retrier | None = None

    def sleep(seconds: float) -> bool:
        assert retrier is not None
        retrier.run(lambda: None)
        return clock.sleep(seconds)

    retrier = Retrier(RetryPolicy(), lambda: clock.now_s, sleep, jitter=lambda: 1.0)
    storage = RetryingStorage(double, retrier)
    storage.create("packs/a", b"1")
    with pytest.raises(StorageUnavailableError):
        storage.size("packs/a")
    assert clock.now_s == pytest.approx(900)


def test_a_refused_request_is_not_retried() -> None:
    def denied(call: Call) -> BaseException:
        return StorageDeniedError("create", call.name, PermissionError(13, "no"))

    script = Script([Failure(lambda call: call.method == "create", denied)])
    storage, double, clock = retrying(script)
    with pytest.raises(StorageDeniedError):
        storage.create("packs/a", b"1")
    assert clock.pauses == []
    assert double.methods() == ["create"]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("method", ["create", "write", "delete", "commit"])
def test_a_lost_answer_to_a_change_does_no_harm(method: str, after: bool) -> None:
    storage, _, _ = retrying(fails(method, 2, after))
    if method == "commit":
        writer = storage.open_writer(in_memory=True)
        writer.append(b"first")
        writer.commit("packs/a")
        writer.discard()
    elif method == "create":
        storage.create("packs/a", b"first")
    elif method == "write":
        storage.write("packs/a", b"first")
    else:
        storage.create("packs/a", b"first")
        storage.delete("packs/a")
        assert list(storage.list("packs")) == []
        return
    assert storage.read("packs/a") == b"first"


def test_an_upload_that_arrived_is_not_sent_again() -> None:
    storage, double, _ = retrying(fails("commit", 1, after=True))
    writer = storage.open_writer(in_memory=True)
    writer.append(b"first")
    writer.commit("packs/a")
    assert double.methods() == ["commit", "size"]


def test_a_listing_continues_after_the_last_name() -> None:
    script = Script(
        [
            Failure(lambda call: call == Call("list entry", "packs/3"), times=2),
            Failure(lambda call: call == Call("list entry", "packs/0"), times=1),
        ]
    )
    storage, _, _ = retrying(script)
    for i in range(6):
        storage.create(f"packs/{i}", b"x")
    assert [entry.name for entry in storage.list("packs")] == [f"packs/{i}" for i in range(6)]


def test_closing_ends_the_waiting() -> None:
    double = RecordingStorage(MemoryStorage(), fails("size", 1000))
    storage = RetryingStorage(double, Retrier(RetryPolicy(first_patience_s=1e9)))
    storage.close()
    with pytest.raises(StorageUnavailableError):
        storage.size("packs/a")
    assert double.methods() == ["size"]
