"""The race matrix finds what breaks the rules of many hosts: variants of the product, broken on purpose.

Each variant leaves out one rule of `casfs.repository.publication`, `casfs.maintenance.shared_prune` or
`casfs.store.writer`. The X"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from casfs.errors import CasfsError
from casfs.format.tree import Node
from casfs.maintenance import shared_marking
from casfs.maintenance.shared_prune import SharedPruner
from casfs.repository import publication
from casfs.repository.publication import SnapshotPublisher
from casfs.repository.snapshot_listing import DRAFTS
from casfs.store import pack_builder
from tests.support.effort import EFFORT, dice
from tests.support.interleaving import Chooser, Fault, by_turns
from tests.support.race_scenarios import (
    Scenario,
    a_backup_of_what_was_forgotten_and_two_prunes,
    old_data,
)
from tests.support.storage_double import Call

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.timeout(900),
]

_MOST_RUNS = 5000
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


def the_writer_publishes_what_it_could_not_look_at(patch: pytest.MonkeyPatch) -> None:
    look = SnapshotPublisher._look

    def broken(
        self: SnapshotPublisher, root: Node, known: publication._Known
    ) -> publication._Known:
        try:
            return look(self, root, known)
        except CasfsError:
            return known

    patch.setattr(SnapshotPublisher, "_look", broken)


def a_new_pack_may_have_the_name_of_a_removed_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pack_builder, "os", SimpleNamespace(**(vars(os) | {"urandom": bytes})))


VARIANTS: dict[Break, int] = {
    the_writer_does_not_look: 35,
    the_prune_ignores_drafts: 34,
    the_prune_deletes_every_draft: 4,
    the_prune_deletes_what_it_has_just_marked: 5,
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


def first(calls: list[Call], method: str, prefix: str, after: int = 0) -> int:
    """Return the number of the first such call from `after` on."""
    return next(
        number
        for number, call in enumerate(calls)
        if number >= after and call.method == method and call.name.startswith(prefix)
    )


Schedule = tuple[Chooser, dict[str, tuple[int, Fault]]]

B, P, Q = 0, 1, 2
"""The hosts of the scenario: a backup of files whose pack no snapshot needs any more, and two prunes."""


def a_writer_sleeps_before_its_draft_and_cannot_look(scenario: Scenario) -> Schedule:
    """The writer relies on a pack, two prunes mark and remove it, and a listing of its last look fails."""
    calls = scenario.calls_of("B")
    draft = first(calls, "create", "drafts/")
    listing = first(calls, "list", "deltas", draft)
    choose = by_turns([(B, draft), (P, None), (B, None)])
    return choose, {"B": (listing, Fault.LISTING_FAILS)}


def a_writer_sleeps_before_its_draft(scenario: Scenario) -> Schedule:
    """The writer relies on a pack, two prunes mark and remove it, and then it looks."""
    draft = first(scenario.calls_of("B"), "create", "drafts/")
    return by_turns([(B, draft), (P, None), (B, None)]), {}


def a_deletion_lands_after_the_same_pack_was_stored_again(scenario: Scenario) -> Schedule:
    """A prune deletes a pack, a writer stores the same files again, then the deletion is repeated."""
    deletion = first(scenario.calls_of("P"), "delete", "packs/")
    return by_turns([(P, None), (B, None)]), {"P": (deletion, Fault.REPEATED_LATE)}


def prunes_run_between_the_look_and_the_snapshot_of_a_writer_that_then_dies(
    scenario: Scenario,
) -> Schedule:
    """Only the draft keeps the pack, since the writer never looks again."""
    snapshot = first(scenario.calls_of("B"), "create", "snapshots/")
    choose = by_turns([(B, snapshot), (P, None), (Q, None), (B, None)])
    return choose, {"B": (snapshot + 1, Fault.DIES)}


def a_writer_looks_while_a_prune_is_about_to_publish_its_notice(scenario: Scenario) -> Schedule:
    """The prune listed the drafts before that of the writer, which publishes after it, and then dies."""
    notice = first(scenario.calls_of("P"), "create", "condemned/")
    snapshot = first(scenario.calls_of("B"), "create", "snapshots/")
    choose = by_turns([(P, notice), (B, snapshot), (P, None), (B, None)])
    return choose, {"B": (snapshot + 1, Fault.DIES)}


DIRECTED: dict[Break, Callable[[Scenario], Schedule]] = {
    the_writer_does_not_look: a_writer_sleeps_before_its_draft,
    the_writer_publishes_what_it_could_not_look_at: (
        a_writer_sleeps_before_its_draft_and_cannot_look
    ),
    a_new_pack_may_have_the_name_of_a_removed_one: (
        a_deletion_lands_after_the_same_pack_was_stored_again
    ),
    the_prune_ignores_drafts: (
        prunes_run_between_the_look_and_the_snapshot_of_a_writer_that_then_dies
    ),
    the_prune_deletes_every_draft: (
        prunes_run_between_the_look_and_the_snapshot_of_a_writer_that_then_dies
    ),
    the_prune_deletes_what_it_has_just_marked: (
        a_writer_looks_while_a_prune_is_about_to_publish_its_notice
    ),
}
"""Each variant with the schedule that breaks it."""


@pytest.mark.parametrize("variant", DIRECTED)
def test_a_directed_schedule_breaks_a_variant(
    variant: Break, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant(monkeypatch)
    scenario = Scenario(tmp_path, old_data, a_backup_of_what_was_forgotten_and_two_prunes)
    choose, faults = DIRECTED[variant](scenario)
    with pytest.raises((AssertionError, CasfsError)) as found:
        scenario.run(choose, faults)
    print(f"found: {found.value}")


@pytest.mark.parametrize("schedule", dict.fromkeys(DIRECTED.values()))
def test_a_directed_schedule_breaks_no_rule_that_holds(
    schedule: Callable[[Scenario], Schedule], tmp_path: Path, own_home: Path
) -> None:
    scenario = Scenario(tmp_path, old_data, a_backup_of_what_was_forgotten_and_two_prunes)
    choose, faults = schedule(scenario)
    run = scenario.run(choose, faults)
    # The fault happened, and every host got as far as it.
    assert all(len(host.calls) > faults[host.name][0] for host in run.hosts if host.name in faults)
