"""A storage that may answer each read with any object that it ever held, or with none.

The storage keeps every version of every object of a repository, and of another repository of the same
recipients. It lies at random: it returns an old version, an object of another name, a part, or nothing, and
its listings omit names and show removed ones. The machine has the repository pinned. Whatever it does: what
it gives out was written by its owner at that path, a snapshot that it takes for proven is the owner's, a
backup that it publishes is whole, and a lie that it cannot undo becomes a sentence.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from casfs.cli.app import casfs
from casfs.cli.settings import Settings
from casfs.digest import SnapshotId
from casfs.errors import CasfsError, NotFoundError
from casfs.repository.creation import create_repository
from casfs.repository.opening import OpenOptions, open_for_reading
from casfs.repository.place import LocalPlace
from casfs.storage.base import ListedObject
from casfs.storage.local import LocalStorage
from tests.support.effort import EFFORT
from tests.support.encryption import RECIPIENT, SECRET, unlock
from tests.support.stores import noise

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 * EFFORT)]

# Each example runs six commands on a copy of the repository.
SETTINGS = settings(max_examples=20 * EFFORT)

PATHS = ("small", "large", "folder/other")


class Universe:
    """Every object that the storage ever held, by name, and all of them in one list."""

    def __init__(self) -> None:
        self.versions: dict[str, list[bytes]] = {}

    def record(self, root: Path) -> None:
        """Remember what a repository holds now."""
        for folder in ("config", "recipients", "packs", "meta", "deltas", "snapshots", "sessions"):
            below = root / folder
            for path in sorted(below.rglob("*")) if below.is_dir() else [below]:
                if path.is_file():
                    known = self.versions.setdefault(str(path.relative_to(root)), [])
                    data = path.read_bytes()
                    if data not in known:
                        known.append(data)

    @property
    def objects(self) -> list[bytes]:
        """All objects, sorted by name."""
        return [data for name in sorted(self.versions) for data in self.versions[name]]


class LyingStorage(LocalStorage):
    """A storage that answers some reads with another object; `universe` and `lies` are set by the test."""

    universe = Universe()
    random = random.Random(0)
    share = 0.0
    _lock = threading.Lock()

    def _lie(self) -> bool:
        with self._lock:
            return self.random.random() < self.share

    def _answer(self, name: str) -> bytes:
        """Return another object in the place of one; raise NotFoundError."""
        with self._lock:
            kind = self.random.choice(["none", "version", "any", "any", "part"])
            found = self.universe.versions.get(name) or self.universe.objects
            data = self.random.choice(self.universe.objects if kind == "any" else found)
            if kind == "part":
                return data[: self.random.randrange(len(data) + 1)]
        if kind == "none":
            raise NotFoundError(f"{name} does not exist")
        return data

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        if not self._lie():
            return super().read(name, offset, size)
        data = self._answer(name)
        return data[offset:] if size is None else data[offset : offset + size]

    def read_nonblocking(self, name: str, offset: int, size: int) -> bytes | None:
        return None

    def size(self, name: str) -> int:
        return len(self._answer(name)) if self._lie() else super().size(name)

    def list(self, prefix: str) -> Iterator[ListedObject]:
        found = {one.name: one for one in super().list(prefix)}
        for name in sorted(self.universe.versions):
            if name.startswith(prefix + "/") and self._lie():
                if name in found:
                    del found[name]
                else:
                    found[name] = ListedObject(name, len(self.universe.versions[name][0]), 0)
        yield from (found[name] for name in sorted(found))


class Owner:
    """The owner's machine: a repository with a history, what was in the source at each time, and the pins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "repository"
        self.source = folder / "source"
        self.universe = Universe()
        self.contents: dict[str, set[bytes]] = {path: set() for path in PATHS}
        self.snapshots: set[SnapshotId] = set()

    def run(self, *arguments: str) -> Result:
        """Run a command in this process with the owner's identity."""
        return CliRunner().invoke(
            casfs,
            [
                *arguments,
                "--no-sync",
                "--repo",
                str(self.root),
                "--identity",
                str(self.folder / "identity"),
            ],
            obj=Settings(),
            standalone_mode=False,
        )

    def change(self, label: str) -> None:
        """Write other content into the source."""
        (self.source / "folder").mkdir(parents=True, exist_ok=True)
        for path, size in zip(PATHS, (50, 900_000, 5_000), strict=True):
            data = noise(f"{label} {path}", size)
            (self.source / path).write_bytes(data)
            self.contents[path].add(data)

    def learn(self) -> None:
        """Remember the objects and the snapshots that there are."""
        self.universe.record(self.root)
        with open_for_reading(self.root, OpenOptions(unlock=unlock)) as repository:
            self.snapshots |= set(repository.snapshots.ids())


