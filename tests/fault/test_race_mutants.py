"""The race matrix finds what breaks the rules of many hosts: variants of the product, broken on purpose.

Each variant leaves out one rule of `casfs.repository.publication` or `casfs.maintenance.shared_prune`. The
matrix runs schedules and faults by chance until one of them loses data.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from casfs.errors import CasfsError
from casfs.maintenance import shared_marking
from casfs.maintenance.shared_prune import SharedPruner
from casfs.repository.publication import SnapshotPublisher
from casfs.repository.snapshot_listing import DRAFTS
from tests.support.effort import EFFORT, dice
from tests.support.race_scenarios import (
    Scenario,
    a_backup_of_what_was_forgotten_and_two_prunes,
    old_data,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.timeout(900),
]

_MOST_RUNS = 1000
"""How many schedules are tried before a variant counts as not found."""

Break = Callable[[pytest.MonkeyPatch], None]


def the_writer_does_not_look(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SnapshotPublisher, "_look", lambda self, root, known: known)


def the_prune_ignores_drafts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shared_marking, "list_drafts", lambda storage: {})


def the_prune_deletes_every_draft(patch: pytest.MonkeyPatch) -> None:
    remove = SharedPruner._remove_old_objects

    def broken(self: SharedPruner) -> None:
        for snapshot_id in self._marking.drafts:
            self._storage.delete(f"{DRAFTS}/{snapshot_id.hex()}")
        remove(self)

    patch.setattr(SharedPruner, "_remove_old_objects", broken)


def the_prune_deletes_what_it_has_just_marked(patch: pytest.MonkeyPatch) -> None:
    publish = SharedPruner._publish_notice

    def broken(self: SharedPruner, ordinals: set[int]) -> None:
        publish(self, ordinals)
        self._remove(frozenset(ordinals & self._marking.records.keys()))

    patch.setattr(SharedPruner, "_publish_notice", broken)


VARIANTS: dict[Break, int] = {
    the_writer_does_not_look: 5,
    the_prune_ignores_drafts: 11,
    the_prune_deletes_every_draft: 4,
    the_prune_deletes_what_it_has_just_marked: 1,
}
"""Each variant with a seed that soon leads to a schedule that shows it; a long run has seeds of its own."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_race_matrix_finds_a_broken_variant(
    variant: Break, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant(monkeypatch)
    chance = random.Random(VARIANTS[variant]) if EFFORT == 1 else dice()
    scenario = Scenario(tmp_path, old_data, a_backup_of_what_was_forgotten_and_two_prunes)
    for _ in range(_MOST_RUNS):
        try:
            scenario.run(*scenario.by_chance(chance))
        except (AssertionError, CasfsError) as error:
            print(f"found: {error}")
            return
    pytest.fail(f"no schedule shows that {variant.__name__}")
