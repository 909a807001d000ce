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
