"""Every kind of damage to every kind of object, and then every verb.

Whatever is damaged: nothing is given out with another digest than it had, what is not hit stays readable,
what is lost is named, no verb ends by anything but an error of its own, and none makes it worse.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from casfs.format.pack import PACK_PREFIXES
from casfs.storage.locks import LockMode, RepositoryLock
from tests.support.cli import WITHOUT_READING_EVERYTHING, Casfs
from tests.support.damage import (
    APPENDED,
    CLOSED,
    INSIDE,
    REMOVED,
    SWAPPED,
    WHATS,
    IntactRepository,
    Target,
    damage,
    moved,
)
from tests.support.observation import FLAGGED, LOST, Files, look_at_source
from tests.support.process_runner import Outcome, Scene, Stage
from tests.support.stores import pack_paths

pytestmark = pytest.mark.slow

PACK_PLACES = (
    "data of a pack",
    "the directory of a pack",
    "the trailer of a pack",
    "a group of a pack",
    "a tree",
)
DERIVED = ("the index", "the seal of the index", "what is condemned", "a lock that was left")
PLACES = (*PACK_PLACES, "a snapshot", "the configuration", *DERIVED)

# A pack is one file: what hits the file as a whole hits all places in it.
CELLS = [
    (place, what)
    for place in PLACES
    for what in WHATS
    if what in (*INSIDE, APPENDED) or place not in PACK_PLACES[1:4]
]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def intact(stage: Stage, folder: Path) -> IntactRepository:
    return IntactRepository(stage, folder)


@pytest.fixture(scope="module")
def weak_stage() -> Iterator[Stage]:
    """Processes of root without the capability to read files of mode 000."""
    with Stage(WITHOUT_READING_EVERYTHING) as found:
        yield found


@dataclass(slots=True)
class Cell:
    """One damage to one place, and fresh copies of the repository that has it."""

    intact: IntactRepository
    place: str
    what: str
    stage: Stage
    copies: int = 0

    def damaged(self) -> Scene:
        """Return a new copy of the repository with the damage."""
        original = self.intact.scene
        self.copies += 1
        root = original.root.with_name(f"damaged {self.copies}")
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(original.root, root)
        damage(self.target(root), self.what)
        return Scene(self.stage, root, original.source, dict(self.intact.published))

    def target(self, root: Path) -> Target:
        """Return a damaged copy; a swap with a foreign file uses a copy of that file."""
        target = moved(self.intact.targets[self.place], self.intact.scene.root, root)
        if target.other.is_relative_to(root):
            return target
        other = root.with_name("foreign file")
        shutil.copyfile(target.other, other)
        return Target(target.path, target.begin, target.end, other)

    def act(self, scene: Scene, verb: str, **arguments: Any) -> Outcome:
        return scene.act(verb, **arguments)

    def look(self, scene: Scene, verb: str = "look") -> dict[str, Files]:
        """Read everything; every entry must be as it was or reported as lost."""
        outcome = self.act(scene, verb)
        if outcome.error is not None:
            return {}
        for name, files in outcome.result.items():
            truth = self.intact.published[name]
            for path, found in files.items():
                assert found in (LOST, truth.get(path)), f"{path} in {name} is given as {found}"
        return dict(outcome.result)

    def must_survive(self) -> dict[str, set[str]]:
        """Return the files that the damage does not hit, by snapshot."""
        target = self.intact.targets[self.place]
        survivors = {}
        for name, reaches in self.intact.reaches.items():
            if self.place == "a snapshot" and (
                name == target.path.name or (self.what == SWAPPED and name == target.other.name)
            ):
                continue
            survivors[name] = {
                path
                for path, reach in reaches.items()
                if self.place not in PACK_PLACES or not reach.touches(target, self.what)
            }
        return survivors


@pytest.fixture(params=CELLS, ids=[f"{place} {what}".replace(" ", "-") for place, what in CELLS])
def cell(request: pytest.FixtureRequest, intact: IntactRepository, stage: Stage) -> Iterator[Cell]:
    place, what = request.param
    if what == CLOSED and os.geteuid() == 0:
        stage = request.getfixturevalue("weak_stage")
    found = Cell(intact, place, what, stage)
    yield found
    for number in range(1, found.copies + 1):
        shutil.rmtree(intact.scene.root.with_name(f"damaged {number}"))


def right(listed: dict[str, Files], truth: dict[str, Files]) -> set[tuple[str, str]]:
    """Return the intact entries, as (snapshot, path)."""
    return {
        (name, path)
        for name, files in listed.items()
        for path, found in files.items()
        if found == truth[name].get(path)
    }


def lost_of(listed: dict[str, Files], truth: dict[str, Files]) -> dict[str, set[str]]:
    """Return the files of each listed snapshot that cannot be read, or not even be found."""
    return {
        name: {path for path, what in truth[name].items() if files.get(path) != what}
        for name, files in listed.items()
    }


def is_named(path: str, reported: set[str]) -> bool:
    """Return whether a path, or a directory above it, was reported."""
    return any(path == one or one == "" or path.startswith(one + "/") for one in reported)


def test_any_damage_costs_only_what_it_hits_is_named_and_never_grows(
    cell: Cell,
) -> None:
    truth = cell.intact.published
    found = cell.look(cell.damaged())
    if cell.place == "the configuration" and cell.what not in (SWAPPED,):
        _must_be_refused(cell, "look", "check", "restore", "backup", "prune", "repair_index")
        return
    for name, files in cell.must_survive().items():
        for path in files:
            assert found[name].get(path) == truth[name][path], f"{path} is lost and was not hit"
    readable = right(found, truth)
    lost = lost_of(found, truth)
    if cell.what == CLOSED and cell.place in ("what is condemned", "a lock that was left"):
        # The unreadable object may say that a pack must not be relied on, or that another process
        # writes: so no command does.
        _must_be_refused(cell, "backup", "prune", "repair_index", "repair_snapshots")
        return
    assert right(cell.look(cell.damaged(), "look_through_the_mount"), truth) == readable
    _check_names_it(cell, lost)
    _restore_names_it(cell, found)
    _backup_goes_on(cell, readable)
    _repair_index_keeps_it(cell, readable)
    _prune_makes_it_no_worse(cell, readable, lost)
    _repair_snapshots_drops_no_more(cell, readable)


def _must_be_refused(cell: Cell, *verbs: str) -> None:
    """Require that verbs say what they cannot read, and change nothing that matters."""
    arguments: dict[str, dict[str, Any]] = {
        "restore": {"target": str(cell.intact.scene.root.with_name("target"))},
        "backup": {"source": str(cell.intact.scene.source)},
    }
    printed = ("config", "no repository", "condemned", "locks")
    for verb in verbs:
        scene = cell.damaged()
        before = _kept_files(scene.root)
        outcome = cell.act(scene, verb, **arguments.get(verb, {}))
        assert outcome.error is not None
        assert any(word in outcome.error["error"] for word in printed), outcome.error
        assert _kept_files(scene.root) == before


def _kept_files(root: Path) -> dict[Path, bytes]:
    folders = (*PACK_PREFIXES, "snapshots", "condemned")
    return {
        path: path.read_bytes()
        for path in (root / "config", *(p for name in folders for p in (root / name).rglob("*")))
        if path.is_file()
    }


def _check_names_it(cell: Cell, lost: dict[str, set[str]]) -> None:
    scene = cell.damaged()
    outcome = cell.act(scene, "check")
    found = outcome.done()
    # What this user may not read is no proof of damage; everything else is.
    kind = "unreadable" if cell.what == CLOSED else "damage"
    assert {one["kind"] for one in found} <= {kind}, found
    if cell.what == REMOVED:
        # The index was rebuilt without the pack, so its name is forgotten; its blobs are not.
        assert bool(found) == any(lost.values())
    elif cell.place not in (*DERIVED, "the configuration"):
        target = cell.intact.targets[cell.place].path.name
        assert any(target in (one["pack"], one["snapshot"]) for one in found), found
    for name, paths in lost.items():
        reported = {
            one["path"] for one in found if one["snapshot"] == name and one["path"] is not None
        }
        for path in paths:
            assert is_named(path, reported), f"{path} is lost, and the check names {reported}"
    # What a check has marked, and found, costs nothing that could be read before.
    assert right(cell.look(scene), cell.intact.published) >= {
        (name, path) for name, paths in cell.must_survive().items() for path in paths
    }


def _restore_names_it(cell: Cell, found: dict[str, Files]) -> None:
    for name, files in found.items():
        scene = cell.damaged()
        target = scene.root.with_name("target")
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        reported = cell.act(scene, "restore", target=str(target), snapshot=name).done()
        named = {
            problem["path"] for problem in reported["problems"] if problem["kind"] != "metadata"
        }
        start = str(target).lstrip("/") + "/"
        restored = {
            path.removeprefix(start): what
            for path, what in look_at_source(target).items()
            if path.startswith(start)
        }
        truth = cell.intact.published[name]
        for path, what in truth.items():
            if restored.get(path) != what:
                assert path not in restored
                assert is_named(path, named), f"{path} is not restored, and not named"
            if files.get(path) == what:
                assert restored.get(path) == what, f"{path} can be read and was not restored"
        shutil.rmtree(target)


def _backup_goes_on(cell: Cell, readable: set[tuple[str, str]]) -> None:
    scene = cell.damaged()
    cell.act(scene, "check").done()
    outcome = cell.act(scene, "backup", source=str(scene.source))
    reported = outcome.done()
    shows = look_at_source(scene.source)
    truth = cell.intact.published | {reported["id"]: shows}
    after = cell.act(scene, "look").done()
    if cell.what != CLOSED:
        assert after[reported["id"]] == shows, "what a check has marked was stored again"
    assert right(after, truth) >= readable
    if cell.place in PACK_PLACES and cell.what != CLOSED:
        # Each file that is in the source still is whole again in all snapshots.
        healed = right(after, truth)
        for name in (cell.intact.first, cell.intact.second):
            for path, what in truth[name].items():
                if shows.get(path) == what and what != "directory" and cell.place != "a tree":
                    assert (name, path) in healed, f"{path} was seen again and not healed"


def _repair_index_keeps_it(cell: Cell, readable: set[tuple[str, str]]) -> None:
    scene = cell.damaged()
    cell.act(scene, "repair_index").done()
    after = right(cell.look(scene), cell.intact.published)
    if cell.what == CLOSED or cell.place not in PACK_PLACES:
        assert after >= readable
    if cell.what in INSIDE or cell.what == APPENDED:
        survivors = {(name, path) for name, paths in cell.must_survive().items() for path in paths}
        assert after >= survivors, "intact blobs of a damaged pack were not found again"


def _prune_makes_it_no_worse(
    cell: Cell, readable: set[tuple[str, str]], lost: dict[str, set[str]]
) -> None:
    for checked in (False, True):
        scene = cell.damaged()
        if checked:
            cell.act(scene, "check").done()
        before = scene.packs() if cell.what != CLOSED else set()
        outcome = cell.act(scene, "prune", share=0.0)
        if outcome.error is not None:
            assert outcome.error["exit"] in (1, 5), outcome.error
            assert cell.what == CLOSED or outcome.error["exit"] == 5
            assert cell.what == CLOSED or scene.packs() == before
        if cell.place == "a tree" and any(lost.values()):
            assert outcome.error is not None, "what is below a lost directory was not known"
        if cell.place == "a snapshot" and cell.what not in (REMOVED, CLOSED):
            assert outcome.error is not None, "what a damaged snapshot needs was not known"
        assert right(cell.look(scene), cell.intact.published) >= readable


def _repair_snapshots_drops_no_more(cell: Cell, readable: set[tuple[str, str]]) -> None:
    scene = cell.damaged()
    kept = _kept_files(scene.root)
    outcome = cell.act(scene, "repair_snapshots")
    if cell.what == CLOSED:
        # What this user may not read is not lost: another user can read it.
        assert _kept_files(scene.root) == kept
        assert outcome.error is not None or outcome.done() == []
        assert right(cell.look(scene), cell.intact.published) == readable
        return
    reported = outcome.done()
    new_ids = {one["new_id"]: one["id"] for one in reported if one["new_id"] is not None}
    after = cell.act(scene, "look").done()
    for name, files in after.items():
        truth = cell.intact.published[new_ids.get(name, name)]
        for path, found in files.items():
            assert found == truth.get(path) or found.startswith(FLAGGED), path
    by_old = {new_ids.get(name, name): files for name, files in after.items()}
    for name, path in readable:
        assert by_old.get(name, {}).get(path) == cell.intact.published[name][path], path
    left = cell.act(scene, "check").done()
    assert [one for one in left if one["snapshot"] is not None] == []


def test_a_prune_loses_nothing_whichever_packs_were_swapped(
    intact: IntactRepository, stage: Stage
) -> None:
    packs = pack_paths(intact.scene.root)
    sizes = {path.stat().st_size for path in packs}
    assert len(sizes) >= 3, "packs take the places of shorter ones"
    for path, other in combinations(packs, 2):
        target = Target(path, 0, path.stat().st_size, other)
        pair = f"{path.name[:8]} and {other.name[:8]}"
        for checked in (False, True):
            root = intact.scene.root.with_name("changed places")
            shutil.copytree(intact.scene.root, root)
            try:
                damage(moved(target, intact.scene.root, root), SWAPPED)
                scene = Scene(stage, root, intact.scene.source, dict(intact.published))
                before = right(scene.act("look").done(), intact.published)
                if checked:
                    scene.act("check").done()
                for share in (0.0, 1.0):
                    scene.act("prune", share=share)
                    after = right(scene.act("look").done(), intact.published)
                    assert after >= before, f"{pair}, checked: {checked}, share {share}"
            finally:
                shutil.rmtree(root)


@pytest.mark.parametrize("what", [what for what in WHATS if what not in (CLOSED, REMOVED)])
def test_a_held_lock_that_cannot_be_read_excludes_writers_and_no_readers(
    intact: IntactRepository, what: str
) -> None:
    root = intact.scene.root.with_name("damaged lock")
    shutil.copytree(intact.scene.root, root)
    try:
        reader = RepositoryLock.acquire(root / "locks", "check", LockMode.READER)
        with reader, RepositoryLock.acquire(root / "locks", "backup") as lock:
            path = root / "locks" / lock.name
            other = root / "locks" / reader.name
            damage(Target(path, 0, path.stat().st_size, other), what)
            scene = Scene(intact.scene.stage, root, intact.scene.source, dict(intact.published))
            writers: dict[str, dict[str, Any]] = {
                "backup": {"source": str(scene.source)},
                "prune": {},
                "repair_index": {},
            }
            for verb, arguments in writers.items():
                outcome = scene.act(verb, **arguments)
                if what in (SWAPPED, APPENDED):
                    continue  # it may be read as another lock, or as itself
                assert outcome.error is not None and outcome.error["exit"] == 6
            scene.must_be_intact(look_at_source(scene.source))
    finally:
        shutil.rmtree(root)


def _is_stored_again(casfs: Casfs, scene: Scene, target: Path) -> None:
    """Require that the snapshot of a backup that found damage is published and whole."""
    casfs.run("restore", "latest", "--target", target)
    assert _contents(target / str(scene.source).lstrip("/")) == _contents(scene.source)
    casfs.run("backup", scene.source)


def _contents(folder: Path) -> dict[Path, bytes]:
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


FLIPPED = INSIDE[0]
EXPECTED_EXITS = {
    # What `check --read-data`, `restore`, `prune`, `snapshots` and `backup` exit with.
    # The command has a home of its own, and so a new index: a backup verifies what it relies on in the packs.
    "data of a pack": (5, 5, 0, 0, 5),
    "a tree": (5, 5, 5, 0, 0),
    "a snapshot": (5, 5, 5, 0, 0),
    "the configuration": (5, 5, 5, 5, 5),
    "the index": (0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("place", EXPECTED_EXITS)
def test_the_command_exits_with_the_documented_codes_on_damage(
    intact: IntactRepository, stage: Stage, tmp_path: Path, place: str
) -> None:
    cell = Cell(intact, place, FLIPPED, stage)
    commands = {
        "check": ("--read-data",),
        "restore": (intact.first, "--target", str(tmp_path / "target")),
        "prune": (),
        "snapshots": (),
        "backup": (str(intact.scene.source),),
    }
    for (verb, arguments), code in zip(commands.items(), EXPECTED_EXITS[place], strict=True):
        scene = cell.damaged()
        casfs = Casfs(scene.root, tmp_path)
        casfs.run(verb, *arguments, expect=code)
        if verb == "backup" and place == "data of a pack":
            _is_stored_again(casfs, scene, tmp_path / "restored")
        if verb == "prune":
            # A refusal has taken nothing, and what came to its end has taken nothing that is needed.
            survivors = cell.must_survive()
            found = cell.look(scene)
            for name in found:
                assert survivors[name] <= {
                    p for n, p in right(found, intact.published) if n == name
                }
        shutil.rmtree(scene.root)
