"""Presence objects: what other hosts see of a process, and that nothing depends on them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import msgspec
import pytest

from casfs.errors import StorageDeniedError
from casfs.repository.creation import create_repository
from casfs.repository.opening import open_for_reading, open_for_writing
from casfs.repository.place import LocalPlace, RemotePlace
from casfs.repository.presence import FOLDER, STALE_NS, Presence, present_processes
from casfs.repository.remote_writers import MARK, mark_remote_writers
from casfs.storage.base import Storage
from casfs.storage.clock import StorageClock
from casfs.storage.local import LocalStorage
from casfs.storage.locks import LockMode
from casfs.storage.memory import MemoryStorage
from casfs.storage.url import parse_address
from tests.support.storage_double import Call, Failure, RecordingStorage
from tests.support.waiting import wait_until

S = 1_000_000_000


def denied(call: Call) -> StorageDeniedError:
    return StorageDeniedError(call.method, call.name, PermissionError(13, "denied"))


NOW_NS = time.time_ns()


@pytest.fixture
def storage() -> RecordingStorage:
    return RecordingStorage(MemoryStorage("s3://bucket/r", lambda: NOW_NS))


def begun(storage: Storage, refresh_s: float = 600) -> Presence:
    presence = Presence(
        storage, StorageClock(storage), LockMode.SHARED, "backup", "host", refresh_s
    )
    presence.begin()
    return presence


def test_a_process_is_shown_until_it_ends(storage: RecordingStorage) -> None:
    presence = begun(storage)
    (found,) = present_processes(storage).values()
    assert (found.record.verb, found.record.host) == ("backup", "host")
    assert (found.record.since_ns, found.seen_ns) == (NOW_NS, NOW_NS)
    assert not found.is_stale(NOW_NS + STALE_NS)
    assert found.is_stale(NOW_NS + STALE_NS + 1)
    presence.end()
    assert present_processes(storage) == {}


def test_a_refreshed_object_says_since_when_the_process_runs() -> None:
    now = [1_000 * S]
    storage = MemoryStorage(now_ns=lambda: now[0])
    presence = begun(storage, refresh_s=0.01)
    now[0] = 2_000 * S
    try:
        wait_until(lambda: storage.mtime_ns(presence.name) == 2_000 * S, "a refresh")
        (found,) = present_processes(storage).values()
        assert (found.record.since_ns, found.seen_ns) == (1_000 * S, 2_000 * S)
    finally:
        presence.end()


def test_a_credential_that_cannot_overwrite_creates_another_object(
    storage: RecordingStorage,
) -> None:
    storage.script.failures.append(Failure(lambda call: call.method == "write", denied, 1000))
    presence = begun(storage, refresh_s=0.01)
    try:
        wait_until(lambda: len(present_processes(storage)) > 1, "another object")
    finally:
        presence.end()
    assert present_processes(storage) == {}


def test_a_place_that_refuses_presence_objects_is_used_all_the_same(
    storage: RecordingStorage,
) -> None:
    storage.script.failures.append(Failure(lambda call: call.name.startswith(FOLDER), denied, 9))
    presence = begun(storage)
    assert present_processes(storage.inner) == {}
    presence.end()


def test_the_end_of_a_process_does_not_wait_for_a_storage_that_is_away(
    storage: RecordingStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_back = threading.Event()

    def away(call: Call) -> StorageDeniedError:
        is_back.wait(60)
        return denied(call)

    storage.script.failures.append(Failure(lambda call: call.method == "delete", away))
    presence = begun(storage)
    monkeypatch.setattr("casfs.repository.presence._END_S", 0.01)
    presence.end()
    presence.end()
    assert storage.methods().count("delete") == 1
    assert not is_back.is_set()
    is_back.set()
    wait_until(lambda: "casfs-presence-end" not in map(_name, threading.enumerate()), "its end")


def _name(thread: threading.Thread) -> str:
    return thread.name


def test_a_credential_that_cannot_delete_leaves_an_object_and_no_error(
    storage: RecordingStorage,
) -> None:
    storage.script.failures.append(Failure(lambda call: call.method == "delete", denied))
    begun(storage).end()
    assert len(present_processes(storage)) == 1


def test_objects_that_are_no_presence_objects_are_left_out(storage: RecordingStorage) -> None:
    storage.create(f"{FOLDER}/short", b"{}")
    storage.create(f"{FOLDER}/{'0' * 32}", b"{")
    storage.create(f"{FOLDER}/{'1' * 32}", b"\xff")
    future = {"mode": "shared", "verb": "x", "host": "x", "pid": 1, "time": 1, "since_ns": 9**20}
    storage.create(f"{FOLDER}/{'2' * 32}", msgspec.json.encode(future))
    late = future | {"since_ns": NOW_NS + S}
    storage.create(f"{FOLDER}/{'3' * 32}", msgspec.json.encode(late))
    found = present_processes(storage).values()
    assert [process.record.since_ns for process in found] == [NOW_NS, NOW_NS]


def test_no_thread_is_left_of_a_process_that_ended(storage: RecordingStorage) -> None:
    before = set(threading.enumerate())
    begun(storage).end()
    assert set(threading.enumerate()) <= before


class TestOpening:
    @pytest.fixture
    def place(self, storage: RecordingStorage, monkeypatch: pytest.MonkeyPatch) -> RemotePlace:
        monkeypatch.setattr("casfs.storage.remote.open_storage", lambda *_: storage)
        return RemotePlace(parse_address("s3://bucket/r"))

    def test_a_writer_of_a_remote_place_is_shown_while_it_is_open(
        self, place: RemotePlace, storage: RecordingStorage, own_home: Path
    ) -> None:
        create_repository(place)
        with open_for_writing(place, "backup") as repository:
            (found,) = present_processes(storage).values()
            assert (found.record.mode, found.record.verb) == (LockMode.SHARED, "backup")
            assert 0 <= repository.clock.now_ns() - NOW_NS < 600 * S
        assert present_processes(storage) == {}

    def test_a_reader_is_shown_if_it_says_what_it_is(
        self, place: RemotePlace, storage: RecordingStorage, own_home: Path
    ) -> None:
        create_repository(place)
        with open_for_reading(place, reader="mount"):
            wait_until(lambda: len(present_processes(storage)) == 1, "the reader")
        assert present_processes(storage) == {}
        with open_for_reading(place):
            assert present_processes(storage) == {}

    def test_a_folder_has_presence_objects_if_hosts_reach_it_over_a_network(
        self, tmp_path: Path, own_home: Path
    ) -> None:
        place = LocalPlace(tmp_path / "r")
        create_repository(place)
        with open_for_writing(place, "backup"):
            assert not (place.root / FOLDER).exists()
        storage = LocalStorage(place.root)
        mark_remote_writers(storage)
        assert storage.size(MARK)
        with open_for_writing(place, "backup"):
            assert len(present_processes(storage)) == 1
        assert present_processes(storage) == {}
        storage.close()
