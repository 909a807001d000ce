"""Writers, prunes and other commands of several hosts at once, stepped through their storage calls.

Nothing that a host can do at any moment, and no request that takes effect late, leaves a published snapshot
without its data.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.effort import EFFORT, dice
from tests.support.interleaving import by_chance, explore
from tests.support.race_scenarios import SCENARIOS, Scenario

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
