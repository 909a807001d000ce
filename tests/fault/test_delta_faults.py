"""A host dies at each request and each commit of its work with index deltas, and each request fails once.

An undisturbed run counts the events, so a new step is covered without a change here. Afterwards nothing
counts as stored that is not, every blob is found again, and one look at the packs brings every index into
agreement.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from casfs.errors import CasfsError, StorageError, StorageUnavailableError
from casfs.storage.memory import MemoryStorage
from tests.support.hosts import (
    MAINTENANCE,
    WRITER,
    Host,
    Place,
    directories,
    require_as_rebuilt,
    require_truthful,
)
from tests.support.storage_double import Call, RecordingStorage
from tests.support.stores import noise


class Killed(BaseException):
    """The process dies here."""


@dataclass
class Events:
    """Counts requests and commits, and raises at one of them."""

    at: int = -1
    error: BaseException | None = None
    count: int = 0

    def on_call(self, call: Call) -> None:
        self._happen()

    def on_step(self, step: str) -> None:
        if self.error is None or isinstance(self.error, Killed):
            self._happen()

    def _happen(self) -> None:
        self.count += 1
        if self.count - 1 == self.at and self.error is not None:
            raise self.error


def blobs(label: str) -> list[bytes]:
    return [noise(f"{label}{number}", 100 + number) for number in range(3)]


def prepare(folder: Path) -> Place:
    """Return a place of two hosts; the second has not seen three deltas, one of which removes a pack."""
    folder.mkdir()
    place = Place()
    one, two = (Host(place, folder / name) for name in ("one", "two"))
    for label in "abc":
        with one.open(WRITER) as host:
            host.put(blobs(label))
            host.publish()
    with two.open(WRITER):
        pass
    for label in "de":
        with one.open(WRITER) as host:
            host.put([*blobs(label), *blobs("a")[:1]])
            host.publish()
    with one.open(MAINTENANCE) as host:
        (going,) = {
            record.pack
            for record in host.index.packs()
            if (at := host.index.lookup(host.store.codec.digest(blobs("b")[0]))) is not None
            and record.ordinal == at.pack
        }
        host.remove([going])
    return place


def a_session(host: Host) -> None:
    with host.open(WRITER) as opened:
        opened.put(blobs("new"))
        opened.publish()


def an_opening(host: Host) -> None:
    with host.open(WRITER):
        pass


def a_removal(host: Host) -> None:
    with host.open(MAINTENANCE) as opened:
        opened.remove(sorted(opened.packs())[:1])


def a_merge(host: Host) -> None:
    with host.open(MAINTENANCE) as opened:
        opened.merge(margin_ms=0)


def a_rebuild(host: Host) -> None:
    with host.open(MAINTENANCE) as opened:
        opened.store.rebuild()
        opened.merge(margin_ms=0, from_packs=True)


VERBS: dict[str, tuple[str, Callable[[Host], None]]] = {
    "session": ("one", a_session),
    "opening": ("two", an_opening),
    "first opening": ("three", an_opening),
    "removal": ("one", a_removal),
    "merge": ("one", a_merge),
    "rebuild": ("two", a_rebuild),
}


@dataclass
class Scene:
    """A prepared place with the indexes of its hosts, from which each try begins."""

    prepared: Path
    folder: Path
    storage: MemoryStorage

    def act(self, verb: str, events: Events) -> Place:
        """Do a verb from the prepared state, which `events` may end; return the place afterwards."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.prepared, self.folder)
        storage = MemoryStorage()
        storage._objects = copy.copy(self.storage._objects)
        place = Place(storage)
        for _ in range(50):
            next(place.ticks)
        recording = RecordingStorage(storage)
        recording.script.before = events.on_call
        name, act = VERBS[verb]
        host = Host(place, self.folder / name, storage=recording, on_step=events.on_step)
        try:
            act(host)
        except (Killed, CasfsError):
            assert events.at >= 0, "an undisturbed run fails"
        return place

    def host(self, place: Place, name: str) -> Host:
        return Host(place, self.folder / name)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("deltas")
    place = prepare(folder / "prepared")
    assert isinstance(place.storage, MemoryStorage)
    return Scene(folder / "prepared", folder / "now", place.storage)


def everything_comes_back(scene: Scene, place: Place) -> None:
    """Require that what is stored is found, and that nothing else is said to be."""
    kept = [*blobs("c"), *blobs("d"), *blobs("e")]
    for name in ("one", "two"):
        with scene.host(place, name).open(WRITER) as host:
            require_truthful(host)
            host.put([*kept, *blobs("new")])
            host.publish()
    with scene.host(place, "one").open(MAINTENANCE) as host:
        expected = directories(place, scene.folder / "model")
        require_as_rebuilt(host, expected)
        host.merge(margin_ms=0)
    for name in ("two", "new host"):
        with scene.host(place, name).open(WRITER) as host:
            require_as_rebuilt(host, expected)
            require_truthful(host)
            assert all(host.has(plain) for plain in [*kept, *blobs("new")])


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_host_that_dies_at_any_point_costs_only_time(scene: Scene, verb: str) -> None:
    undisturbed = Events()
    scene.act(verb, undisturbed)
    assert undisturbed.count > 5
    for at in range(undisturbed.count):
        events = Events(at, Killed())
        place = scene.act(verb, events)
        assert events.count > at
        everything_comes_back(scene, place)


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", ["no answer", "refused"])
def test_each_request_may_fail_once(scene: Scene, verb: str, kind: str) -> None:
    cause = OSError(5, "Input/output error")
    error: CasfsError = StorageUnavailableError("ask", "it", cause)
    if kind == "refused":
        error = StorageError("ask", "it", cause)
    undisturbed = Events(error=error)
    scene.act(verb, undisturbed)
    for at in range(undisturbed.count):
        place = scene.act(verb, Events(at, error))
        everything_comes_back(scene, place)
