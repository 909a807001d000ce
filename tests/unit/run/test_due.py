"""When a step is due, by what is remembered of earlier runs."""

from __future__ import annotations

import pytest

from casfs.config.profiles import CheckPlan, Keep, Profile
from casfs.config.values import AbsolutePath, Duration
from casfs.run.due import plan_steps
from casfs.run.outcome import StepName
from casfs.run.state import ProfileState, StepRecord

DAY = 86_400.0
NOW = 1_800_000_000.0

PROFILE = Profile(
    repository="nas",
    sources=(AbsolutePath("/home"),),
    keep=Keep(daily=7),
    prune_every=Duration("7d"),
    check=CheckPlan(every=Duration("1d")),
    mirror_to=("cloud", "usb"),
)


def waits(profile: Profile = PROFILE, **steps: StepRecord) -> dict[str, float]:
    state = ProfileState(profile="home", steps=dict(steps))
    return {step.key: step.waits_s for step in plan_steps(profile, state, NOW)}


def test_every_step_is_due_in_its_order_when_nothing_is_remembered() -> None:
    assert waits() == dict.fromkeys(
        ["backup", "forget", "prune", "check", "mirror cloud", "mirror usb"], 0.0
    )
    assert list(waits()) == ["backup", "forget", "prune", "check", "mirror cloud", "mirror usb"]


def test_a_profile_has_only_the_steps_that_it_asks_for() -> None:
    profile = Profile(repository="nas", sources=(AbsolutePath("/home"),))
    assert list(waits(profile)) == [StepName.BACKUP]


@pytest.mark.parametrize(
    ("days_ago", "wait_days"), [(0.5, 5.8), (6.0, 0.3), (6.4, 0.0), (7.0, 0.0), (700.0, 0.0)]
)
def test_a_step_waits_for_nine_tenths_of_its_period(days_ago: float, wait_days: float) -> None:
    at = NOW - days_ago * DAY
    found = waits(prune=StepRecord(last_run_s=at, last_success_s=at))
    assert found["prune"] == pytest.approx(wait_days * DAY)
    assert found["check"] == 0


def test_a_step_that_failed_is_due_at_once() -> None:
    record = StepRecord(last_run_s=NOW - 60, last_success_s=NOW - DAY / 2, exit=5)
    assert waits(check=record)["check"] == 0
    assert waits(check=StepRecord(last_run_s=NOW - 60, exit=1))["check"] == 0


def test_a_record_of_the_future_does_not_hold_a_step_back() -> None:
    at = NOW + 400 * DAY
    assert waits(prune=StepRecord(last_run_s=at, last_success_s=at))["prune"] == 0


def test_a_check_without_a_period_runs_each_time() -> None:
    profile = Profile(repository="nas", sources=(AbsolutePath("/home"),), check=CheckPlan())
    found = waits(profile, check=StepRecord(last_run_s=NOW, last_success_s=NOW))
    assert found["check"] == 0
