"""The ways that an explorer goes: moves that are left to chance, the same for the same seed.

A move is a name and three numbers, which say which file, which snapshot or which place is meant among
those that there are then. So a way can be shortened by leaving moves out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from tests.support.process_runner import KIB
from tests.support.random_damage import HURTS, MOST

Move = tuple[str, int, int, int]

NAMES = ("a", "b", "c", "folder/d", "folder/e", "folder/below/f", "folder/below/g", "h")
SPARSE = -1
SIZES = (0, 100, 12 * KIB, 12 * KIB, 30 * KIB, 50 * KIB, 70 * KIB, 300 * KIB, SPARSE)
SHARES = (0.0, 0.25, 1.0)
STEPS = 50
"""Verbs that are killed have about so many durable steps."""

COMMANDS = (
    "check --read-data",
    "check",
    "restore {one} --target {target}",
    "dump {one}",
    "ls {one}",
    "diff {one} {other}",
    "changed {one}",
    "find *",
    "log {one}:{path}",
    "snapshots",
    "stats",
    "prune --dry-run",
    "forget --keep-last 1 --dry-run",
    "repair snapshots --read-data --dry-run",
)
"""What is said on the command line to a copy."""

VERBS = {
    "edit": 2,
    "backup": 4,
    "backups at the same time": 1,
    "forget": 3,
    "check": 5,
    "check structure": 1,
    "check a part": 2,
    "prune": 12,
    "prune beside a reader": 1,
    "prune beside a writer": 2,
    "repair index": 2,
    "repair snapshots": 2,
    "repair snapshots as they seem": 1,
    "look": 2,
    "look through the mount": 2,
    "restore": 2,
    "command": 2,
    "killed backup": 1,
    "killed prune": 2,
}
"""What is done besides damage, each with how often it is chosen."""


def make_way(seed: int) -> list[Move]:
    """Return the way of a seed.

    Snapshots that share much are made and some of them forgotten, which may leave packs pending removal; then
    come rounds of up to three damages and as many verbs.
    """
    dice = random.Random(seed)

    def moves(count: int, **kinds: int) -> Iterator[Move]:
        names = dice.choices(list(kinds), list(kinds.values()), k=count)
        return ((name, *(dice.randrange(MOST) for _ in range(3))) for name in names)  # type: ignore[misc]

    way = [*moves(7, edit=1)]
    if dice.random() < 0.1:
        way += moves(1, **{"fill a directory": 1})
    for _ in range(dice.randrange(3, 6)):
        way += moves(1, **{"backup": 2, "backups at the same time": 1})
        way += moves(2, edit=1)
    way += moves(dice.randrange(1, 4), forget=1)
    way += moves(dice.randrange(2), **{"prune beside a writer": 1})
    hurts = {name: often for name, (often, _) in HURTS.items()}
    for _ in range(5):
        way += moves(dice.choice((0, 1, 1, 1, 2, 2, 3)), **hurts)
        way += moves(dice.choice((1, 1, 2, 3)), **VERBS)
    return way