def _history(folder: Path) -> Owner:
    """Return the owner of a repository after some months, beside a second repository."""
    (folder / "identity").write_text(SECRET + "\n")
    second = Owner(folder / "second")
    second.folder.mkdir()
    (second.folder / "identity").write_text(SECRET + "\n")
    create_repository(second.root, [RECIPIENT])
    second.change("second")
    assert second.run("backup", str(second.source)).exception is None
    owner = Owner(folder)
    create_repository(owner.root, [RECIPIENT])
    owner.universe.record(second.root)
    for label in ("first", "second", "third"):
        owner.learn()
        owner.change(label)
        assert owner.run("backup", str(owner.source), "--tag", label).exception is None
    owner.learn()
    assert owner.run("tag", "latest", "--add", "kept").exception is None
    owner.learn()
    assert owner.run("forget", "--keep-last", "2", "--prune").exception is None
    owner.learn()
    return owner


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owner]:
    folder = tmp_path_factory.mktemp("lying")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield _history(folder)


def _lying(place: LocalPlace, sync: bool = True, on_step: Callable[[str], None] | None = None):  # type: ignore[no-untyped-def]
    return LyingStorage(place.root, sync=False)


def _restored(owner: Owner, target: Path) -> None:
    """Require that every file below a target has content that its owner wrote at its path."""
    start = target / str(owner.source).lstrip("/")
    for file in target.rglob("*"):
        if file.is_file():
            path = str(file.relative_to(start))
            assert file.read_bytes() in owner.contents[path], path


@SETTINGS
@given(seed=st.integers(0, 1 << 32), share=st.sampled_from([0.02, 0.1, 0.5]))
def test_no_command_uses_what_its_owner_did_not_write(
    history: Owner, seed: int, share: float
) -> None:
    mutable = history.folder / "mutable"
    for name in ("repository", "state", "cache"):
        shutil.copytree(history.folder / name, mutable / name, symlinks=True)
    try:
        _try_every_command(history, seed, share)
    finally:
        for name in ("repository", "state", "cache"):
            shutil.rmtree(history.folder / name)
            os.rename(mutable / name, history.folder / name)
        mutable.rmdir()


def _try_every_command(owner: Owner, seed: int, share: float) -> None:
    target = owner.folder / "target"
    owner.change("third")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalPlace, "open_storage", _lying)
        patch.setattr(LyingStorage, "universe", owner.universe)
        patch.setattr(LyingStorage, "random", random.Random(seed))
        patch.setattr(LyingStorage, "share", share)
        results = {"backup": owner.run("backup", str(owner.source))}
        for command in (
            ("restore", "latest", "--target", str(target)),
            ("check", "--read-data"),
            ("snapshots",),
            ("find", "small"),
            ("tag", "latest", "--add", "late"),
        ):
            results[command[0]] = owner.run(*command)
            if command[0] == "restore":
                _restored(owner, target)
                shutil.rmtree(target, ignore_errors=True)
        for command_name, result in results.items():
            error = result.exception
            assert error is None or isinstance(error, CasfsError), (command_name, error)
        proven = _proven(owner)
    patch.undo()
    published = set()
    with open_for_reading(owner.root, OpenOptions(unlock=unlock)) as repository:
        published = set(repository.snapshots.ids())
    assert proven <= owner.snapshots | published
    # Nothing was removed, so on an honest storage all that was published must be whole. The machine's own
    # index may have taken a lie about what a pack holds.
    assert owner.run("repair", "index").exception is None
    result = owner.run("check", "--read-data")
    assert result.exception is None and not result.return_value, result.output


def _proven(owner: Owner) -> set[SnapshotId]:
    """Return the snapshots that the machine takes for proven, while the storage lies."""
    found = set()
    try:
        with open_for_reading(owner.root, OpenOptions(unlock=unlock)) as repository:
            for snapshot_id in repository.snapshots.ids():
                try:
                    if repository.snapshots.provenance.is_from_trusted_writer(snapshot_id):
                        found.add(snapshot_id)
                except CasfsError:
                    continue
    except CasfsError:
        return set()
    return found
