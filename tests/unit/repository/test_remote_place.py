"""A repository in a remote place: what is kept on this machine, and what is refused, without any server."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from casfs.digest import digest_of
from casfs.errors import (
    ExistsError,
    LockedError,
    NotFoundError,
    RefusedError,
    StorageUnavailableError,
)
from casfs.repository import opening
from casfs.repository.creation import PROBED_NAME, create_repository
from casfs.repository.opening import open_for_maintenance, open_for_reading, open_for_writing
from casfs.repository.place import LocalPlace, RemotePlace, as_place, place_of
from casfs.repository.remote_writers import (
    MARK,
    is_shared,
    mark_remote_writers,
    require_no_remote_writers,
)
from casfs.storage.base import StorageOptions
from casfs.storage.local import LocalStorage
from casfs.storage.locks import LockMode, list_and_reap_locks
from casfs.storage.memory import MemoryStorage
from casfs.storage.url import Scheme, StorageAddress, parse_address
from casfs.store.blob_store import pack_name
from tests.support.storage_double import Call, Failure, RecordingStorage
from tests.support.stores import store_blobs


@pytest.fixture
def place(memory: RecordingStorage, own_home: Path) -> RemotePlace:
    return RemotePlace(parse_address("s3://bucket/r"))


def test_a_path_is_a_local_place_and_a_url_a_remote_one(tmp_path: Path) -> None:
    assert as_place(tmp_path) == LocalPlace(tmp_path)
    assert place_of(StorageAddress(Scheme.FILE, "x"), StorageOptions()) == LocalPlace(
        Path("x").absolute()
    )
    assert isinstance(place_of(parse_address("s3://bucket/r"), StorageOptions()), RemotePlace)


def test_a_new_repository_records_what_its_place_does(
    place: RemotePlace, memory: RecordingStorage
) -> None:
    create_repository(place)
    assert b'"creates_exclusively":true' in memory.inner.read(PROBED_NAME)
    assert memory.inner.size(MARK) > 0
    assert list(memory.inner.list("probe")) == []


def test_a_repository_is_created_once(place: RemotePlace) -> None:
    create_repository(place)
    with pytest.raises(ExistsError, match="there is a repository in s3://bucket/r already"):
        create_repository(place)


def test_one_of_two_hosts_that_create_a_repository_at_once_is_refused(
    place: RemotePlace, memory: RecordingStorage
) -> None:
    def create_another(call: Call) -> None:
        if call.method == "create" and call.name == "config":
            memory.script.before = None
            memory.inner.create("config", bytes(call.size))

    memory.script.before = create_another
    with pytest.raises(ExistsError):
        create_repository(place)


def test_objects_without_a_configuration_are_not_taken_over(
    place: RemotePlace, memory: RecordingStorage
) -> None:
    memory.inner.create("packs/ab/abcd", b"x")
    with pytest.raises(ExistsError, match="name an empty place"):
        create_repository(place)


def test_the_index_and_the_locks_are_in_the_users_cache(place: RemotePlace, own_home: Path) -> None:
    config = create_repository(place)
    with open_for_writing(place, "test") as repository:
        cache = own_home / "cache" / "casfs" / config.id[:32]
        assert repository.store.index.path == cache / "index"
        (held,) = list_and_reap_locks(cache / "locks").values()
        assert held.mode == LockMode.SHARED
        assert repository.other_locks() == {}
    assert list((cache / "locks").iterdir()) == []


def test_opening_for_writing_leaves_the_mark_before_it_reads_what_is_to_be_removed(
    place: RemotePlace, memory: RecordingStorage
) -> None:
    create_repository(place)
    memory.inner.delete(MARK)
    memory.calls.clear()
    open_for_writing(place, "test").close()
    steps = [(call.method, call.name) for call in memory.calls]
    assert steps.index(("create", MARK)) < steps.index(("list", "condemned"))


def test_two_maintenance_commands_of_a_machine_exclude_each_other(place: RemotePlace) -> None:
    create_repository(place)
    with open_for_maintenance(place, "prune"), pytest.raises(LockedError, match="prune on"):
        open_for_maintenance(place, "repair snapshots")


def test_a_place_without_a_repository_is_not_found(place: RemotePlace) -> None:
    with pytest.raises(NotFoundError, match="there is no repository in s3://bucket/r"):
        open_for_reading(place)


def test_a_place_that_does_not_answer_leaves_no_lock(
    place: RemotePlace, memory: RecordingStorage, own_home: Path
) -> None:
    config = create_repository(place)
    memory.script.failures.append(Failure(lambda call: call == Call("list", "packs")))
    with pytest.raises(StorageUnavailableError):
        open_for_writing(place, "test")
    locks = own_home / "cache" / "casfs" / config.id[:32] / "locks"
    assert list(locks.iterdir()) == []


def test_a_wrong_clock_is_reported(
    place: RemotePlace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage = MemoryStorage("s3://bucket/r", now_ns=lambda: 1_000_000_000)
    monkeypatch.setattr("casfs.storage.remote.open_storage", lambda *arguments: storage)
    create_repository(place)
    assert "set it right" in caplog.text


@pytest.mark.parametrize("parallel_requests", [1, 4])
def test_a_lost_index_costs_two_reads_for_each_pack_over_a_distance(
    place: RemotePlace, memory: RecordingStorage, own_home: Path, parallel_requests: int
) -> None:
    assert isinstance(memory.inner, MemoryStorage)
    memory.inner.capabilities = replace(
        memory.inner.capabilities, parallel_requests=parallel_requests
    )
    config = create_repository(place)
    plains = [f"blob {number}".encode() * 10 for number in range(9)]
    for plain in plains:
        with open_for_writing(place, "test") as repository:
            store_blobs(repository.store, [plain])
    shutil.rmtree(own_home / "cache" / "casfs" / config.id[:32] / "index")
    memory.calls.clear()
    with open_for_writing(place, "test") as repository:
        reads = Counter(call.name for call in memory.calls if call.method == "read")
        packs = [pack_name(pack) for pack, _ in repository.store.stored_packs()]
        assert len(packs) == 9
        assert {reads[pack] for pack in packs} == {2 if parallel_requests > 1 else 3}
        assert [repository.store.read(digest_of(plain)) for plain in plains] == plains


class TestRemoteWriters:
    def test_a_folder_without_the_mark_is_pruned_by_its_locks(self, tmp_path: Path) -> None:
        assert not is_shared(LocalStorage(tmp_path))
        require_no_remote_writers(LocalStorage(tmp_path))

    def test_a_folder_with_the_mark_is_not(self, tmp_path: Path) -> None:
        storage = LocalStorage(tmp_path, sync=False)
        (tmp_path / "tmp").mkdir()
        mark_remote_writers(storage)
        mark_remote_writers(storage)
        assert is_shared(storage)
        with pytest.raises(RefusedError, match="has begun to write to"):
            require_no_remote_writers(storage)

    def test_a_place_without_locks_never_is(self) -> None:
        assert is_shared(MemoryStorage())


def test_the_module_that_opens_needs_no_object_storage_for_a_folder() -> None:
    import subprocess
    import sys

    program = f"import {opening.__name__}, sys; print('obstore' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
