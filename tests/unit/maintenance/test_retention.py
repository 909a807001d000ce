"""Which snapshots rules keep, and how people write lengths of time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casfs.errors import UsageError
from casfs.maintenance.retention import (
    UNLIMITED,
    CalendarSpan,
    Policy,
    apply_policy,
    parse_duration,
)


@dataclass(frozen=True)
class Dated:
    time_ns: int
    tags: tuple[str, ...] = ()


def at(text: str, *tags: str) -> Dated:
    return Dated(int(datetime.fromisoformat(text).timestamp()) * 10**9, tags)


def at_ns(moment: datetime) -> int:
    return int(moment.timestamp()) * 10**9


def kept(snapshots: Iterable[Dated], policy: Policy) -> list[str]:
    """Return the local times of what is kept, the newest first."""
    return [
        datetime.fromtimestamp(v.snapshot.time_ns // 10**9).isoformat(" ", "minutes")
        for v in apply_policy(snapshots, policy)
        if v.is_kept
    ]


HOURLY = [at(f"2026-03-{day:02} {hour:02}:30") for day in (1, 2, 3) for hour in range(24)]


class TestRetentionPolicy:
    def test_keep_last_keeps_the_newest_snapshots(self) -> None:
        assert kept(HOURLY, Policy(last=2)) == ["2026-03-03 23:30", "2026-03-03 22:30"]

    def test_a_period_rule_keeps_the_newest_of_as_many_periods(self) -> None:
        assert kept(HOURLY, Policy(daily=2)) == ["2026-03-03 23:30", "2026-03-02 23:30"]
        assert len(kept(HOURLY, Policy(hourly=30))) == 30
        assert kept(HOURLY, Policy(weekly=9)) == ["2026-03-03 23:30", "2026-03-01 23:30"]
        assert (
            kept(HOURLY, Policy(monthly=9))
            == kept(HOURLY, Policy(yearly=9))
            == kept(HOURLY, Policy(last=1))
        )

    def test_a_period_rule_skips_periods_without_a_snapshot(self) -> None:
        sparse = [at("2020-01-01 10:00"), at("2023-05-01 10:00"), at("2026-01-01 10:00")]
        assert len(kept(sparse, Policy(daily=3))) == 3
        assert kept(sparse, Policy(yearly=2)) == ["2026-01-01 10:00", "2023-05-01 10:00"]

    def test_an_unlimited_rule_keeps_one_snapshot_of_every_period(self) -> None:
        assert len(kept(HOURLY, Policy(daily=UNLIMITED))) == 3
        assert len(kept(HOURLY, Policy(last=UNLIMITED))) == len(HOURLY)

    def test_the_week_at_the_turn_of_the_year_counts_once(self) -> None:
        turn = [at("2025-12-31 10:00"), at("2026-01-01 10:00")]
        assert kept(turn, Policy(weekly=5)) == ["2026-01-01 10:00"]
        assert len(kept(turn, Policy(yearly=5))) == 2

    def test_keep_within_counts_from_the_newest_snapshot_and_not_from_now(self) -> None:
        found = kept(HOURLY, Policy(within=CalendarSpan("2h", "--keep-within")))
        assert found == ["2026-03-03 23:30", "2026-03-03 22:30", "2026-03-03 21:30"]

    def test_keep_tag_keeps_snapshots_of_any_age(self) -> None:
        tagged = [at("2001-01-01 00:00", "release", "x"), at("2026-01-01 00:00")]
        assert kept(tagged, Policy(tags=(frozenset({"release"}),))) == ["2001-01-01 00:00"]

    def test_keep_tag_with_several_tags_needs_all_of_them(self) -> None:
        tagged = [at("2026-01-01 00:00", "a"), at("2026-01-02 00:00", "b", "c", "a")]
        assert kept(tagged, Policy(tags=(frozenset("ab"),))) == ["2026-01-02 00:00"]
        assert len(kept(tagged, Policy(tags=(frozenset("a"), frozenset("b"))))) == 2

    def test_a_decision_names_every_rule_that_keeps_a_snapshot(self) -> None:
        verdicts = apply_policy(
            [at("2026-01-01 00:00", "a", "b")],
            Policy(1, 1, 1, 1, 1, 1, None, (frozenset("b"), frozenset("ba"), frozenset("bc"))),
        )
        names = ("last", "hourly", "daily", "weekly", "monthly", "yearly", "tag b", "tag a,b")
        assert verdicts[0].reasons == names

    def test_an_empty_policy_keeps_nothing(self) -> None:
        assert Policy().is_empty()
        assert kept(HOURLY, Policy()) == []
        assert apply_policy([], Policy(last=3)) == []

    def test_a_policy_accepts_times_that_no_calendar_has(self) -> None:
        far = [Dated(1 << 63), Dated(-(1 << 63)), at("2026-01-01 00:00")]
        assert len(apply_policy(far, Policy(last=3, daily=3, within=CalendarSpan("1y", "x")))) == 3


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The zone of Berlin, whose clocks are put forward on 2026-03-29 and back on 2026-10-25."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
        time.tzset()
        yield
    time.tzset()


def utc(text: str) -> Dated:
    return Dated(at_ns(datetime.fromisoformat(text + "+00:00")))


@pytest.mark.usefixtures("berlin")
class TestChangeOfTheClock:
    def test_an_hour_is_an_hour_when_clocks_are_put_forward(self) -> None:
        times = [utc("2026-03-29 00:35"), utc("2026-03-29 00:50"), utc("2026-03-29 01:00")]
        assert len(kept(times, Policy(within=CalendarSpan("1h", "x")))) == 3
        assert len(kept(times, Policy(within=CalendarSpan("20min", "x")))) == 2

    def test_an_hour_is_an_hour_when_clocks_are_put_back(self) -> None:
        times = [utc("2026-10-24 23:55"), utc("2026-10-25 00:50"), utc("2026-10-25 01:30")]
        assert len(kept(times, Policy(within=CalendarSpan("1h", "x")))) == 2
        assert len(kept(times, Policy(within=CalendarSpan("1d", "x")))) == 3

    def test_the_hour_that_is_repeated_is_two_hours(self) -> None:
        assert len(kept([utc("2026-10-25 00:30"), utc("2026-10-25 01:30")], Policy(hourly=5))) == 2

    def test_days_and_months_are_those_of_the_zone(self) -> None:
        days = [utc("2026-03-28 22:30"), utc("2026-03-28 23:30"), utc("2026-03-29 21:30")]
        assert len(kept(days, Policy(daily=5))) == 2
        months = [utc("2026-03-30 21:58"), utc("2026-03-31 21:59"), utc("2026-04-30 21:59")]
        assert len(kept(months, Policy(within=CalendarSpan("1m", "x")))) == 2


class TestFuture:
    NOW = at_ns(datetime(2026, 3, 4))

    def test_a_snapshot_from_the_future_is_kept_and_steers_no_rule(self) -> None:
        future = at("2031-01-01 00:00")
        for policy in (
            Policy(within=CalendarSpan("7d", "x")),
            Policy(last=3),
            Policy(daily=2, yearly=1),
        ):
            alone = apply_policy(HOURLY, policy, self.NOW)
            decisions = apply_policy([*HOURLY, future], policy, self.NOW)
            assert decisions[1:] == alone
            assert (decisions[0].snapshot, decisions[0].reasons) == (future, ("future",))
            assert decisions[0].is_from_future and not alone[0].is_from_future

    def test_clocks_that_differ_by_seconds_make_no_future(self) -> None:
        soon = Dated(self.NOW + 30 * 10**9)
        assert apply_policy([soon], Policy(last=1), self.NOW)[0].reasons == ("last",)


@given(
    st.lists(st.integers(0, 40_000), max_size=60, unique=True),
    st.integers(0, 5),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_retention_rules_hold_for_random_times(
    hours: list[int], last: int, daily: int, monthly: int
) -> None:
    snapshots = [Dated((1_500_000_000 + 3600 * hour) * 10**9) for hour in hours]
    verdicts = apply_policy(snapshots, Policy(last=last, daily=daily, monthly=monthly))
    times = [verdict.snapshot.time_ns for verdict in verdicts]
    assert times == sorted((s.time_ns for s in snapshots), reverse=True)
    # An oracle that asks each day and month for its newest.
    moments = [datetime.fromtimestamp(time_ns // 10**9) for time_ns in times]
    wanted = set(times[:last])
    for form, most in (("%Y-%m-%d", daily), ("%Y-%m", monthly)):
        newest: dict[str, int] = {}
        for moment, time_ns in zip(moments, times, strict=True):
            newest.setdefault(moment.strftime(form), time_ns)
        wanted |= set(sorted(newest.values(), reverse=True)[:most])
    assert {verdict.snapshot.time_ns for verdict in verdicts if verdict.is_kept} == wanted


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("10m", 600),
        ("10min", 600),
        ("1h30m", 5400),
        ("30d", 2_592_000),
        ("2w", 1_209_600),
    ],
)
def test_durations_are_read(text: str, seconds: int) -> None:
    assert parse_duration(text, "--x") == seconds


@pytest.mark.parametrize("text", ["", "5", "d", "1y", "5 d", "-5d", "1h30", "٣d", "99999999d"])
def test_invalid_durations_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--max-duration"):
        parse_duration(text, "--max-duration")


class TestCalendarSpan:
    MARCH = datetime(2024, 3, 31, 12)

    @pytest.mark.parametrize(
        ("text", "earlier"),
        [
            ("1m", datetime(2024, 2, 29, 12)),
            ("1y1m", datetime(2023, 2, 28, 12)),
            ("1y", datetime(2023, 3, 31, 12)),
            ("36h", MARCH - timedelta(hours=36)),
            ("2w3d5min", MARCH - timedelta(days=17, minutes=5)),
        ],
    )
    def test_a_span_follows_the_calendar(self, text: str, earlier: datetime) -> None:
        before_ns = CalendarSpan(text, "--keep-within").before_ns(at_ns(self.MARCH))
        assert before_ns == at_ns(earlier)

    def test_a_span_longer_than_the_calendar_goes_back_to_the_beginning(self) -> None:
        for text in ("5000y", "999999d"):
            assert CalendarSpan(text, "x").before_ns(at_ns(self.MARCH)) <= -(1 << 63)

    @pytest.mark.parametrize("text", ["", "7", "1s", "x", "1y 2d"])
    def test_an_invalid_span_is_refused(self, text: str) -> None:
        with pytest.raises(UsageError, match="--keep-within"):
            CalendarSpan(text, "--keep-within")
