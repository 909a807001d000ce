"""Random damage between random commands: readable data stays readable, and all can be repaired.

Each seed is a way that `exploring` makes and goes. A long run (`make soak`) takes other seeds every time
and prints them; what it finds is shortened by leaving moves out, and kept here with its name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from casfs.format.versions import NEWEST_FORMAT, OLDEST_FORMAT
from tests.support.effort import EFFORT, dice
from tests.support.explorer import Explorer, Kind
from tests.support.process_runner import Stage
from tests.support.random_moves import Move, make_way

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 * EFFORT)]

WAYS = {Kind.PLAIN: 6 * EFFORT, Kind.ENCRYPTED: 2 * EFFORT, Kind.CLOSED: EFFORT}

FOUND: dict[str, list[Move]] = {
    "packs that changed places are replaced though all their blobs were read since": [
        ("backup", 2, 0, 0),
        ("backup", 2, 0, 0),
        ("two packs change places", 0, 1, 0),
    ],
    "what a check has found in a copy is stored again though an older index named another": [
        ("backup", 2, 0, 0),
        ("backup", 2, 0, 0),
        ("edit", 22268, 18110, 31004),
        ("backups at the same time", 52860, 37093, 5699),
        ("forget", 58602, 0, 0),
        ("two packs change places", 62734, 6873, 0),
        ("prune", 0, 0, 0),
        ("repair index", 0, 0, 0),
        ("the index is an older one", 8565, 0, 0),
        ("a block of a pack is zeroed", 33488, 11462, 0),
        ("check", 0, 0, 0),
        ("backup", 0, 0, 0),
    ],
}


@pytest.fixture
def folder() -> Iterator[Path]:
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


@pytest.mark.parametrize("kind", Kind, ids=[kind.value for kind in Kind])
def test_random_damage_between_random_commands_loses_no_more_and_can_be_repaired(
    stage: Stage, folder: Path, kind: Kind
) -> None:
    throw = dice()
    for number in range(WAYS[kind]):
        seed = throw.getrandbits(32)
        # A third of the ways of plain repositories are in the old format.
        format_ = OLDEST_FORMAT if number % 3 == 0 else NEWEST_FORMAT
        here = folder / str(number)
        here.mkdir()
        try:
            Explorer(stage, here, kind, format_).go(make_way(seed))
        except AssertionError as error:
            raise AssertionError(
                f"the way of seed {seed}, format {format_}, fails: {error}"
            ) from error


@pytest.mark.parametrize("format_", [OLDEST_FORMAT, NEWEST_FORMAT])
@pytest.mark.parametrize("name", FOUND)
def test_repaired_bugs_of_the_explorer_stay_repaired(
    stage: Stage, folder: Path, name: str, format_: int
) -> None:
    Explorer(stage, folder, format_=format_).go(FOUND[name])
