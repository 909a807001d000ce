"""Writers, prunes and other commands of several hosts at once, stepped through their storage calls.

Nothing that a host can do at any moment, and no request that takes effect late, leaves a published snapshot
without its data.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.effort import EFFORT, dice
from tests.support.interleaving import Chooser, by_chance, by_list, explore
from tests.support.race_scenarios import (
    BEGINNINGS,
    SCENARIOS,
    Scenario,
    Stage,
    a_sleeper_and_prunes_that_drop_drafts,
    writers_and_prunes_that_drop_drafts,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.timeout(300 * EFFORT),
]

RUNS = 3 * EFFORT


@pytest.fixture(params=SCENARIOS, ids=lambda pair: f"{pair[0].__name__}-{pair[1].__name__}")
def scenario(request: pytest.FixtureRequest, tmp_path: Path, own_home: Path) -> Scenario:
    return Scenario(tmp_path, *request.param)


def test_no_interleaving_loses_data_of_a_published_snapshot(scenario: Scenario) -> None:
    """All schedules with one preemption in a long run, a few of them in a short one."""
    limit = RUNS if EFFORT == 1 else None
    explore(lambda choose: scenario.run(choose).choices, 1, limit, dice())


def test_no_fault_at_any_call_loses_data_of_a_published_snapshot(scenario: Scenario) -> None:
    """Every fault at every call of every host in a long run; the others go on by chance."""
    chance = dice()
    cases = [
        (name, number, fault)
        for name, possible in scenario.faults.items()
        for fault, numbers in possible.items()
        for number in numbers
    ]
    if EFFORT == 1:
        cases = chance.sample(cases, RUNS)
    for name, number, fault in cases:
        scenario.run(by_chance(chance, 0.2), {name: (number, fault)})


def test_no_faults_at_random_lose_data_of_a_published_snapshot(scenario: Scenario) -> None:
    chance = dice()
    for _ in range(RUNS):
        scenario.run(*scenario.by_chance(chance))


@pytest.mark.parametrize("begin", BEGINNINGS.values(), ids=lambda begin: begin.__name__)
class TestDroppedDrafts:
    """Writers that every prune takes for dead, though they only sleep, and that live on.

    A real prune waits for a week first. So a writer that dies right after such a sleep, between its
    snapshot and its last look, is the only one that could leave a snapshot without data.
    """

    def test_no_interleaving_loses_data_of_a_published_snapshot(
        self, tmp_path: Path, own_home: Path, begin: Callable[[Path], Stage]
    ) -> None:
        scenario = Scenario(tmp_path, begin, writers_and_prunes_that_drop_drafts)
        limit = RUNS if EFFORT == 1 else None
        explore(lambda choose: scenario.run(choose).choices, 1, limit, dice())

    def test_no_faults_of_the_prunes_lose_data_of_a_published_snapshot(
        self, tmp_path: Path, own_home: Path, begin: Callable[[Path], Stage]
    ) -> None:
        scenario, chance = Scenario(tmp_path, begin, writers_and_prunes_that_drop_drafts), dice()
        for _ in range(RUNS):
            choose, faults = scenario.by_chance(chance)
            scenario.run(choose, {name: faults[name] for name in faults if name in ("P", "Q")})

    def test_a_writer_that_sleeps_before_any_of_its_calls_loses_nothing(
        self, tmp_path: Path, own_home: Path, begin: Callable[[Path], Stage]
    ) -> None:
        """While it sleeps, prunes drop its draft, mark what only it needs, and remove it."""
        scenario = Scenario(tmp_path, begin, a_sleeper_and_prunes_that_drop_drafts)
        calls = len(scenario.run(by_list([])).hosts[0].calls)
        for number in range(calls + 1):
            scenario.run(_first_host_then_other(number))


def _first_host_then_other(number: int) -> Chooser:
    """Choose the first host so many times, then the other one until it ends."""

    def choose(count: int, enabled: tuple[int, ...], running: int | None) -> int:
        wanted = 0 if count < number else 1
        return wanted if wanted in enabled else enabled[0]

    return choose
